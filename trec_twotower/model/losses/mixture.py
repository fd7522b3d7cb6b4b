"""Weighted sums of other losses."""

from __future__ import annotations

from torch import Tensor

from trec_twotower.model.losses.chunked import Precision
from trec_twotower.model.losses.pointwise import bce
from trec_twotower.model.losses.relations import Relations
from trec_twotower.model.losses.softmax import softmax


def softmax_bce(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    softmax_share: float = 0.5,
    temperature: float | Tensor = 1.0,
    negative_weight: float = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return softmax_share * `softmax` + (1 - softmax_share) * `bce`: softmax ranks, bce calibrates."""
    ranking = softmax(user_BD, item_CD, relations, temperature=temperature, precision=precision)
    calibration = bce(
        user_BD, item_CD, relations, temperature=temperature, negative_weight=negative_weight, precision=precision
    )
    return softmax_share * ranking + (1 - softmax_share) * calibration
