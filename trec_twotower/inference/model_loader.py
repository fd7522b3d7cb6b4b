"""The towers of a run with the weights of one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.checkpoints.checkpoint import Checkpoints
from trec_twotower.training.model_builder import build_model, build_whole_model, inner_model
from trec_twotower.training.run_dir import Run


@dataclass(frozen=True)
class LoadedModel:
    """A run's towers with the weights of one checkpoint."""

    run: Run
    sources: FeatureDataset
    model: TwoTower
    version: str
    step: int


def load_model(
    run: Run, ranks: Ranks, which: str = "best", *, sources: FeatureDataset | None = None, is_sharded: bool = True
) -> LoadedModel:
    """Return the model of a run's checkpoint ("best", "newest" or a step), ready to encode.

    Its tables are sharded over the ranks, which call together; with `is_sharded=False` they are whole on the device of
    one process, which needs no process group. `sources` is the run's dataset, where it is open already.
    """
    checkpoints = Checkpoints(run.folder / "checkpoints", ranks, config=run.config)
    checkpoints.choose(which)  # raises before the dataset is read
    if sources is None:
        sources = run.initialize(ranks) or run.open_dataset(ranks)
    model: DistributedModelParallel | TwoTower
    model = build_model(run.config, ranks, for_training=False) if is_sharded else build_whole_model(run.config)
    manifest, version = checkpoints.load_chosen(which, model)
    towers = inner_model(model) if isinstance(model, DistributedModelParallel) else model.to(ranks.device)
    return LoadedModel(run, sources, towers.eval(), version, manifest["step"])
