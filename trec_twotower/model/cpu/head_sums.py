"""Weighted sums of step vectors per row and head, on CPU in one pass over the steps.

torch's operators write a copy of the vectors for each operation (gather, dropout, weights, sum, and the same in
backward), each of (steps, D). That is about ten times the memory of the distinct vectors and the sums. On other devices
callers use torch's operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trec_twotower.ops.compilation import kernel
from trec_twotower.ops.hashing import multiplicative_hash

BITS = 24  # size of an element's random number, which is compared with the dropout probability


def is_supported(vector: Tensor) -> bool:
    """Return whether `head_sums` accepts vectors of this device and type."""
    return vector.is_cpu and vector.dtype == torch.float32


def head_sums(vector_UD: Tensor, place_N: Tensor, length_B: Tensor, weight_LAH: Tensor, dropout: float = 0.0) -> Tensor:
    """Return (B, D): each row's sum of its steps' vectors, head h of a step multiplied by weight[length - 1, age, h].

    `place_N` is the index of each step's vector. The steps of a row follow each other, and the last one has age 0.
    `dropout` is the probability that one of the (N, D) numbers becomes zero; the others are scaled up. The random
    numbers are seeded by torch's generator.
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
        ctx.dropout = least, seed
        sum_BD = vector_UD.new_zeros(len(length_B), vector_UD.shape[1])
        arrays = [each.detach().numpy() for each in (vector_UD, place_N, length_B, weight_LAH, sum_BD)]
        _sum_heads(*arrays, np.uint32(least), np.uint64(seed))
        return sum_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vector_UD, place_N, length_B, weight_LAH = ctx.saved_tensors
        least, seed = ctx.dropout
        grad_vector_UD, grad_weight_LAH = torch.zeros_like(vector_UD), torch.zeros_like(weight_LAH)
        arrays = (vector_UD, place_N, length_B, weight_LAH, gradients[0].contiguous(), grad_vector_UD, grad_weight_LAH)
        _spread_heads(*(each.detach().numpy() for each in arrays), np.uint32(least), np.uint64(seed))
        return grad_vector_UD, None, None, grad_weight_LAH, None, None


@kernel
def _element_seed(seed: np.uint64, element: int) -> np.uint32:
    return np.uint32(multiplicative_hash(seed ^ np.uint64(element)))


@kernel
def _random_bits(state: np.uint32, column: int) -> np.uint32:
    """Return 24 random bits for a column of an element by the 32-bit finalizer of MurmurHash3, which vectorizes."""
    # numba widens a product of two 32-bit values to 64 bits, so each product is cut to 32 bits.
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
                        value = value if _random_bits(state, column) >= least else np.float32(0)
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
                        slope = slope if _random_bits(state, column) >= least else np.float32(0)
                    grad_D[column] += weight * slope
                    product += vector_D[column] * slope
                grad_weight_LAH[length - 1, length - 1 - step, head] += product * scale
            element += 1
