"""Losses with one term per cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.data.loading.pairs import Pairs
from trec_twotower.model.losses.chunked import (
    Block,
    LossGradients,
    Precision,
    chunked_loss,
    pair_logits,
    scaled,
    softplus_sum,
    weighted_sum,
)
from trec_twotower.model.losses.relations import Relations


def bce(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    temperature: float | Tensor = 1.0,
    negative_weight: float = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the binary cross-entropy of positives, given pairs with labels 0 to 1, and negatives, in nats.

    A pair of weight w and label y has the loss w * (y * softplus(-l) + (1 - y) * softplus(l)). Positives have label 1.
    The N negatives of a row together have the weight `negative_weight` * w * y:

        negative_weight * (sum of w * y) / N * sum over n of softplus(l_n)

    The logits are u . v / temperature, less log q for positives and negatives. With this correction, the
    optimal score of an item with interaction probability p is log(p / (1 - p) * N / negative_weight), however often it
    is a candidate. Without it, the optimum is lower by log q for popular items (noise-contrastive estimation, Gutmann
    and Hyvärinen 2010; Mnih and Teh 2012). Given pairs are impressions, not samples, and get no correction. A given
    pair with label 0 that is also a known pair is ignored.
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

    def rule(block: Block) -> LossGradients:
        taken_b = block.per_row(block.weight_p * block.label_p)
        factor_b = negative_weight * taken_b * block.mean_factor()
        pair_p = -block.label_p * F.logsigmoid(block.logit_p) - (1 - block.label_p) * F.logsigmoid(-block.logit_p)
        return LossGradients(
            loss=(factor_b * softplus_sum(block.logit_bC)).sum() + (block.weight_p * pair_p).sum(),
            cell_bC=block.logit_bC.sigmoid_(),
            factor_b=factor_b,
            pair_p=block.weight_p * (torch.sigmoid(block.logit_p) - block.label_p),
        )

    return chunked_loss(
        user_BD, item_CD, relations, rule, pairs=pairs, logit_P=logit_P, given_apart=True, precision=precision
    )


def ccl(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    margin: float = 0.5,
    negative_weight: float = 150.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the cosine contrastive loss, which moves positives to cosine 1 and negatives below a margin.

    With unit vectors, s = u . v, a row of positives p with weights w_p that sum to W and N negatives has the loss

        sum over p of w_p * (1 - s_p)  +  c * W * sum over n of h(s_n)

    h(s) is max(0, s - margin)² / (2 * (1 - margin)); its slope h' is 0 at the margin and 1 at cosine 1. c is
    negative_weight / N, but at most 1 / (sum over n of h'(s_n)): the gradient of the
    negatives is never larger than that of the positives. The gradient treats c as a constant.

    Mao et al. 2021, "SimpleX: A Simple and Strong Baseline for Collaborative Filtering", has a plain hinge and no
    limit. There, while all vectors point in nearly the same direction, none or all negatives of a row are above the
    margin, and training does not leave that state.
    """

    def rule(block: Block) -> LossGradients:
        slope_bC = block.logit_bC.sub_(margin).clamp_(min=0).div_(1 - margin)
        weighted_bC = slope_bC if block.weight_bC is None else slope_bC * block.weight_bC
        cost_b = (1 - margin) / 2 * weighted_sum(slope_bC, weighted_bC)
        constant_b = torch.minimum(negative_weight * block.mean_factor(), 1 / weighted_bC.sum(1))
        factor_b = constant_b * block.per_row(block.weight_p)
        loss = (factor_b * cost_b).sum() + (block.weight_p * (1 - block.logit_p)).sum()
        return LossGradients(loss=loss, cell_bC=weighted_bC, factor_b=factor_b, pair_p=-block.weight_p)

    user_BD, item_CD = scaled(user_BD, item_CD)
    return chunked_loss(user_BD, item_CD, relations, rule, weights=True, precision=precision)
