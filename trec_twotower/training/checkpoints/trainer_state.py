"""The state of a training besides weights and optimizer: saved whole in a checkpoint's manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trec_twotower.data.loading.streaming import TrainData


@dataclass
class TrainerState:
    """Progress of a training after `step` steps."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # means over ranks, of the steps since the last logged one
    train_s: float = 0.0  # seconds of training, without evaluation, checkpoints and waiting for new files
    evaluate_s: float = 0.0  # seconds of evaluation
    logged_s: float = 0.0  # train_s at the last logged step
    valid: dict[str, Any] = field(default_factory=dict)  # {"metric", "value"} of the validation after this step
    owes_evaluation: bool = False  # stopped where an evaluation was due, which the next start makes

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> TrainerState:
        """Return the state that `as_facts` saved."""
        return cls(**{each.name: manifest[each.name] for each in fields(cls)})

    def as_facts(self) -> dict[str, Any]:
        """Return the state as values for a manifest."""
        return asdict(self)

    @property
    def logged_step(self) -> int:
        """Return the last logged step."""
        return self.step - len(self.losses)

    def advance(self, losses: Sequence[float], train_s: float) -> None:
        """Count one more step, with its `train_s` seconds; `losses` are those known since the step before."""
        self.step += 1
        self.losses.extend(losses)
        self.train_s += train_s
        self.valid, self.owes_evaluation = {}, False

    def note_logged(self) -> None:
        """Begin a new window of logged steps."""
        self.losses, self.logged_s = [], self.train_s

    def note_validation(self, metric: str, value: float, evaluate_s: float) -> None:
        """Record the validation of this step, with its `evaluate_s` seconds."""
        self.valid = {"metric": metric, "value": value}
        self.evaluate_s += evaluate_s
        self.owes_evaluation = False

    def owe_evaluation(self, *, is_due: bool) -> None:
        """Leave the evaluation of this step to the next start, where it is due."""
        self.owes_evaluation = is_due


def is_scheduled(step: int, every: int | None, data: TrainData) -> bool:
    """Return whether something is due after a step: every `every` steps (None: after each pass), and after the last."""
    is_time = step % every == 0 if every is not None else data.is_end(step)
    return is_time or data.is_over(step)


class Stopwatch:
    """Splits wall time into training, evaluation and waiting, in seconds."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.waiting_s = 0.0  # for rows, since the start; part of the training time

    def lap(self) -> float:
        """Return the time since the last lap or restart, and begin the next lap."""
        now = time.perf_counter()
        passed_s, self._started = now - self._started, now
        return passed_s

    def restart(self) -> None:
        """Begin a lap; the time since the last one counts nowhere."""
        self.lap()

    def add_waiting(self, seconds: float) -> None:
        """Count time that passed until rows were available."""
        self.waiting_s += seconds
