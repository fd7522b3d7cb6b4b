"""Hashed features with one value per row: ids, categories and crosses."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import CategoryFeature, CrossFeature, IdFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import bucket_names
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Spec, Values
from trec_twotower.ops.hashing import bucket_type, hash_to_bucket, id_keys, is_id, mix_array, modulo_bucket
from trec_twotower.ops.ragged import Ragged

NULL_KEY = np.int64(0x4E554C4C2D4B4559)  # key of null in a cross
NULL_BUCKET = 0  # row of null in the table of a category
SECOND_HASH = 0x5ECD  # offset between the seeds of the two hashes of a table


class HashedReader(FeatureReader[Spec]):
    """A kind whose values are hashed to table rows, by each hash of the table. Subclasses hash by one."""

    has_keys = True

    def read(self, rows: FeatureRows[Spec]) -> Values:
        return {name: self.look_up(rows, each) for name, each in hashings(rows.feature, rows.table_settings)}

    def look_up(self, rows: FeatureRows[Spec], settings: TableSpec) -> Ragged:
        """Return the table rows of each row by one hash."""
        raise NotImplementedError


class IdReader(HashedReader[IdFeature]):
    needs = "integers or strings"

    def fits(self, kind: pa.DataType) -> bool:
        return is_id(kind)

    def look_up(self, rows: FeatureRows[IdFeature], settings: TableSpec) -> Ragged:
        return Ragged.singles(buckets(settings, rows.array, rows.place))

    def keys(self, rows: FeatureRows[IdFeature]) -> np.ndarray:
        return id_keys(rows.array.drop_null(), rows.place)


class CategoryReader(HashedReader[CategoryFeature]):
    needs = "integers or strings"

    def fits(self, kind: pa.DataType) -> bool:
        return is_id(kind)

    def look_up(self, rows: FeatureRows[CategoryFeature], settings: TableSpec) -> Ragged:
        return Ragged.singles(category(settings, rows.array, rows.place))

    def keys(self, rows: FeatureRows[CategoryFeature]) -> np.ndarray:
        return id_keys(rows.array.drop_null(), rows.place)

    def key_settings(self, settings: TableSpec) -> TableSpec:
        return without_null_row(settings) if settings.buckets > 1 else settings


class CrossReader(HashedReader[CrossFeature]):
    needs = "integers or strings"
    null_is_value = True

    def fits(self, kind: pa.DataType) -> bool:
        return is_id(kind)

    def look_up(self, rows: FeatureRows[CrossFeature], settings: TableSpec) -> Ragged:
        return Ragged.singles(bucket(settings, self.keys(rows)))

    def keys(self, rows: FeatureRows[CrossFeature]) -> np.ndarray:
        return cross_keys((rows.column(name), f"{rows.where}, column {name!r}") for name in rows.feature.columns)


def hashings(feature: FeatureSpec, spec: TableSpec) -> list[tuple[str, TableSpec]]:
    """Yield the keys of a feature's buckets, each with the table settings of its hash."""
    second = spec.model_copy(update={"seed": spec.seed ^ SECOND_HASH})
    return list(zip(bucket_names(feature.name, spec), (spec, second), strict=False))


def cross_keys(columns: Iterable[tuple[pa.Array, str]]) -> np.ndarray:
    """Return one 64-bit key per row for the combination of its columns; null is a value like others.

    The order of the columns matters: a key is the hash of a column's own key and the key of the columns before it.
    """
    state: np.ndarray | None = None
    for array, where in columns:
        keys = np.full(len(array), NULL_KEY)
        keys[array.is_valid().to_numpy(zero_copy_only=False)] = id_keys(array.drop_null(), where)
        state = mix_array(keys.view(np.uint64) if state is None else keys.view(np.uint64) ^ state)
    assert state is not None
    return state.view(np.int64)


def bucket(spec: TableSpec, keys: np.ndarray) -> np.ndarray:
    """Return the table row of each 64-bit key."""
    if spec.hashing == "modulo":
        return modulo_bucket(keys, spec.buckets)
    return hash_to_bucket(keys, spec.buckets, spec.seed)


def buckets(spec: TableSpec, ids: pa.Array, where: str) -> np.ndarray:
    """Return the table row of each id of a column without nulls; values of a dictionary are hashed once."""
    if pa.types.is_dictionary(ids.type) and not ids.null_count:
        return bucket(spec, id_keys(ids.dictionary, where)).take(ids.indices.to_numpy(zero_copy_only=False))
    return bucket(spec, id_keys(ids, where))


def category(spec: TableSpec, array: pa.Array, where: str) -> np.ndarray:
    """Return buckets from 1 on; bucket 0 is for null (if the table has more than one row)."""
    if spec.buckets == 1:
        return np.zeros(len(array), np.int32)
    rest = without_null_row(spec)
    kind = bucket_type(spec.buckets)
    if not array.null_count:
        return buckets(rest, array, where).astype(kind, copy=False) + kind(1)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    out = np.full(len(array), NULL_BUCKET, kind)
    out[valid] = buckets(rest, array.drop_null(), where).astype(kind, copy=False) + kind(1)
    return out


def without_null_row(spec: TableSpec) -> TableSpec:
    """Return the table settings by which the values of a category are hashed: row 0 is for null."""
    return spec.model_copy(update={"buckets": spec.buckets - 1})
