"""Check of the gradient before it reaches the tables, whose update is fused with the backward pass.

On CPUs the check raises before any table changes. On GPUs reading the result would make every step wait for all queued
kernels: there the check counts on the device, and the training loop reads the count every few steps and before every
checkpoint (see training/diagnostics/step_monitor.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import TrainingError


class NotFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; raised on all ranks together.

    `step` starts at 1. `loss` is this rank's loss of the step. Either is None if unknown.
    """

    def __init__(self, message: str, step: int | None = None, loss: float | None = None) -> None:
        super().__init__(message)
        self.step, self.loss = step, loss


class GradientCheck:
    """Checks the gradients of one model in every backward pass."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._num_failed: Tensor | None = None  # on the device; None before the first backward pass on a GPU

    def gate(self, looked_up: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Return `looked_up` unchanged; its backward pass checks its gradients and those of `weights`.

        (`weights` are used after the lookup, so that their gradients are complete by then.) On CPUs the backward pass
        raises NotFiniteError where any rank's gradient has NaN or infinity.
        """
        return list(_Gate.apply(list(weights), self, *looked_up))

    def num_failed(self) -> Tensor | None:
        """Return a copy of this rank's count of failed backward passes, an int64 on its GPU; None on CPUs."""
        return None if self._num_failed is None else self._num_failed.clone()

    def check(self, gradients: Sequence[Tensor]) -> None:
        """Raise NotFiniteError if a gradient is not finite on any rank; on GPUs count it instead."""
        # A sum is finite if and only if all its terms are, apart from overflow.
        is_finite = torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()
        if is_finite.is_cuda:
            if self._num_failed is None:
                self._num_failed = torch.zeros((), dtype=torch.int64, device=is_finite.device)
            self._num_failed += ~is_finite
            return
        is_bad = not bool(is_finite)
        if num_bad := int(self.ranks.sum(np.array([is_bad]))[0]):
            raise NotFiniteError(describe_gradient(num_bad, self.ranks.num_ranks, is_bad=is_bad))


def describe_gradient(num_bad: int, num_ranks: int, *, is_bad: bool) -> str:
    """Return the description of a gradient that is not finite on `num_bad` ranks; `is_bad` on this one."""
    here = "this one" if is_bad else "not this one"
    return f"A gradient has NaN or infinity on {num_bad} of {num_ranks} ranks ({here})"


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: list[Tensor], check: GradientCheck, *looked_up: Tensor) -> tuple[Tensor, ...]:
        ctx.weights, ctx.check = weights, check
        return tuple(each.view_as(each) for each in looked_up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.check.check([*gradients, *(weight.grad for weight in ctx.weights if weight.grad is not None)])
        return None, None, *gradients
