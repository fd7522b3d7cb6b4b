"""Users with several vectors, or with a mean and a variance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.model.losses import Pairs


def label_aware_attention(
    user_BMD: Tensor, item_CD: Tensor, positive: Pairs, sharpness: float, *, is_unit: bool
) -> Tensor:
    """Return (B, D): the sum of each row's vectors, weighted by softmax(sharpness * score of the row's positive).

    Label-aware attention of MIND (Li et al. 2019), with an exponential instead of a power, which is undefined for
    scores below 0. Unit vectors give a unit vector. All candidates are scored with this vector, so the loss costs as
    much as with one vector per user. But the positive selects the vector that is trained, so vectors can learn to cover
    all items equally, independent of the user.
    """
    assert torch.equal(positive.row_P, torch.arange(len(user_BMD), device=user_BMD.device)), "one positive a row"
    score_BM = torch.einsum("bmd,bd->bm", user_BMD, item_CD[positive.column_P])
    mean_BD = torch.einsum("bm,bmd->bd", (sharpness * score_BM).softmax(1), user_BMD)
    return F.normalize(mean_BD, dim=1) if is_unit else mean_BD


def likeness(user_BMD: Tensor) -> Tensor:
    """Return (B,): the mean of max(0, cosine)² over pairs of a user's vectors; 0 if no cosine is above 0."""
    num_vectors = user_BMD.shape[1]
    unit_BMD = F.normalize(user_BMD, dim=2)
    cosine_BMM = unit_BMD @ unit_BMD.transpose(1, 2)
    apart = 1 - torch.eye(num_vectors, device=user_BMD.device)
    return (cosine_BMM.clamp(min=0).square() * apart).sum((1, 2)) / (num_vectors * (num_vectors - 1))


@torch.no_grad()
def uses(user_BMD: Tensor, item_CD: Tensor, positive: Pairs) -> Tensor:
    """Return (P, M): 1 for the vector of the row with the highest score of a positive, else 0."""
    score_PM = torch.einsum("pmd,pd->pm", user_BMD[positive.row_P], item_CD[positive.column_P])
    return F.one_hot(score_PM.argmax(1), user_BMD.shape[1])


def gaussian_user(raw_BE: Tensor, *, is_unit: bool) -> Tensor:
    """Return (B, 2 D) from a tower's (B, 2 D): the mean, normalized for cosine similarity, and variance / (2 t).

    A user is a normal distribution of points u with mean m and a variance s² for each number. The score of an item is
    the log of its expected similarity exp(u . v / t), the term of a softmax with temperature t:

        t * log E[exp(u . v / t)] = m . v + s²/(2 t) . v²

    (the moment generating function of a normal distribution). It is the dot product of [m, s²/(2 t)] and [v, v²]. The
    tower outputs s²/(2 t), which is positive. A dimension with a large variance favours items with large values.
    """
    mean_BD, spread_BD = raw_BE.chunk(2, dim=1)
    # The initial variance is small
    return torch.cat([F.normalize(mean_BD, dim=1) if is_unit else mean_BD, F.softplus(spread_BD - 3.0)], dim=1)


def gaussian_item(item_SD: Tensor) -> Tensor:
    """Return (S, 2 D): [v, v²], the item vectors for Gaussian users."""
    return torch.cat([item_SD, item_SD.square()], dim=1)
