"""Users whose vectors are more than a point: several of them, or a mean with a variance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.model.losses import Pairs


def label_aware_attention(
    user_BMD: Tensor, item_CD: Tensor, positive: Pairs, sharpness: float, *, is_unit: bool
) -> Tensor:
    """(B, D): each row's vectors weighted by softmax(sharpness * score of its one positive); of length 1 if they are.

    The label-aware attention of MIND (Li et al. 2019), with an exponential in place of its power, which means nothing
    for scores below 0. All candidates meet this one vector. It costs as little as one vector a user, but the positive
    chooses who it is told from, so that vectors may learn to cover all items alike, whoever the user is.
    """
    assert torch.equal(positive.row_P, torch.arange(len(user_BMD), device=user_BMD.device)), "one positive a row"
    score_BM = torch.einsum("bmd,bd->bm", user_BMD, item_CD[positive.column_P])
    mean_BD = torch.einsum("bm,bmd->bd", (sharpness * score_BM).softmax(1), user_BMD)
    return F.normalize(mean_BD, dim=1) if is_unit else mean_BD


def likeness(user_BMD: Tensor) -> Tensor:
    """(B,): the mean over pairs of a user's vectors of max(0, cosine)²; 0 where all are at right angles or further."""
    num_vectors = user_BMD.shape[1]
    unit_BMD = F.normalize(user_BMD, dim=2)
    cosine_BMM = unit_BMD @ unit_BMD.transpose(1, 2)
    apart = 1 - torch.eye(num_vectors, device=user_BMD.device)
    return (cosine_BMM.clamp(min=0).square() * apart).sum((1, 2)) / (num_vectors * (num_vectors - 1))


@torch.no_grad()
def uses(user_BMD: Tensor, item_CD: Tensor, positive: Pairs) -> Tensor:
    """(P, M): 1 for the one of a row's vectors that scores a positive highest."""
    score_PM = torch.einsum("pmd,pd->pm", user_BMD[positive.row_P], item_CD[positive.column_P])
    return F.one_hot(score_PM.argmax(1), user_BMD.shape[1])


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
