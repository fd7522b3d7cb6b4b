"""Dot products and weighted sums of the vectors of pairs, without holding the vectors of all pairs at a time."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 23}  # numbers of gathered vectors at a time


def dots(one_ND: Tensor, one_P: Tensor, other_MD: Tensor, other_P: Tensor) -> Tensor:
    """Return (P,): the dot product of rows one_P[p] of `one_ND` and other_P[p] of `other_MD`."""
    product_P = one_ND.new_empty(one_P.shape[0])
    for chunk in _chunks(one_P, one_ND):
        product_P[chunk] = torch.linalg.vecdot(one_ND[one_P[chunk]], other_MD[other_P[chunk]])
    return product_P


def add_products(into_ND: Tensor, into_P: Tensor, weight_P: Tensor, from_MD: Tensor, from_P: Tensor) -> None:
    """Add weight_P[p] times row from_P[p] of `from_MD` to row into_P[p] of `into_ND`, in place."""
    for chunk in _chunks(into_P, into_ND):
        into_ND.index_add_(0, into_P[chunk], weight_P[chunk, None] * from_MD[from_P[chunk]])


def _chunks(row_P: Tensor, like_ND: Tensor) -> list[slice]:
    size = max(1, CHUNK_NUMBERS["cpu" if like_ND.is_cpu else "cuda"] // max(like_ND.shape[1], 1))
    return [slice(start, start + size) for start in range(0, row_P.shape[0], size)]
