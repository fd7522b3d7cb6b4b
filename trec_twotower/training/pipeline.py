"""Training steps: one after the other, or overlapped with the input distribution of the next batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from trec_twotower.config.training import TrainConfig
from trec_twotower.data.loading.batch import Batch
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.optimizer import RunOptimizer

Forward = Callable[[Batch], Tensor]  # all of a step before its backward pass; returns the loss of a batch on the device


class TrainPipeline(ABC):
    """Runs training steps, batch by batch."""

    last_batch: Batch | None = None  # of the newest step, on the device

    @abstractmethod
    def run(self, batches: Iterator[Batch], forward: Forward) -> Iterator[Batch]:
        """Yield each batch after its weights are updated."""

    @abstractmethod
    def pause(self) -> None:
        """Release the model, for other uses before the next step."""


def build_pipeline(
    config: TrainConfig, model: DistributedModelParallel, optimizer: RunOptimizer, ranks: Ranks
) -> TrainPipeline:
    """Return the pipeline that `train.pipeline` names."""
    if config.pipeline == "plain":
        return PlainPipeline(optimizer, ranks)
    return OverlappedPipeline(model, optimizer, ranks)


class PlainPipeline(TrainPipeline):
    """Begins each step when the one before is done."""

    def __init__(self, optimizer: RunOptimizer, ranks: Ranks) -> None:
        self.optimizer, self.device = optimizer, ranks.device

    def run(self, batches: Iterator[Batch], forward: Forward) -> Iterator[Batch]:
        for batch in batches:
            batch = batch.to(self.device, non_blocking=True)
            loss = forward(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.last_batch = batch
            yield batch

    def pause(self) -> None:
        pass


class OverlappedPipeline(TrainPipeline):
    """torchrec's TrainPipelineSparseDist: distributes the ids of the next batch while this one is computed.

    The batch after the next is copied to the device meanwhile. Losses and weights equal those of PlainPipeline, bit for
    bit. It reads two batches ahead, so that nothing may depend on the step at which a batch is made.
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

    def run(self, batches: Iterator[Batch], forward: Forward) -> Iterator[Batch]:
        self._forward = forward
        while True:
            try:
                batch = self._pipeline.progress(batches)
            except StopIteration:
                return
            self.last_batch = batch
            yield batch

    def pause(self) -> None:
        self._pipeline.detach()  # the next step attaches it again, with the batches that it holds

    def _loss(self, batch: Batch | None) -> tuple[Tensor, Batch]:
        assert self._forward is not None and batch is not None
        return self._forward(batch), batch


class _Lookup(nn.Module):
    """The part of the model that the pipeline traces: the lookup of the batch's ids, which are not transformed before.

    (Tracing the whole model fails at the loss.)
    """

    def __init__(self, tables: nn.Module | None, lists: nn.Module | None) -> None:
        super().__init__()
        self.tables = tables
        self.lists = lists

    def forward(self, batch: Batch) -> Any:
        bags = None if self.tables is None else self.tables(batch.sparse)
        vectors = None if self.lists is None else self.lists(batch.sequences)
        return bags, vectors
