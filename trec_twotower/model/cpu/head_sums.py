"""Weighted sums of vectors over lists, on CPU in one pass: the vector of a list's element is read where it lies.

torch's own way makes a copy of the vectors for each step of it (gather, dropout, weights, sum, and the same back), each
of (elements, D), which is some ten times what the lists' distinct vectors and the sums hold. Without numba, and on
other devices, callers go that way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trec_twotower.ops.kernels import IS_COMPILED, kernel

BITS = 24  # of a number drawn for an element, compared with the share to be dropped


def applies_to(vector: Tensor) -> bool:
    return IS_COMPILED and vector.device.type == "cpu" and vector.dtype == torch.float32


def head_sums(vector_UD: Tensor, place_N: Tensor, length_B: Tensor, weight_LAH: Tensor, dropout: float = 0.0) -> Tensor:
    """(B, D): each list's sum of its elements' vectors, part h of an element times weight[length - 1, age, h].

    `place` says which vector is an element's; the lists lie below each other, and the last element of each has age 0.
    With `dropout` that share of all (N, D) numbers counts as zero and the others are scaled up; which, torch's
    generator says.
    """
    least = round(dropout * (1 << BITS))
    seed = int(torch.randint(1 << 62, ())) if least else 0
    return _HeadSums.apply(vector_UD, place_N, length_B, weight_LAH, least, seed)


class _HeadSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, vector_UD: Tensor, place_N: Tensor, length_B: Tensor, weight_LAH: Tensor, least: int, seed: int
    ) -> Tensor:
        vector_UD, weight_LAH = vector_UD.contiguous(), weight_LAH.contiguous()
        ctx.save_for_backward(vector_UD, place_N, length_B, weight_LAH)
        ctx.draw = least, seed
        sum_BD = vector_UD.new_zeros(len(length_B), vector_UD.shape[1])
        arrays = [each.detach().numpy() for each in (vector_UD, place_N, length_B, weight_LAH, sum_BD)]
        _sum_heads(*arrays, np.uint32(least), np.uint64(seed))
        return sum_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vector_UD, place_N, length_B, weight_LAH = ctx.saved_tensors
        least, seed = ctx.draw
        grad_vector_UD, grad_weight_LAH = torch.zeros_like(vector_UD), torch.zeros_like(weight_LAH)
        given = (vector_UD, place_N, length_B, weight_LAH, gradients[0].contiguous(), grad_vector_UD, grad_weight_LAH)
        _spread_heads(*(each.detach().numpy() for each in given), np.uint32(least), np.uint64(seed))
        return grad_vector_UD, None, None, grad_weight_LAH, None, None


@kernel
def _element_seed(seed: np.uint64, element: int) -> np.uint32:
    state = (seed ^ np.uint64(element)) * np.uint64(0x9E3779B97F4A7C15)
    return np.uint32(state >> np.uint64(32))


@kernel
def _drawn(state: np.uint32, column: int) -> np.uint32:
    """24 bits for a column of an element (the finaliser of MurmurHash3 on 32 bits: it fits a processor's lanes)."""
    # Each product is cut back at once, as numba makes 64 bits of two times 32.
    x = np.uint32(state + np.uint32(column) * np.uint32(0x9E3779B1))
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32((x ^ (x >> np.uint32(16))) >> np.uint32(8))


@kernel(fastmath=True)
def _sum_heads(
    vector_UD: np.ndarray, place_N: np.ndarray, length_B: np.ndarray, weight_LAH: np.ndarray, sum_BD: np.ndarray,
    least: np.uint32, seed: np.uint64,
) -> None:  # fmt: skip
    heads = weight_LAH.shape[2]
    part = vector_UD.shape[1] // heads
    scale = np.float32(1 << 24) / np.float32((1 << 24) - least)
    element = 0
    for row in range(length_B.size):
        length = length_B[row]
        total_D = sum_BD[row]
        for step in range(length):
            vector_D = vector_UD[place_N[element]]
            state = _element_seed(seed, element)
            for head in range(heads):
                weight = weight_LAH[length - 1, length - 1 - step, head] * scale
                for column in range(head * part, head * part + part):
                    value = weight * vector_D[column]
                    if least:
                        value = value if _drawn(state, column) >= least else np.float32(0)
                    total_D[column] += value
            element += 1


@kernel(fastmath=True)
def _spread_heads(
    vector_UD: np.ndarray, place_N: np.ndarray, length_B: np.ndarray, weight_LAH: np.ndarray, grad_BD: np.ndarray,
    grad_vector_UD: np.ndarray, grad_weight_LAH: np.ndarray, least: np.uint32, seed: np.uint64,
) -> None:  # fmt: skip
    heads = weight_LAH.shape[2]
    part = vector_UD.shape[1] // heads
    scale = np.float32(1 << 24) / np.float32((1 << 24) - least)
    element = 0
    for row in range(length_B.size):
        length = length_B[row]
        slope_D = grad_BD[row]
        for step in range(length):
            vector_D = vector_UD[place_N[element]]
            grad_D = grad_vector_UD[place_N[element]]
            state = _element_seed(seed, element)
            for head in range(heads):
                weight = weight_LAH[length - 1, length - 1 - step, head] * scale
                product = np.float32(0)
                for column in range(head * part, head * part + part):
                    slope = slope_D[column]
                    if least:
                        slope = slope if _drawn(state, column) >= least else np.float32(0)
                    grad_D[column] += weight * slope
                    product += vector_D[column] * slope
                grad_weight_LAH[length - 1, length - 1 - step, head] += product * scale
            element += 1
