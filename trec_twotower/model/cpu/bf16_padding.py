"""Products of bfloat16 numbers, whose sizes on CPUs are rounded up so that few differ.

oneDNN compiles a product for each size that it meets, which takes as long as a tenth of a step, and keeps the code. The
candidates of a step, and so half of its products, come in another number each time: they are filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 128  # sizes on CPUs are its multiples


def whole_steps(count: int, device: torch.device, step: int = STEP) -> int:
    """So many rows, or on CPUs as many as the next size has."""
    return -(-count // step) * step if device.type == "cpu" else count


def narrowed(value_ND: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D) in bfloat16; the rows behind the last are zeros."""
    return filled_up(value_ND, num_rows, torch.bfloat16)


def filled_up(value_ND: Tensor, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """(num_rows, D) in that type, the tensor itself where nothing changes; the rows behind the last are zeros."""
    if len(value_ND) == num_rows:
        return value_ND.to(dtype or value_ND.dtype)
    filled_ND = value_ND.new_empty(num_rows, *value_ND.shape[1:], dtype=dtype)
    filled_ND[: len(value_ND)] = value_ND
    filled_ND[len(value_ND) :] = 0
    return filled_ND
