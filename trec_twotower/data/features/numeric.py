"""Numeric features: statistics learned before training, normalization and bins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from trec_twotower.config.features import NumberFeature, NumericFeature
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import id_keys, uniform
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.arrow_values import exact_array

LARGEST = float(np.finfo(np.float32).max)
QUANTILES = 129  # points of the distribution that `normalize: quantile` keeps
SAMPLE = 1 << 18  # number of values for quantiles; all values if there are fewer
_SAMPLED = 0x7175  # stream of random numbers
NULL_BIN = 0


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


def number_values(feature: NumberFeature, array: pa.Array, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a number column as float64, clipped, and which rows are missing."""
    if not is_number(array.type):
        raise DataError(
            f"{where}: is {array.type}, but feature {feature.name!r} is a number: cast it, or make it a category."
        )
    missing = array.is_null().to_numpy(zero_copy_only=False)
    value = array.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False)
    odd = ~(np.abs(value) <= LARGEST)
    if odd.any():
        if feature.nan == "error":
            row = int(np.flatnonzero(odd)[0])
            raise DataError(
                f"{where}: {int(odd.sum()):,} of {len(array):,} numbers are NaN, infinite or beyond float32, the first "
                f"({value[row]}) in row {row:,}: write null for a missing number, or set nan: missing for feature "
                f"{feature.name!r}."
            )
        missing = missing | odd
        value = np.where(odd, 0.0, value)
    return clipped(feature, value), missing


def clipped(feature: NumericFeature, value: np.ndarray) -> np.ndarray:
    return value if feature.clip is None else np.clip(value, *feature.clip)


def is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def normalize(feature: NumericFeature, value: np.ndarray, missing: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Return (rows, 2) float32: the normalized value (`default` or 0 if missing), and whether it is missing."""
    filled = missing if feature.fill_value is None else np.zeros_like(missing)
    if feature.fill_value is not None:
        value = np.where(missing, clipped(feature, np.array(feature.fill_value)), value)
    if feature.normalize == "zscore":
        value = (value - statistics.mean) / (statistics.std or 1.0)
    elif feature.normalize == "minmax":
        value = (value - statistics.low) / ((statistics.high - statistics.low) or 1.0)
    elif feature.normalize == "log1p":
        value = np.sign(value) * np.log1p(np.abs(value))
    elif feature.normalize == "quantile":
        value = share_below(value, statistics.points)
    out = np.empty((len(value), 2), np.float32)
    out[:, 0] = np.where(filled, 0.0, value)
    out[:, 1] = missing
    return out


def share_below(value: np.ndarray, quantiles: tuple[float, ...]) -> np.ndarray:
    """Return the share of learned values below each value, with linear interpolation between quantiles.

    For a value with a large share of the rows, the result is the middle of its range of quantiles.
    """
    if len(quantiles) < 2 or quantiles[0] == quantiles[-1]:
        return np.full(len(value), 0.5)
    level = np.linspace(0.0, 1.0, len(quantiles))
    distinct, place = np.unique(quantiles, return_inverse=True)
    middle = np.bincount(place, weights=level) / np.bincount(place)
    return np.interp(value, distinct, middle)


def binned(feature: NumericFeature, value: np.ndarray, missing: np.ndarray, statistics: Statistics) -> Ragged:
    """Return the bin of each number as table rows; row 0 is for null.

    The bin of a value is the number of edges at or below it. With soft bins, each edge has a row, and a value between
    two edges looks up both with weights that sum to one (piecewise linear encoding, Gorishniy et al. 2022).
    """
    points = np.array(feature.bins if isinstance(feature.bins, tuple) else statistics.points, np.float64)
    if not feature.soft:
        row = np.searchsorted(points, value, side="right") + 1
        return Ragged.singles(np.where(missing, NULL_BIN, row).astype(np.int32))
    if len(points) < 2:  # all values are equal
        below, share = np.zeros(len(value), np.int64), np.zeros(len(value))
        above = below
    else:
        below = np.clip(np.searchsorted(points, value, side="right") - 1, 0, len(points) - 2)
        share = np.clip((value - points[below]) / (points[below + 1] - points[below]), 0.0, 1.0)
        above = below + 1
    rows = np.where(missing[:, None], NULL_BIN, np.stack([below, above], axis=1) + 1)
    weights = np.stack([1.0 - share, share], axis=1)
    weights[missing] = (1.0, 0.0)
    offsets = 2 * np.arange(len(value) + 1)
    return Ragged(offsets, rows.astype(np.int32).reshape(-1), weights.astype(np.float32).reshape(-1))


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
