"""A look at the gradient before it reaches the tables, whose update is fused with the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trec_twotower.distributed import Ranks
from trec_twotower.errors import TrainingError


class NotFinite(TrainingError):
    """A gradient that is no number; raised on all ranks together, before any table is updated."""


def gate(pooled: Tensor, weights: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """`pooled` unchanged, whose backward pass raises NotFinite where any rank's gradient has NaN or infinity.

    It looks at what flows to the tables and at the gradients of `weights`, which lie behind and have theirs by then.
    """
    return _Gate.apply(pooled, list(weights), ranks)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, weights: list[Tensor], ranks: Ranks) -> Tensor:
        ctx.weights, ctx.ranks = weights, ranks
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # A sum is finite exactly where all of it is (short of values that no training survives), and reads it once.
        sums = [gradients[0].sum(), *(weight.grad.sum() for weight in ctx.weights if weight.grad is not None)]
        is_bad = not bool(torch.stack(sums).isfinite().all())
        if bad := int(ctx.ranks.sum(np.array([is_bad]))[0]):
            here = "this one" if is_bad else "not this one"
            raise NotFinite(f"A gradient has NaN or infinity on {bad} of {ctx.ranks.num_ranks} ranks ({here})")
        return gradients[0], None, None
