"""Losses that compare a positive with each negative of its row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trec_twotower.model.losses.chunked import (
    Block,
    LossGradients,
    Precision,
    chunked_loss,
    scaled,
    softplus_sum,
    weighted_sum,
)
from trec_twotower.model.losses.relations import Relations


def bpr(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    temperature: float | Tensor = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the weighted sum over positives of the mean over their negatives of -log sigmoid(l_p - l_n), in nats.

    l = u . v / temperature. With log q the mean has the weights 1 / q, so that candidates sampled by popularity count
    like a uniform sample of the catalogue. Without log q, popular items are negatives as often as they are sampled.
    Rendle et al. 2009, "BPR: Bayesian Personalized Ranking from Implicit Feedback".
    """

    def cost(gap_pC: Tensor, weight_pC: Tensor | None) -> Tensor:
        total_p = softplus_sum(gap_pC, weight_pC)
        gap_pC.sigmoid_()
        return total_p

    user_BD, item_CD = scaled(user_BD, item_CD, temperature)
    return chunked_loss(user_BD, item_CD, relations, _each_pair(cost), weights=True, precision=precision)


def margin(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    margin: float = 0.2,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the weighted sum over positives of the mean over their negatives of max(0, margin - s_p + s_n).

    s = u . v. The mean has the weights of `bpr`. This is the hinge of WSABIE (Weston et al. 2011) without rank weights.
    """

    def cost(gap_pC: Tensor, weight_pC: Tensor | None) -> Tensor:
        total_p = weighted_sum(gap_pC.add_(margin).clamp_(min=0), weight_pC)
        gap_pC.sign_()
        return total_p

    user_BD, item_CD = scaled(user_BD, item_CD)
    return chunked_loss(user_BD, item_CD, relations, _each_pair(cost), weights=True, precision=precision)


def _each_pair(cost: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[Block], LossGradients]:
    """Return a rule from the cost of the gaps l_n - l_p, (pairs, C) and -inf where there is no negative.

    `cost` gets the gaps and the negatives' weights. It returns the weighted sums over negatives, and overwrites the
    gaps with their derivatives.
    """

    def rule(block: Block) -> LossGradients:
        weight_p = block.weight_p * block.mean_factor()[block.row_p]
        loss = block.logit_bC.new_zeros(())
        pair_p = torch.zeros_like(block.logit_p)
        num_rows = len(block.logit_bC)
        is_one_each = torch.equal(block.row_p, torch.arange(num_rows, device=block.row_p.device))
        cell_bC = block.logit_bC if is_one_each else torch.zeros_like(block.logit_bC)
        for start in range(0, len(block.row_p), num_rows):  # num_rows pairs at a time
            part = slice(start, start + num_rows)
            gap_pC = cell_bC if is_one_each else block.logit_bC[block.row_p[part]]  # with one pair per row, in place
            gap_pC.sub_(block.logit_p[part, None])
            weight_pC = block.weight_bC
            if weight_pC is not None and not is_one_each:
                weight_pC = weight_pC[block.row_p[part]]
            loss += (weight_p[part] * cost(gap_pC, weight_pC)).sum()
            gap_pC.mul_(weight_p[part, None])
            if weight_pC is not None:
                gap_pC.mul_(weight_pC)
            pair_p[part] = -gap_pC.sum(1)
            if not is_one_each:
                cell_bC.index_add_(0, block.row_p[part], gap_pC)
        return LossGradients(loss=loss, cell_bC=cell_bC, factor_b=torch.ones_like(block.total_weight_b), pair_p=pair_p)

    return rule
