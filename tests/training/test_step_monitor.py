"""Agreement of the ranks on losses and gradients: in every step on CPUs, every few steps on GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trec_twotower.distributed.compat import UnsupportedVersion, lerp_, lookup_modules
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.distributed.signals import STOPPING, StopSignals
from trec_twotower.model.finite_check import NotFiniteError
from trec_twotower.training.diagnostics.step_monitor import GPU_STEPS, StepMonitor

CHECKPOINTS: Any = SimpleNamespace(has_failed=False)
LOCK: Any = SimpleNamespace(is_in_place=True)


def monitor_on(device: str, failed: list[int] | None = None) -> StepMonitor:
    """A monitor of one rank; `failed` are the counts of failed backward passes that its steps report in turn."""
    counts = iter(failed or ())
    check: Any = SimpleNamespace(num_failed=lambda: torch.tensor(next(counts)) if failed else None)
    return StepMonitor(Ranks(0, 1, torch.device(device)), StopSignals(), LOCK, check, CHECKPOINTS)


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch):
    monkeypatch.setattr(Ranks, "is_under_way", lambda _: None)


def step(monitor: StepMonitor, number: int, loss: float, *, must_agree: bool = False) -> list[float]:
    monitor.after_forward(number, torch.tensor(loss))
    return monitor.after_update(number, must_agree=must_agree)


def test_on_cpus_each_step_returns_its_loss_and_a_bad_one_raises_before_its_update():
    monitor = monitor_on("cpu")
    assert [step(monitor, number, number / 2) for number in (1, 2)] == [[0.5], [1.0]]
    with pytest.raises(NotFiniteError, match="The loss of step 3 is nan") as raised:
        monitor.after_forward(3, torch.tensor(float("nan")))
    assert raised.value.step == 3


def test_on_gpus_losses_come_every_few_steps_and_where_they_are_needed():
    monitor = monitor_on("cuda")
    found = [step(monitor, number, float(number), must_agree=number == 4) for number in range(1, GPU_STEPS + 2)]
    expected: list[list[float]] = [[] for _ in range(GPU_STEPS + 1)]
    expected[3] = [1.0, 2.0, 3.0, 4.0]
    expected[GPU_STEPS - 1] = [float(number) for number in range(5, GPU_STEPS + 1)]
    assert found == expected


def test_on_gpus_a_bad_loss_is_named_by_its_step_when_the_ranks_agree():
    monitor = monitor_on("cuda")
    for number, loss in ((1, 1.0), (2, float("inf")), (3, 2.0)):
        monitor.after_forward(number, torch.tensor(loss))
        if number < 3:
            monitor.after_update(number, must_agree=False)
    with pytest.raises(NotFiniteError, match="The loss of step 2 is inf") as raised:
        monitor.after_update(3, must_agree=True)
    assert (raised.value.step, raised.value.loss) == (2, float("inf"))


def test_on_gpus_a_bad_gradient_is_named_by_its_step_when_the_ranks_agree():
    monitor = monitor_on("cuda", failed=[0, 0, 1, 2])
    for number in (1, 2, 3):
        step(monitor, number, float(number))
    with pytest.raises(NotFiniteError, match=r"A gradient has NaN or infinity on 1 of 1 ranks \(this one\)") as raised:
        step(monitor, 4, 4.0, must_agree=True)
    assert (raised.value.step, raised.value.loss) == (3, 3.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_signal_is_agreed_on_while_the_ranks_wait_for_files(device):
    monitor = monitor_on(device)
    assert not monitor.agrees_to_stop() and monitor.stop_signal is None
    monitor.signals.received = STOPPING[1]
    assert monitor.agrees_to_stop() and monitor.stop_signal == STOPPING[1]


# Private names of the libraries


def test_a_private_name_that_is_gone_is_reported_with_the_versions(monkeypatch):
    from torchrec.distributed.types import ShardedModule

    class Sharded(torch.nn.Module):
        """A sharded collection of a torchrec that names its lookups otherwise."""

    monkeypatch.setattr("torchrec.distributed.types.ShardedModule", Sharded)
    assert ShardedModule is not Sharded
    with pytest.raises(UnsupportedVersion, match=r"torchrec .* has no Sharded\._lookups"):
        list(lookup_modules(torch.nn.Sequential(Sharded())))


def test_averages_move_the_same_way_without_the_fused_kernel(monkeypatch):
    values = [torch.tensor([1.0, 5.0]), torch.tensor([[2.0]])]
    found = []
    for is_fused in (True, False):
        averages = [torch.tensor([3.0, 1.0]), torch.tensor([[4.0]])]
        if not is_fused:
            monkeypatch.setattr(torch, "_foreach_lerp_", None)
        lerp_(averages, values, 0.25)
        found.append([average.tolist() for average in averages])
    assert found[0] == found[1] == [[2.5, 2.0], [[3.5]]]
