"""A look at the gradient before it reaches the tables, whose update is fused with the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import TrainingError


class NotFinite(TrainingError):
    """A gradient that is no number; raised on all ranks together, before any table is updated."""


def gate(looked_up: Sequence[Tensor], weights: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """`looked_up` unchanged, whose backward pass raises NotFinite where any rank's gradient has NaN or infinity.

    It looks at what flows to the tables and at the gradients of `weights`, which lie behind and have theirs by then.
    """
    return list(_Gate.apply(list(weights), ranks, *looked_up))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: list[Tensor], ranks: Ranks, *looked_up: Tensor) -> tuple[Tensor, ...]:
        ctx.weights, ctx.ranks = weights, ranks
        return tuple(each.view_as(each) for each in looked_up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A sum is finite exactly where all of it is (short of values that no training survives), and reads it once.
        found = [*gradients, *(weight.grad for weight in ctx.weights if weight.grad is not None)]
        sums = [each.sum() for each in found]
        is_bad = not bool(torch.stack(sums).isfinite().all())
        if bad := int(ctx.ranks.sum(np.array([is_bad]))[0]):
            here = "this one" if is_bad else "not this one"
            raise NotFinite(f"A gradient has NaN or infinity on {bad} of {ctx.ranks.num_ranks} ranks ({here})")
        return None, None, *gradients
