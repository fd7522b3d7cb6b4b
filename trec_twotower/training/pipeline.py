"""The steps of a training, one after the other, or with the next batches on their way meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from trec_twotower.config.training import TrainConfig
from trec_twotower.data.loading.batch import Batch
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.optimizer import RunOptimizer

Forward = Callable[[Batch], Tensor]  # of a batch on the device, its loss; all that belongs to a step's beginning
WARM_STEPS = 5  # that pass before a trace begins: compilation and first allocations are no part of a usual step


class Steps(ABC):
    """Takes batches to updated weights."""

    @abstractmethod
    def taken(self, batches: Iterator[Batch], forward: Forward) -> Iterator[Batch]:
        """Each batch, after its step is done."""

    @abstractmethod
    def pause(self) -> None:
        """Let the model be used for something else until the next step."""

    @classmethod
    def of(cls, config: TrainConfig, model: DistributedModelParallel, optimizer: RunOptimizer, ranks: Ranks) -> Steps:
        """The ones that a config asks for (`train.pipeline`)."""
        if config.pipeline == "plain":
            return PlainSteps(optimizer, ranks)
        return OverlappedSteps(model, optimizer, ranks)


class PlainSteps(Steps):
    """Every step begins when the one before it is done."""

    def __init__(self, optimizer: RunOptimizer, ranks: Ranks) -> None:
        self.optimizer, self.device = optimizer, ranks.device

    def taken(self, batches: Iterator[Batch], forward: Forward) -> Iterator[Batch]:
        for batch in batches:
            batch = batch.to(self.device, non_blocking=True)
            loss = forward(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield batch

    def pause(self) -> None:
        pass


class OverlappedSteps(Steps):
    """torchrec's TrainPipelineSparseDist: ids of the next batch travel between ranks while this one is computed.

    The batch after the next is copied to the device meanwhile. Losses and weights are those of plain steps, bit for
    bit. It takes two batches ahead, so that nothing may depend on the step at which one is made.
    """

    def __init__(self, model: DistributedModelParallel, optimizer: RunOptimizer, ranks: Ranks) -> None:
        inner = model.module
        assert isinstance(inner, TwoTower)
        self._forward: Forward | None = None
        # By keyword, and only what torchrec 1.6 to 1.9 all have.
        self._pipeline = TrainPipelineSparseDist(
            model=_Lookup(inner.tables, inner.lists),
            optimizer=optimizer,
            device=ranks.device,
            execute_all_batches=True,
            custom_model_fwd=self._loss,
        )

    def taken(self, batches: Iterator[Batch], forward: Forward) -> Iterator[Batch]:
        self._forward = forward
        while True:
            try:
                batch = self._pipeline.progress(batches)
            except StopIteration:
                return
            yield batch

    def pause(self) -> None:
        self._pipeline.detach()  # the next step attaches it again, with the batches that it holds

    def _loss(self, batch: Batch | None) -> tuple[Tensor, Batch]:
        assert self._forward is not None and batch is not None
        return self._forward(batch), batch


class _Lookup(nn.Module):
    """What the pipeline has to know of the model: that the tables are looked up with the batch's ids as they are.

    It finds that out by tracing, which the loss would not survive.
    """

    def __init__(self, tables: nn.Module | None, lists: nn.Module | None) -> None:
        super().__init__()
        self.tables = tables
        self.lists = lists

    def forward(self, batch: Batch) -> Any:
        bags = None if self.tables is None else self.tables(batch.sparse)
        vectors = None if self.lists is None else self.lists(batch.sequences)
        return bags, vectors


class Trace:
    """Some steps by torch's profiler, one file a rank: RUN/profile/rank-0.json for Perfetto, and rank-0.txt to read.

    Steps from the start on are left out until they are usual ones.
    """

    def __init__(self, num_steps: int, run_dir: Path, ranks: Ranks) -> None:
        self._profiler: torch.profiler.profile | None = None
        self._num_steps, self._is_written = num_steps, False
        self.folder, self.rank, self.device = run_dir / "profile", ranks.rank, ranks.device
        if not num_steps:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARM_STEPS, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def __enter__(self) -> Trace:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            if not self._is_written and self.rank == 0:
                print(
                    f"no trace was written: train.profile_steps is {self._num_steps}, but the {WARM_STEPS + 1} steps "
                    "before them were not through when this run ended; train for longer.",
                    flush=True,
                )

    def step_is_done(self) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._is_written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json"))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=-1)
        (self.folder / f"rank-{self.rank}.txt").write_text(table)
