"""Agreement of all ranks on the losses of their steps, on stop signals, and on failures that end the training."""

from __future__ import annotations

import math
import signal

import numpy as np
import torch
from torch import Tensor

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.distributed.signals import STOPPING, StopSignals
from trec_twotower.model.finite_check import GradientCheck, NotFiniteError, describe_gradient
from trec_twotower.storage.fault_point import fault_point
from trec_twotower.storage.lock import RunLock
from trec_twotower.training.checkpoints.checkpoint_manager import CheckpointManager

GPU_STEPS = 10  # between agreements on GPUs, where each one waits for all queued kernels


class StepMonitor:
    """One collective that ends a step in the same way on all ranks.

    On CPUs the ranks agree in every step, before the backward pass, which updates the tables at once: a loss that is
    not finite changes nothing. On GPUs they agree after every GPU_STEPS steps, and after each step whose losses are
    logged or whose weights are evaluated or saved: steps run ahead of the host, and no checkpoint holds an update by a
    loss or gradient that is not finite.
    """

    def __init__(
        self,
        ranks: Ranks,
        signals: StopSignals,
        lock: RunLock,
        gradient_check: GradientCheck,
        checkpoints: CheckpointManager,
    ) -> None:
        self.ranks, self.signals, self.lock = ranks, signals, lock
        self.gradient_check = gradient_check
        self.checkpoints = checkpoints
        self.stop_signal: signal.Signals | None = None  # that all ranks have agreed on
        self._is_immediate = ranks.device.type == "cpu"
        self._pending: list[tuple[int, Tensor]] = []  # step and this rank's loss, not agreed on yet
        self._num_failed: list[Tensor] = []  # failed backward passes after each of those steps
        self.agreed: list[float] = []  # mean losses that `after_update` has not returned yet
        self._is_first_step = True

    def after_forward(self, step: int, loss: Tensor) -> None:
        """Note a step's loss before its backward pass. Raises NotFiniteError on all ranks."""
        fault_point("step:forward", step)
        self._pending.append((step, loss.detach()))
        if self._is_immediate:
            self._agree()

    def after_update(self, step: int, *, must_agree: bool) -> list[float]:
        """Return the losses, as means over ranks, of the steps that the ranks have agreed on since the last call.

        With `must_agree` that is every step up to this one.
        """
        fault_point("step:updated", step)
        if self._is_first_step:
            self.ranks.is_under_way()
            self._is_first_step = False
        if not self._is_immediate:
            num_failed = self.gradient_check.num_failed()
            self._num_failed.append(torch.zeros(()) if num_failed is None else num_failed)
            if must_agree or step % GPU_STEPS == 0:
                self._agree()
        losses, self.agreed = self.agreed, []
        return losses

    def agrees_to_stop(self) -> bool:
        """Return whether all ranks stop now, which wait together for new files."""
        self._agree()
        return self.stop_signal is not None

    def _agree(self) -> None:
        """Raise on all ranks where a loss or gradient is not finite, a save has failed or the run was moved."""
        pending, self._pending = self._pending, []
        own = torch.stack([loss for _, loss in pending]).double().cpu().numpy() if pending else np.empty(0)
        gradients, self._num_failed = self._num_failed, []
        failed = np.diff(torch.stack(gradients).cpu().numpy(), prepend=0) if gradients else np.empty(0)
        received = [self.signals.received == each for each in STOPPING]
        is_moved = self.ranks.is_first and not self.lock.is_in_place
        flags = np.array([*received, is_moved, self.checkpoints.has_failed])
        total = self.ranks.sum(np.concatenate([own, failed, flags]))
        losses, failed_ranks, counts = np.split(total, [len(own), len(own) + len(failed)])
        self.stop_signal = next((each for each, count in zip(STOPPING, counts[:-2], strict=True) if count), None)
        if counts[-2]:
            self.ranks.once(self.lock.check)
        if counts[-1]:
            self.checkpoints.wait()
        means = losses / self.ranks.num_ranks
        for number, (step, _) in enumerate(pending):
            loss = float(own[number])
            if not math.isfinite(means[number]):
                raise NotFiniteError(f"The loss of step {step:,} is {means[number]}", step, loss)
            if number < len(failed) and failed_ranks[number]:
                found = describe_gradient(int(failed_ranks[number]), self.ranks.num_ranks, is_bad=bool(failed[number]))
                raise NotFiniteError(found, step, loss)
        self.agreed += means.tolist()
