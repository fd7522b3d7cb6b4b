"""Validation during training: when it is due, its metrics, and the best of them."""

from __future__ import annotations

from collections.abc import Callable

from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.streaming import TrainData
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.checkpoints.trainer_state import Stopwatch, TrainerState, is_scheduled
from trec_twotower.training.collapse_guard import HasBaseline, baseline_name
from trec_twotower.training.metrics_logger import MetricsLogger
from trec_twotower.training.model_builder import inner_model
from trec_twotower.training.pipeline import TrainPipeline

Evaluate = Callable[[TwoTower], dict[str, float]]
MakeEvaluate = Callable[[FeatureDataset], Evaluate | None]


class Measurement:
    """The evaluation of a dataset, made again when the dataset has new items or users."""

    def __init__(self, make: MakeEvaluate | None, data: TrainData) -> None:
        self.make, self.data = make, data
        self._begin()

    def _begin(self) -> None:
        self.sources = self.data.sources
        self.evaluate = self.make(self.sources) if self.make is not None else None
        self._popularity: dict[str, float] | None = None

    def current(self) -> Evaluate | None:
        """Return the evaluation of the dataset as it is now; None where it has no validation split."""
        now = self.data.sources
        if now.catalogue is not self.sources.catalogue or now.users is not self.sources.users:
            self._begin()
        return self.evaluate

    def popularity(self) -> dict[str, float] | None:
        """Return the metrics of ranking by popularity, computed once per dataset; None where they are unknown."""
        evaluate: object = self.evaluate
        count_I = self.data.item_counts
        if self._popularity is None and count_I is not None and isinstance(evaluate, HasBaseline):
            self._popularity = evaluate.popularity(count_I)
        return self._popularity


class Validator:
    """Evaluates a model during its training, and keeps the best value of the metric that selects checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        measurement: Measurement,
        model: DistributedModelParallel,
        pipeline: TrainPipeline,
        logger: MetricsLogger,
        stopwatch: Stopwatch,
        *,
        best: float,
        evaluated_step: int,
    ) -> None:
        """`best` is the best value of earlier checkpoints, `evaluated_step` the last step that needs no evaluation."""
        self.every = config.train.evaluate_every
        self.metric, self.label = config.evaluate.best, config.evaluate.best_label
        self.measurement, self.model, self.pipeline = measurement, model, pipeline
        self.logger, self.stopwatch = logger, stopwatch
        self.best = best
        self._evaluated_step = evaluated_step

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be evaluated and has not been."""
        return is_scheduled(step, self.every, self.measurement.data) and self._evaluated_step != step

    def run(self, state: TrainerState) -> bool:
        """Evaluate and log; return whether the checkpoint of this step must hold the result."""
        self._evaluated_step = state.step
        evaluate = self.measurement.current()
        if evaluate is None:
            return False
        self.pipeline.pause()
        metrics = evaluate(inner_model(self.model))
        popularity = self.measurement.popularity()
        if popularity is not None:
            metrics = {**metrics, baseline_name(self.metric): popularity[self.metric]}
        self.model.train()
        was_owed, value = state.owes_evaluation, metrics[self.metric]
        state.note_validation(self.label, value, self.stopwatch.lap())
        is_best = value > self.best
        self.best = max(self.best, value)
        self.logger.log_validation(state.step, self.metric, metrics, is_best=is_best)
        return is_best or was_owed
