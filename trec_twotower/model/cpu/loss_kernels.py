"""What is done to cells of a block, and to pairs: on CPU by numba in one pass, where torch would take several."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from trec_twotower.ops.compilation import kernel

MOST_THREADS = 4  # with more of them torch is faster, which uses all
PAIR_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 23}  # numbers of pairs' vectors that torch takes side by side at a time


def exponentiate(logit_bC: Tensor, offset_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn each row into exp(logit + offset - peak) in place, the row's largest of these sums being its peak.

    Returns the rows' sums and their peaks, (b,) each. Exact to some 2e-7; what is below exp(-87) becomes 0. A row
    without anything above -inf has the peak 0.
    """
    if not use_numba_kernels(logit_bC):
        if offset_C is not None:
            logit_bC.add_(offset_C)
        peak_b = logit_bC.amax(1) if logit_bC.shape[1] else logit_bC.new_zeros(len(logit_bC))
        peak_b = peak_b.where(~peak_b.isneginf(), 0.0)
        return logit_bC.sub_(peak_b[:, None]).exp_().sum(1), peak_b
    made = np.empty((2, len(logit_bC)), np.float32)
    offset = np.zeros(logit_bC.shape[1], np.float32) if offset_C is None else offset_C.detach().contiguous().numpy()
    _exponentiate(logit_bC.numpy(), offset, *made)
    total_b, peak_b = torch.from_numpy(made)
    return total_b, peak_b


def dots(one_ND: Tensor, one_P: Tensor, other_MD: Tensor, other_P: Tensor) -> Tensor:
    """(P,): the product of row one_P[p] of the one with row other_P[p] of the other."""
    found_P = one_ND.new_empty(one_P.shape[0])
    if use_numba_kernels(one_ND, other_MD):
        _check_rows(one_P, one_ND)
        _check_rows(other_P, other_MD)
        _dots(*(each.detach().numpy() for each in (one_ND, one_P, other_MD, other_P, found_P)))
        return found_P
    for part in _portions(one_P, one_ND):
        found_P[part] = torch.linalg.vecdot(one_ND[one_P[part]], other_MD[other_P[part]])
    return found_P


def add_products(into_ND: Tensor, into_P: Tensor, weight_P: Tensor, from_MD: Tensor, from_P: Tensor) -> None:
    """Add weight_P[p] times row from_P[p] to row into_P[p], one p after the other."""
    if use_numba_kernels(into_ND, from_MD):
        _check_rows(into_P, into_ND)
        _check_rows(from_P, from_MD)
        _add_products(*(each.detach().numpy() for each in (into_ND, into_P, weight_P, from_MD, from_P)))
        return
    for part in _portions(into_P, into_ND):
        into_ND.index_add_(0, into_P[part], weight_P[part, None] * from_MD[from_P[part]])


def use_numba_kernels(*matrices: Tensor) -> bool:
    """Whether kernels are made for them, and better."""
    return torch.get_num_threads() <= MOST_THREADS and all(
        each.dtype == torch.float32 and each.is_cpu and each.is_contiguous() for each in matrices
    )


def _check_rows(row_P: Tensor, of_ND: Tensor) -> None:
    """Raises IndexError where torch would, since the kernels do not look."""
    if len(row_P):
        low, high = (int(each) for each in row_P.aminmax())
        if low < 0 or high >= len(of_ND):
            raise IndexError(f"rows {low} to {high} are asked for of {len(of_ND)}")


def _portions(row_P: Tensor, like_ND: Tensor) -> list[slice]:
    """Runs of pairs whose vectors take little memory."""
    size = max(1, (PAIR_NUMBERS["cpu" if like_ND.is_cpu else "cuda"]) // max(like_ND.shape[1], 1))
    return [slice(start, start + size) for start in range(0, row_P.shape[0], size)]


def _read_as(kind: Any, source: Any) -> Any:
    """A function that takes the bits of a number for those of another kind."""

    @intrinsic
    def read(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(kind))

        return kind(source), generate

    return read


_bits: Any = _read_as(types.int32, types.float32)
_float: Any = _read_as(types.float32, types.int32)

# exp(x) = 2 ** n * exp(r), with |r| <= log(2) / 2 and exp(r) by the polynomial of Cephes' expf (Moshier 1989).
_PER_LOG2, _HALF, _ONE, _ZERO, _LOWEST = (np.float32(x) for x in (1.44269504, 0.5, 1.0, 0.0, -87.0))
_LOG2_HIGH, _LOG2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C5, _C4, _C3, _C2, _C1, _C0 = (
    np.float32(x)
    for x in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)

_LEAST = np.float32(-np.inf)
_SIGN, _REST, _EXPONENT, _BIAS = (np.int32(x) for x in (31, 0x7FFFFFFF, 23, 127))


@kernel
def _ordered(bits: Any) -> Any:
    """Integers that rise with the floats whose bits they are taken from; the way back is the same."""
    return np.int32(bits ^ ((bits >> _SIGN) & _REST))


# Sums may be made in parts, side by side; everything else is as IEEE 754 has it, NaN and infinity too.
@kernel(fastmath={"reassoc", "contract"}, error_model="numpy")
def _exponentiate(logit: np.ndarray, offset: np.ndarray, total: np.ndarray, peak: np.ndarray) -> None:
    for i in range(logit.shape[0]):
        row, summed = logit[i], _ZERO
        top = _ordered(_bits(_LEAST))
        for j in range(row.size):  # the largest as an integer: of floats, it would be looked for one by one
            x = row[j] + offset[j]
            row[j] = x
            top = max(top, _ordered(_bits(x)))
        shift = _float(_ordered(top))
        if shift == _LEAST:
            shift = _ZERO
        peak[i] = shift
        for j in range(row.size):
            x = row[j] - shift
            within = max(x, _LOWEST)
            n = np.floor(within * _PER_LOG2 + _HALF)
            r = within - n * _LOG2_HIGH - n * _LOG2_LOW
            p = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
            y = (p * r * r + r + _ONE) * _float(np.int32((np.int32(n) + _BIAS) << _EXPONENT))
            y = y if x >= _LOWEST else (_ZERO if x < _LOWEST else x)  # the last is NaN
            row[j] = y
            summed += y
        total[i] = summed


@kernel(fastmath={"reassoc", "contract"})
def _dots(one: np.ndarray, at: np.ndarray, other: np.ndarray, beside: np.ndarray, out: np.ndarray) -> None:
    for p in range(at.size):
        left, right, total = one[at[p]], other[beside[p]], _ZERO
        for d in range(left.size):
            total += left[d] * right[d]
        out[p] = total


@kernel
def _add_products(into: np.ndarray, at: np.ndarray, weight: np.ndarray, given: np.ndarray, beside: np.ndarray) -> None:
    for p in range(at.size):
        target, source, factor = into[at[p]], given[beside[p]], weight[p]
        for d in range(target.size):
            target[d] += factor * source[d]
