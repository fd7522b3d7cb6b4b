"""Warnings of a training that learns nothing: validation below popularity, or vectors that have collapsed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trec_twotower.config.losses import LossConfig, SoftmaxLoss
from trec_twotower.config.run_config import RunConfig

ITEM_COSINE, USER_ITEM_COSINE, NEGATIVE_COSINE = "item_cosine", "user_item_cosine", "negative_cosine"
BELOW_POPULARITY = "below_popularity"

# Above these, vectors count as collapsed. Of the healthy runs in docs/losses.md the highest are .90 and .48; runs whose
# recall had fallen to a half or less had .96 and more, or .76 and more.
MOST_COSINE = {ITEM_COSINE: 0.95, USER_ITEM_COSINE: 0.7, NEGATIVE_COSINE: 0.7}
MEANING = {
    ITEM_COSINE: "the mean cosine of two items is {value:.3f}",
    USER_ITEM_COSINE: "the mean cosine of a user and an item is {value:.3f}",
    NEGATIVE_COSINE: "the mean cosine of users and their negatives is {value:.3f}",
}
# Settings that a warning names where they differ from their defaults.
SUSPECTS = ("kind", "temperature", "log_q", "negatives.in_batch", "negatives.cross_batch_memory", "negatives.top_k")


@runtime_checkable
class HasBaseline(Protocol):
    """An evaluation that can also rank by popularity."""

    def popularity(self, count_I: np.ndarray) -> dict[str, float]:
        """Return the metrics of ranking all items by these counts."""


@dataclass(frozen=True)
class Finding:
    """One warning: what was measured, and the bound that was expected."""

    cause: str  # BELOW_POPULARITY or a name of MOST_COSINE
    metric: str
    value: float
    bound: float
    message: str

    def as_values(self) -> dict[str, Any]:
        return asdict(self)


class CollapseGuard:
    """Compares figures of validation and training with what a model that learns has; reports each cause once per run.

    A figure out of bounds is reported at the end of a pass over the data, or when the validation before had it too: the
    first steps of a healthy run may be out of bounds. All ranks have the same figures, and so find the same.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._reported: set[str] = set()
        self._before: set[str] = set()  # causes of the validation before

    def resume(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Continue from what a run's metrics.jsonl has: its warnings, and its last validation."""
        for line in lines:
            if line["kind"] == "warning":
                self._reported.add(line["cause"])
            elif line["kind"] == "valid":
                self._before = {cause for cause, *_ in self._out_of_bounds(line)}

    def validated(self, metrics: Mapping[str, float], *, is_pass_end: bool) -> list[Finding]:
        """Return what is to be reported of a validation."""
        found = {cause: (metric, bound) for cause, metric, bound in self._out_of_bounds(metrics)}
        lasting = found if is_pass_end else {cause: found[cause] for cause in found if cause in self._before}
        self._before = set(found)
        return self._new({cause: (metric, metrics[metric], bound) for cause, (metric, bound) in lasting.items()})

    def trained(self, mean_negative_score: float) -> list[Finding]:
        """Return what is to be reported of a logged step at the end of a pass, whose scores are cosines."""
        bound = MOST_COSINE[NEGATIVE_COSINE]
        is_found = mean_negative_score > bound
        return self._new({NEGATIVE_COSINE: (NEGATIVE_COSINE, mean_negative_score, bound)} if is_found else {})

    def _out_of_bounds(self, metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
        """Return (cause, metric, bound) of each figure that is out of bounds."""
        best = self.config.evaluate.best
        baseline = metrics.get(baseline_name(best))
        found = []
        if baseline is not None and metrics[best] < baseline:
            found.append((BELOW_POPULARITY, best, float(baseline)))
        for name, bound in MOST_COSINE.items():
            if metrics.get(name, 0.0) > bound:
                found.append((name, name, bound))
        return found

    def _new(self, found: Mapping[str, tuple[str, float, float]]) -> list[Finding]:
        new = {cause: figures for cause, figures in found.items() if cause not in self._reported}
        self._reported |= set(new)
        return [
            Finding(cause, metric, value, bound, self._message(cause, metric, value, bound))
            for cause, (metric, value, bound) in new.items()
        ]

    def _message(self, cause: str, metric: str, value: float, bound: float) -> str:
        if cause == BELOW_POPULARITY:
            found = f"validation {metric} is {value:.4f}, below the {bound:.4f} of ranking all items by popularity"
            expected = "A model that learns is above popularity after its first pass over the data."
        else:
            found = f"{MEANING[cause].format(value=value)}, above {bound:g}"
            expected = "Vectors this close to one direction hardly distinguish items."
        return f"warning: {found}. {expected} Change one of: {'; '.join(self._changes())} (docs/losses.md)."

    def _changes(self) -> list[str]:
        """Return what may help, suspect settings of the loss first."""
        changes = []
        loss, default = self.config.loss, SoftmaxLoss()
        for name in SUSPECTS:
            value, usual = _setting(loss, name), _setting(default, name)
            if value is not None and value != usual:
                shown = "null" if usual is None else usual
                changes.append(f"loss.{name} to its default {shown} (now {_shown(value)})")
        optimizer, epochs = self.config.train.optimizer, self.config.train.epochs
        changes.append(f"train.optimizer.lr and dense_lr to less (now {optimizer.lr:g} and {optimizer.dense_lr:g})")
        return [*changes, f"train.epochs to more (now {epochs})"]


def baseline_name(metric: str) -> str:
    """Return the name that popularity's value of a metric has among the figures of a validation."""
    return f"popularity_{metric}"


def cosines(item_ID: np.ndarray, user_sum_D: np.ndarray, num_users: int) -> dict[str, float]:
    """Return the mean cosine of two different items, and that of a user and an item.

    `user_sum_D` is the sum of `num_users` users' vectors of length 1. A pair of a sum costs O(items * D).
    """
    item_D = unit(item_ID).sum(axis=0)
    num_items = len(item_ID)
    return {
        ITEM_COSINE: float(item_D @ item_D - num_items) / max(num_items * (num_items - 1), 1),
        USER_ITEM_COSINE: float(user_sum_D @ item_D) / max(num_users * num_items, 1),
    }


def unit(vector_ND: np.ndarray) -> np.ndarray:
    """Return (N, D) float64 vectors divided by their lengths; zero vectors stay zero."""
    vector_ND = np.asarray(vector_ND, np.float64)
    length_N1 = np.linalg.norm(vector_ND, axis=-1, keepdims=True)
    return vector_ND / np.where(length_N1 > 0, length_N1, 1.0)


def _setting(loss: LossConfig, name: str) -> Any:
    """Return a setting of the loss; None where losses of its kind have none of that name."""
    value: Any = loss
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _shown(value: Any) -> str:
    return str(value.model_dump(mode="json")) if hasattr(value, "model_dump") else str(value)
