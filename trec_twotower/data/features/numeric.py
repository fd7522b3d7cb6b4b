"""Numeric features: normalization and bins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import pyarrow as pa

from trec_twotower.config.features import NumberFeature, NumericFeature
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Values
from trec_twotower.data.features.statistics import Statistics, learn_statistics
from trec_twotower.errors import DataError
from trec_twotower.ops.ragged import Ragged

LARGEST = float(np.finfo(np.float32).max)
NULL_BIN = 0
Numeric = TypeVar("Numeric", bound=NumericFeature)


class NumericReader(FeatureReader[Numeric]):
    """A number per row, normalized or binned. Subclasses return the number itself."""

    def numbers(self, rows: FeatureRows[Numeric]) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each row (float64), and which are missing."""
        raise NotImplementedError

    def read(self, rows: FeatureRows[Numeric]) -> Values:
        value, missing = self.numbers(rows)
        if rows.feature.looks_up_table:
            return {rows.feature.name: binned(rows.feature, value, missing, rows.learned)}
        return {rows.feature.name: normalize(rows.feature, value, missing, rows.learned)}

    def learn(self, feature: Numeric, kind: pa.DataType, groups: Iterable[FeatureRows[Numeric]]) -> Statistics:
        return learn_statistics(feature, map(self.numbers, groups))


class NumberReader(NumericReader[NumberFeature]):
    needs = "numbers"

    def fits(self, kind: pa.DataType) -> bool:
        return is_number(kind)

    def numbers(self, rows: FeatureRows[NumberFeature]) -> tuple[np.ndarray, np.ndarray]:
        return number_values(rows.feature, rows.array, rows.place)


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
