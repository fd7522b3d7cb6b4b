"""What is done to each cell of a block on CPU: by numba in one pass, where torch would take several."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trec_twotower.data.kernels import IS_COMPILED, kernel

MOST_THREADS = 4  # with more of them torch is faster, which uses all


def exponentiate(logit_bC: Tensor, peak_b: Tensor) -> Tensor:
    """Turn each row into exp(logit - its peak) in place; returns the rows' sums, (b,).

    The peak is to be no less than the row's largest logit, or not much. Exact to some 2e-7; what is below exp(-87)
    becomes 0.
    """
    is_ours = logit_bC.dtype == torch.float32 and logit_bC.device.type == "cpu" and logit_bC.is_contiguous()
    if not (IS_COMPILED and is_ours and torch.get_num_threads() <= MOST_THREADS):
        return logit_bC.sub_(peak_b[:, None]).exp_().sum(1)
    total_b = torch.empty_like(peak_b)
    _exponentiate(logit_bC.numpy(), peak_b.contiguous().numpy(), total_b.numpy())
    return total_b


if IS_COMPILED:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def _power_of_two(context: Any, exponent: Any) -> Any:
        """2 ** exponent, -126 to 127, written into the exponent's bits."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = ir.IntType(32)
            bits = builder.shl(builder.add(arguments[0], ir.Constant(word, 127)), ir.Constant(word, 23))
            return builder.bitcast(bits, ir.FloatType())

        return types.float32(types.int32), generate

    power_of_two: Any = _power_of_two  # without the context, which numba gives

    # exp(x) = 2 ** n * exp(r), with |r| <= log(2) / 2 and exp(r) by the polynomial of Cephes' expf (Moshier 1989).
    _PER_LOG2, _HALF, _ONE, _ZERO, _LOWEST = (np.float32(x) for x in (1.44269504, 0.5, 1.0, 0.0, -87.0))
    _LOG2_HIGH, _LOG2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
    _C5, _C4, _C3, _C2, _C1, _C0 = (
        np.float32(x)
        for x in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )

    # Sums may be made in parts, side by side; everything else is as IEEE 754 has it, NaN and infinity too.
    @kernel(fastmath={"reassoc", "contract"}, error_model="numpy")
    def _exponentiate(logit: np.ndarray, peak: np.ndarray, total: np.ndarray) -> None:
        for i in range(logit.shape[0]):
            row, shift, summed = logit[i], peak[i], _ZERO
            for j in range(row.size):
                x = row[j] - shift
                within = max(x, _LOWEST)
                n = np.floor(within * _PER_LOG2 + _HALF)
                r = within - n * _LOG2_HIGH - n * _LOG2_LOW
                p = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
                y = (p * r * r + r + _ONE) * power_of_two(np.int32(n))
                y = y if x >= _LOWEST else (_ZERO if x < _LOWEST else x)  # the last is NaN
                row[j] = y
                summed += y
            total[i] = summed
