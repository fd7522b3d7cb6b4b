"""Precomputed vectors in list columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trec_twotower.config.features import VectorFeature
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Values
from trec_twotower.errors import DataError


class VectorReader(FeatureReader[VectorFeature]):
    needs = "lists of floating-point numbers"

    def fits(self, kind: pa.DataType) -> bool:
        return is_vector(kind)

    def read(self, rows: FeatureRows[VectorFeature]) -> Values:
        return {rows.feature.name: vectors(rows.feature, rows.array, rows.place)}


def is_vector(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold vectors."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests) and pa.types.is_floating(kind.value_type)


def vectors(feature: VectorFeature, array: pa.Array, where: str) -> np.ndarray:
    """Return (rows, size + 1) float32: the vector of each row (zeros if missing), and whether it is missing.

    Raises DataError if a list has another length, or contains null, NaN or infinity (with `nan: missing` such a vector
    is missing instead).
    """
    size = feature.size
    missing = array.is_null().to_numpy(zero_copy_only=False)
    out = np.zeros((len(array), size + 1), np.float32)
    given = array.drop_null() if missing.any() else array
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(given), array.type.list_size)
    else:
        lengths = np.diff(given.offsets.to_numpy())
    if (wrong := np.flatnonzero(lengths != size)).size:
        row = int(np.flatnonzero(~missing)[wrong[0]])
        raise DataError(
            f"{where}, row {row:,}: a vector of {lengths[wrong[0]]:,} numbers, but feature {feature.name!r} has size "
            f"{size:,} ({wrong.size:,} of {len(array):,} rows): set size to their length, or write other vectors."
        )
    value = np.array(given.flatten().cast(pa.float32())).reshape(len(given), size)
    odd = ~np.isfinite(value).all(axis=1)
    if odd.any() and feature.nan == "error":
        row = int(np.flatnonzero(~missing)[odd.argmax()])
        raise DataError(
            f"{where}, row {row:,}: a vector with null, NaN or infinity ({int(odd.sum()):,} of {len(array):,} rows are "
            f"so): write null for the whole vector, or set nan: missing for feature {feature.name!r}."
        )
    value[odd] = 0.0
    if feature.unit_length:
        length = np.sqrt(np.square(value, dtype=np.float64).sum(axis=1, keepdims=True))
        value = (value / np.where(length > 0, length, 1.0)).astype(np.float32)
    out[~missing, :-1] = value
    missing[~missing] = odd
    out[:, -1] = missing
    return out
