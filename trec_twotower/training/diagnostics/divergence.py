"""Detection of a training that has diverged: dead weights, optimizer states or vectors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.data.loading.batch import Batch
from trec_twotower.distributed.compat import local_shards
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import TrainingError
from trec_twotower.model.embeddings import table_in
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.checkpoints.checkpoint import MODEL, state_of
from trec_twotower.training.checkpoints.checkpoint_manager import CheckpointManager
from trec_twotower.training.model_builder import inner_model
from trec_twotower.training.optimizer import RunOptimizer
from trec_twotower.training.pipeline import TrainPipeline

DIVERGED = (
    "After step {step:,} {found}: the training has diverged, and this step is not saved. {newest} Lower "
    "train.optimizer.lr or dense_lr, in a new run_dir."
)
LARGEST = 1e18  # weight: the squares of a vector of larger ones exceed float32
_MEMORIES = ("model.queue.", "model.frequency.")  # buffers that are not weights


class DivergenceCheck:
    """Checks a model before it is evaluated or saved."""

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: RunOptimizer,
        pipeline: TrainPipeline,
        checkpoints: CheckpointManager,
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.pipeline = model, optimizer, pipeline
        self.checkpoints, self.ranks = checkpoints, ranks
        self._checked_step = -1

    def check(self, step: int) -> None:
        """Raise TrainingError on all ranks where weights, states or the vectors of the last batch are dead."""
        if self._checked_step == step:
            return
        self._checked_step = step
        found = next(filter(None, self.ranks.collect(dead_weights(self.model, self.optimizer))), None)
        if found is None and self.pipeline.last_batch is not None:
            self.pipeline.pause()
            found = dead_vectors(inner_model(self.model), self.pipeline.last_batch, self.ranks)
        if found is not None:
            self.checkpoints.wait()
            path = self.checkpoints.newest()
            newest = "There is no checkpoint yet." if path is None else f"The newest checkpoint is {path}."
            raise TrainingError(DIVERGED.format(step=step, found=found, newest=newest))


def dead_weights(model: nn.Module, optimizer: RunOptimizer) -> str | None:
    """Return the problem of a weight or optimizer state on this rank that training cannot recover from; None if none.

    That is a value that is NaN or infinite, or a weight so large that its vectors have no finite length.
    """
    for name, value in state_of(model, optimizer).items():
        if name.startswith(_MEMORIES):
            continue
        is_weight = name.startswith(MODEL)
        for piece, _ in local_shards(value):
            if not piece.is_floating_point() or not piece.numel():
                continue
            low, high = (float(each) for each in piece.detach().aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"{_place(name)} has numbers that are NaN or infinite"
            if is_weight and max(-low, high) > LARGEST:
                return f"{_place(name)} has numbers of up to {max(-low, high):.3g}, whose squares overflow"
    return None


def dead_vectors(model: TwoTower, batch: Batch, ranks: Ranks) -> str | None:
    """Return the problem of a batch's vectors, None if there is none; all ranks call together.

    That is vectors with NaN or infinity, or zero vectors for all items, whose scores are all equal.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        vectors = {"users": model.encode_users(batch), "items": model.encode_items(batch)}
    model.train(was_training)
    counts = [int((~vector.isfinite()).sum()) for vector in vectors.values()]
    item_SD = vectors["items"]
    total = ranks.sum(np.array([*counts, int((item_SD != 0).sum()), item_SD.numel()]))
    for side, bad in zip(vectors, total[:2], strict=True):
        if bad:
            return f"the vectors of {side} have numbers that are NaN or infinite"
    return "the vectors of all items of its batch are zero" if total[3] and not total[2] else None


def _place(name: str) -> str:
    """Return a readable name of a weight or state: "table item", or its name in the model."""
    kind, _, rest = name.partition(".")
    table = table_in(rest.partition("/")[0])
    what = rest if table is None else f"table {table}"
    return what if kind == "model" else f"the optimizer's state of {what}"
