"""Checkpoints of a training: restored at its start, saved when they are due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.config.run_config import binding, config_hash
from trec_twotower.data.loading.streaming import TrainData
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.distributed.watchdog import Heartbeat
from trec_twotower.errors import ConfigError
from trec_twotower.training.checkpoints.checkpoint import Checkpoints, versions
from trec_twotower.training.checkpoints.trainer_state import Stopwatch, TrainerState, is_scheduled
from trec_twotower.training.optimizer import RunOptimizer
from trec_twotower.training.run_dir import Run
from trec_twotower.training.sharding import placements


class CheckpointManager:
    """Restores and saves the model, the optimizer and the trainer's state of one training."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        data: TrainData,
        heartbeat: Heartbeat,
        stopwatch: Stopwatch,
        check: Callable[[], None],
    ) -> None:
        """`check` is called on the first rank before a save writes and publishes; what it raises ends the save."""
        config = run.config
        self.run, self.ranks, self.data = run, ranks, data
        self.heartbeat, self.stopwatch = heartbeat, stopwatch
        self.store = Checkpoints(
            run.folder / "checkpoints",
            ranks,
            config.checkpoint.keep,
            config,
            in_background=config.checkpoint.in_background,
            check=check,
        )
        ranks.once(self.store.recover)
        self._saved_step = -1

    def restore(self, model: DistributedModelParallel, optimizer: RunOptimizer) -> TrainerState | None:
        """Load the newest checkpoint into model and optimizer; return the trainer's state, None where there is none.

        Raises ConfigError where the config trains for fewer steps than the checkpoint has.
        """
        newest = self.store.newest()
        if newest is None:
            return None
        manifest = self.store.load(newest, model, optimizer)
        state, config = TrainerState.from_manifest(manifest), self.run.config
        if config.data.follow is None and state.step > self.data.num_steps:
            raise ConfigError(
                f"{newest} is of step {state.step:,}, but train.epochs = {config.train.epochs} are only "
                f"{self.data.num_steps:,} steps: set it to the steps done or more, or train in another folder "
                "(run_dir=...)."
            )
        self.ranks.once(self.run.write_config)
        self._saved_step = state.step
        if self.ranks.is_first:
            print(f"resumed at step {state.step:,} of {self.data.num_steps:,} from {newest}", flush=True)
        return state

    def best_value(self) -> float:
        """Return the best validation of all checkpoints by the config's metric; -inf where there is none."""
        best = self.ranks.once(self.store.best)
        is_same = best is not None and best["metric"] == self.run.config.evaluate.best_label
        return best["value"] if best is not None and is_same else -math.inf

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be saved and has not been."""
        return is_scheduled(step, self.run.config.checkpoint.every, self.data) and self._saved_step != step

    def save(
        self, state: TrainerState, model: DistributedModelParallel, optimizer: RunOptimizer, *, again: bool = False
    ) -> None:
        """Save the state after a step, unless that step is saved; with `again` also then."""
        if again or self._saved_step != state.step:
            config, ranks = self.run.config, self.ranks
            self.heartbeat.set_phase(f"the checkpoint of step {state.step:,}")
            facts = {
                "cursor": state.step,
                "place": self.data.place(state.step),
                "seed": config.data.seed,
                "config": config_hash(config),
                "settings": binding(config),
                "data": self.data.sources.dataset.fingerprint,
                "plan": [asdict(placement) for placement in placements(model.plan)],
                "versions": versions(),
                "precision": ranks.precision(config.train.precision),  # the value of "auto"
                **state.as_facts(),
            }
            self.store.save(state.step, model, optimizer, facts)
            self._saved_step = state.step
        self.stopwatch.restart()

    @property
    def saved_step(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        return max(self._saved_step, 0)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint; all ranks call together."""
        return self.store.newest()

    @property
    def has_failed(self) -> bool:
        """Return whether the save in the background failed; `wait` then raises its error."""
        return self.store.has_failed

    def best(self) -> dict[str, Any] | None:
        """Return {"step", "metric", "value"} of the checkpoint whose evaluation was best; None where none was."""
        return self.store.best()

    def wait(self) -> None:
        """Return when no save is under way; raises TrainingError where one failed."""
        self.store.wait()

    def close(self) -> None:
        """Let a save that is under way end, whatever its outcome: the training is over."""
        self.store.close()
