"""Losses that look at each cell by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.model.losses.blocks import (
    Block,
    Pairs,
    Precision,
    Relations,
    Slopes,
    in_blocks,
    pair_logits,
    scaled,
    softplus_sum,
)


def bce(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    temperature: float | Tensor = 1.0,
    negative_weight: float = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Binary cross-entropy of positives, given pairs with labels in 0 .. 1, and the negatives of each row, in nats.

    A pair of weight w and label y costs w * (y * softplus(-l) + (1 - y) * softplus(l)); positives have label 1. A row's
    N negatives together weigh `negative_weight` times its w * y:

        negative_weight * (sum of w * y) / N * sum over n of softplus(l_n)

    The logits are u . v / temperature, less log q for positives and negatives. So corrected, the best score of an item
    that a row takes with probability p is log(p / (1 - p) * N / negative_weight), however often it is a candidate;
    without the correction popular items lose log q (noise-contrastive estimation, Gutmann and Hyvärinen 2010; Mnih and
    Teh 2012). Given pairs are outcomes of what was shown, not samples, and stay uncorrected; one that a row refused but
    knows is left out.
    """
    user_BD, item_CD = scaled(user_BD, item_CD, temperature)
    pairs = relations.positive
    logit_P = relations.corrected(pair_logits(user_BD, item_CD, pairs), pairs)
    if relations.given is not None:
        given = relations.given
        given = given.where(~(given.is_refused() & relations.is_known(given, item_CD.shape[0])))
        logit_P = torch.cat([logit_P, pair_logits(user_BD, item_CD, given)])
        pairs = Pairs(
            torch.cat([pairs.row_P, given.row_P]),
            torch.cat([pairs.column_P, given.column_P]),
            torch.cat([pairs.weights(logit_P), given.weights(logit_P)]),
            torch.cat([pairs.labels(logit_P), given.labels(logit_P)]),
        )

    def rule(block: Block) -> Slopes:
        taken_b = block.per_row(block.weight_p * block.label_p)
        factor_b = negative_weight * taken_b / block.num_negatives_b.clamp(min=1)
        pair_p = -block.label_p * F.logsigmoid(block.logit_p) - (1 - block.label_p) * F.logsigmoid(-block.logit_p)
        return Slopes(
            loss=(factor_b * softplus_sum(block.logit_bW)).sum() + (block.weight_p * pair_p).sum(),
            cell_bW=block.logit_bW.sigmoid_(),
            factor_b=factor_b,
            pair_p=block.weight_p * (torch.sigmoid(block.logit_p) - block.label_p),
        )

    return in_blocks(
        user_BD, item_CD, relations, rule, pairs=pairs, logit_P=logit_P, given_apart=True, precision=precision
    )


def ccl(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    margin: float = 0.8,
    negative_weight: float = 150.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Cosine contrastive loss: positives to 1, negatives below a margin.

    With unit vectors, s = u . v, a row of positives p with weights w_p that sum to W and of N negatives costs

        sum over p of w_p * (1 - s_p)  +  negative_weight * W / N * sum over n of max(0, s_n - margin)

    Mao et al. 2021, "SimpleX: A Simple and Strong Baseline for Collaborative Filtering".
    """

    def rule(block: Block) -> Slopes:
        excess_bW = block.logit_bW.sub_(margin).clamp_(min=0)
        factor_b = negative_weight * block.per_row(block.weight_p) / block.num_negatives_b.clamp(min=1)
        loss = (factor_b * excess_bW.sum(1)).sum() + (block.weight_p * (1 - block.logit_p)).sum()
        return Slopes(loss=loss, cell_bW=excess_bW.sign_(), factor_b=factor_b, pair_p=-block.weight_p)

    return in_blocks(*scaled(user_BD, item_CD), relations.uncorrected(), rule, precision=precision)
