"""Softmax losses: log-sum-exp over the negatives of each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.model.losses.chunked import Block, LossGradients, Precision, chunked_loss, row_log_sum_exp, scaled
from trec_twotower.model.losses.relations import Relations


def softmax(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    temperature: float | Tensor = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the weighted sum over positives of -log softmax over the positive and its row's negatives, in nats.

    With logits l_ij = u_i . v_j / temperature - log q_j, positive p of row i and column j has the loss

        weight_p * (log(exp(l_ij) + sum over negatives n of row i of exp(l_in)) - l_ij)

    so that the positives of a row are not negatives of each other. InfoNCE (van den Oord et al. 2018) with the
    logQ correction of Bengio and Senecal (2008) and Yi et al. (2019).
    """
    user_BD, item_CD = scaled(user_BD, item_CD, temperature)
    return chunked_loss(user_BD, item_CD, relations, _softmax, precision=precision)


def _softmax(block: Block) -> LossGradients:
    total_b, log_total_b = _exponentials(block)
    # With L = log(sum over the row's negatives of exp(l)), the loss of positive p is log(1 + exp(L - l_p)). Only the
    # negatives share a shift, so positives of very different size cause no overflow.
    margin_p = log_total_b[block.row_p] - block.logit_p
    missed_p = block.weight_p * torch.sigmoid(margin_p)  # probability of the negatives
    return LossGradients(
        loss=-torch.dot(block.weight_p, F.logsigmoid(-margin_p)),
        cell_bC=block.logit_bC,
        factor_b=block.per_row(missed_p) / total_b.clamp(min=1.0),
        pair_p=-missed_p,
    )


def bsl(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    temperature: float | Tensor = 1.0,
    temperature_ratio: float = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the bilateral softmax loss, which has a log-sum-exp over the positives as well, in nats.

    A row of positives p with weights w_p, which sum to W, and negatives n has the loss

        W * (log(sum over n of exp(l_n)) - r * log(sum over p of w_p / W * exp(l_p / r)))

    with the logits of `softmax` and r = `temperature_ratio`, the positives' temperature in units of the negatives'. A
    larger r lowers the weight of positives with low logits, which may be noise. The loss of a row without negatives is
    0. That of a row with one positive does not depend on r: it is the softmax without the positive in the denominator.
    Wu et al. 2023, "BSL: Understanding and Improving Softmax Loss for Recommendation", divided by their tau_2.
    """

    def rule(block: Block) -> LossGradients:
        total_b, log_total_b = _exponentials(block)
        weight_b = block.per_row(block.weight_p) * (block.total_weight_b > 0)
        value_p = block.logit_p / temperature_ratio + block.weight_p.log()
        log_sum_b = row_log_sum_exp(value_p, block.row_p, len(total_b))
        is_counted_b = weight_b > 0
        positive_b = temperature_ratio * (log_sum_b - weight_b.where(is_counted_b, 1.0).log())
        negative_b = log_total_b.where(is_counted_b, 0.0)
        share_p = (value_p - log_sum_b[block.row_p]).exp()
        return LossGradients(
            loss=(weight_b * (negative_b - positive_b)).sum(),
            cell_bC=block.logit_bC,
            factor_b=weight_b / total_b.clamp(min=1.0),
            pair_p=-weight_b[block.row_p] * share_p,
        )

    user_BD, item_CD = scaled(user_BD, item_CD, temperature)
    return chunked_loss(user_BD, item_CD, relations, rule, precision=precision)


def _exponentials(block: Block) -> tuple[Tensor, Tensor]:
    """Overwrite each row with exp(logit - maximum); return the row sums and the log-sum-exp of each row.

    A row sum is at least 1, the term of the largest logit, and 0 for a row without negatives.
    """
    logit_bC = block.logit_bC
    peak_b = logit_bC.amax(1) if logit_bC.shape[1] else logit_bC.new_zeros(len(logit_bC))
    peak_b = peak_b.where(~peak_b.isneginf(), 0.0)
    total_b = logit_bC.sub_(peak_b[:, None]).exp_().sum(1)
    return total_b, peak_b + total_b.log()
