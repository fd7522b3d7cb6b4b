"""Users whose vectors are more than a point: several, of which each positive meets one, or a mean with a variance."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.config import InterestsConfig
from trec_twotower.model.losses import Pairs, Relations


def one_a_positive(relations: Relations, num_rows: int) -> tuple[Tensor, Relations]:
    """Rows of one positive each: (R,), the row that each is of, and how they relate to the same candidates.

    What a row knows and what it was given, each of its positives does: the other positives of its row are not among
    its negatives. Given pairs share their weight, so that they count as often as before.
    """
    row_P = relations.positive.row_P
    place_P = torch.arange(len(row_P), device=row_P.device)
    if len(row_P) == num_rows and torch.equal(row_P, place_P):
        return row_P, relations
    given = relations.given
    if given is not None:
        given = _for_each(given, row_P, num_rows)
        weight_G = given.weights(torch.empty(0, device=row_P.device))
        of_row_R = torch.bincount(row_P, minlength=num_rows)[row_P]
        given = replace(given, weight_P=weight_G / of_row_R[given.row_P])
    positive = replace(relations.positive, row_P=place_P)
    return row_P, replace(relations, positive=positive, known=_for_each(relations.known, row_P, num_rows), given=given)


def _for_each(pairs: Pairs, row_R: Tensor, num_rows: int) -> Pairs:
    """The pairs of row `row_R[r]`, for each new row r."""
    order_P = torch.argsort(pairs.row_P, stable=True)
    count_B = torch.bincount(pairs.row_P, minlength=num_rows)
    first_B = count_B.cumsum(0) - count_B
    count_R = count_B[row_R]
    new_Q = torch.repeat_interleave(torch.arange(len(row_R), device=row_R.device), count_R)
    within_Q = torch.arange(len(new_Q), device=row_R.device) - (count_R.cumsum(0) - count_R)[new_Q]
    at_Q = order_P[first_B[row_R[new_Q]] + within_Q]
    parts = (pairs.column_P, pairs.weight_P, pairs.label_P)
    column_Q, weight_Q, label_Q = (None if part is None else part[at_Q] for part in parts)
    assert column_Q is not None
    return Pairs(new_Q, column_Q, weight_Q, label_Q)


def chosen(
    user_BMD: Tensor, item_CD: Tensor, row_R: Tensor, column_R: Tensor, config: InterestsConfig, *, is_unit: bool
) -> tuple[Tensor, Tensor]:
    """(R, D), the vector of row `row_R[r]` that meets its positive `column_R[r]`, and (M,), how much each is used.

    hard: the one of the highest score, as in ComiRec (Cen et al. 2020). soft: all, weighted by softmax(sharpness *
    score) and brought to length 1 where vectors are; the label-aware attention of MIND (Li et al. 2019) with an
    exponential in place of its power, which means nothing for scores below 0.
    """
    user_RMD = user_BMD[row_R]
    score_RM = torch.einsum("rmd,rd->rm", user_RMD, item_CD[column_R])
    if config.choose == "hard":
        best_R = score_RM.detach().argmax(1)
        use_M = torch.bincount(best_R, minlength=user_BMD.shape[1]) / max(len(best_R), 1)
        return user_RMD[torch.arange(len(best_R), device=best_R.device), best_R], use_M
    weight_RM = (config.sharpness * score_RM).softmax(1)
    mean_RD = torch.einsum("rm,rmd->rd", weight_RM, user_RMD)
    return F.normalize(mean_RD, dim=1) if is_unit else mean_RD, weight_RM.detach().sum(0) / max(len(weight_RM), 1)


def likeness(user_BMD: Tensor) -> Tensor:
    """(B,): the mean over pairs of a user's vectors of max(0, cosine)²; 0 where all are at right angles or further."""
    num_vectors = user_BMD.shape[1]
    unit_BMD = F.normalize(user_BMD, dim=2)
    cosine_BMM = unit_BMD @ unit_BMD.transpose(1, 2)
    apart = 1 - torch.eye(num_vectors, device=user_BMD.device)
    return (cosine_BMM.clamp(min=0).square() * apart).sum((1, 2)) / (num_vectors * (num_vectors - 1))


def gaussian_user(raw_BE: Tensor, *, is_unit: bool) -> Tensor:
    """(B, 2 D) of a tower's (B, 2 D): the mean, brought to length 1 where vectors are, and half the variance over t.

    A user is a normal distribution of points u with mean m and a variance s² for each number. The score of an item is
    the log of its expected similarity exp(u . v / t), which is the softmax's own at temperature t:

        t * log E[exp(u . v / t)] = m . v + s²/(2 t) . v²

    (the moment generating function of a normal distribution), so one inner product of [m, s²/(2 t)] with [v, v²]: the
    tower makes s²/(2 t) as it is, above 0. A wide number favours items far out to either side along it.
    """
    mean_BD, spread_BD = raw_BE.chunk(2, dim=1)
    # Begins as nearly a point
    return torch.cat([F.normalize(mean_BD, dim=1) if is_unit else mean_BD, F.softplus(spread_BD - 3.0)], dim=1)


def gaussian_item(item_SD: Tensor) -> Tensor:
    """(S, 2 D): [v, v²], what a Gaussian user meets."""
    return torch.cat([item_SD, item_SD.square()], dim=1)
