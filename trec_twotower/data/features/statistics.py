"""Statistics of columns, which a run learns before the first step and saves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trec_twotower.config.features import NumericFeature
from trec_twotower.ops.hashing import id_keys, uniform
from trec_twotower.storage.arrow_values import exact_array

QUANTILES = 129  # points of the distribution that `normalize: quantile` keeps
SAMPLE = 1 << 18  # number of values for quantiles; all values if there are fewer
_SAMPLED = 0x7175  # stream of random numbers


@dataclass(frozen=True)
class Statistics:
    """Statistics of a column, learned once at the start of a run and saved with it."""

    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    points: tuple[float, ...] = ()  # ascending: quantiles at equal steps, or the edges of bins
    words: tuple[int | str, ...] = ()  # vocabulary in the order of its table rows

    def __post_init__(self) -> None:
        for name in ("points", "words"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only

    @cached_property
    def rows_of_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the 64-bit keys of all words, ascending, and the index of each in `words`."""
        keys = id_keys(exact_array(self.words), "the vocabulary")
        order = np.argsort(keys)
        return keys[order], order


def learn_statistics(feature: NumericFeature, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Statistics:
    """Computes mean, standard deviation, range and quantiles of a number over all rows that have it, in one pass.

    A part is the values of some rows, and which are missing. With more than SAMPLE rows, quantiles are those of a
    sample of SAMPLE rows, which does not depend on the parts.
    """
    count, mean, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    sample = _Sample() if _num_points(feature) else None
    for value, missing in parts:
        value = value[~missing]
        if not value.size:
            continue
        if sample is not None:
            sample.add(value, count)
        # Combined as in Chan, Golub and LeVeque 1983; sums of squares of times in seconds would lose all digits.
        away = float(value.mean()) - mean
        squares += float(np.square(value - value.mean()).sum()) + away**2 * count * value.size / (count + value.size)
        count += value.size
        mean += away * value.size / count
        low, high = min(low, float(value.min())), max(high, float(value.max()))
    if not count:
        return Statistics()
    points = () if sample is None else _points(feature, sample.values)
    return Statistics(mean, math.sqrt(squares / count) or 1.0, low, high, points)


def _num_points(feature: NumericFeature) -> int:
    """Return the number of quantiles of a feature, including minimum and maximum."""
    if isinstance(feature.bins, int):
        return feature.bins if feature.soft else feature.bins + 1
    return QUANTILES if feature.normalize == "quantile" else 0


def _points(feature: NumericFeature, values: np.ndarray) -> tuple[float, ...]:
    quantiles = np.quantile(values, np.linspace(0.0, 1.0, _num_points(feature)))
    if feature.bins is None:
        return tuple(quantiles.tolist())
    return tuple(np.unique(quantiles if feature.soft else quantiles[1:-1]).tolist())


class _Sample:
    """A sample of the values of SAMPLE rows: those with the smallest hashes of the row number."""

    def __init__(self) -> None:
        self.values = np.empty(0)
        self._draw = np.empty(0)

    def add(self, values: np.ndarray, first: int) -> None:
        """Add the values of the rows from `first` on."""
        draw = uniform(_SAMPLED, np.arange(first, first + len(values)))
        values, draw = np.concatenate([self.values, values]), np.concatenate([self._draw, draw])
        if len(values) > SAMPLE:
            kept = np.argpartition(draw, SAMPLE)[:SAMPLE]
            values, draw = values[kept], draw[kept]
        self.values, self._draw = values, draw
