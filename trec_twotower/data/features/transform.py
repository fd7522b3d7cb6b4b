"""From Arrow columns to hashed ids and normalized numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec, ItemListFeature
from trec_twotower.config.features import (
    AgeFeature,
    BagFeature,
    CategoryFeature,
    CrossFeature,
    LanguageModelFeature,
    NumberFeature,
    NumericFeature,
    SequenceFeature,
    TextFeature,
    TimeFeature,
    VectorFeature,
    VocabularyFeature,
)
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import bucket_names, sub_name
from trec_twotower.data.arrow_types import as_list
from trec_twotower.data.features.column_checks import check_actions, check_times, check_weights, is_id_list
from trec_twotower.data.features.datetime_parts import DAY_S, ages, parts, seconds
from trec_twotower.data.features.embeddings import vectors
from trec_twotower.data.features.numeric import Statistics, binned, normalize, number_values
from trec_twotower.data.features.text import text_keys, tokens
from trec_twotower.data.features.vocabulary import in_vocabulary
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import bucket_type, hash_to_bucket, id_keys, mix_array, modulo_bucket
from trec_twotower.ops.kernels import put_divisors
from trec_twotower.ops.ragged import Ragged

NULL_KEY = np.int64(0x4E554C4C2D4B4559)  # key of null in a cross
GAP_BUCKETS = 40  # buckets of the time between two steps: 0 for the first step, then powers of two
NULL_BUCKET = 0  # row of null in the table of a category
SECOND_HASH = 0x5ECD  # offset between the seeds of the two hashes of a table


@dataclass(frozen=True)
class Columns:
    """The features of some rows of one side.

    `sparse[f]` holds the buckets (int32) of feature f; `numbers[f]` has num_numbers columns; a number has its
    normalized value and 1 if it is missing. `sparse[f@2]` holds the buckets of the second hash of a table. For text
    with a language model, `sparse[f]` holds tokens. The side columns of a sequence are `sparse[f@gap]`,
    `sparse[f@action]` (buckets) and `sparse[f@row]` (catalogue rows, whose features are in `items`).
    """

    num_rows: int
    sparse: Mapping[str, Ragged]
    numbers: Mapping[str, np.ndarray]  # float32 (rows, num_numbers)
    items: Columns | None = None  # features of the whole catalogue, for attributes of steps

    def take(self, rows: np.ndarray) -> Columns:
        return Columns(
            len(rows),
            {name: lists.take(rows) for name, lists in self.sparse.items()},
            {name: take_numbers(number, rows) for name, number in self.numbers.items()},
            self.items,
        )

    def slice(self, start: int, stop: int) -> Columns:
        """Return rows start .. stop - 1, without a copy."""
        return Columns(
            stop - start,
            {name: lists.slice(start, stop) for name, lists in self.sparse.items()},
            {name: number[start:stop] for name, number in self.numbers.items()},
            self.items,
        )

    def merge(self, other: Columns) -> Columns:
        """Return the features of both, for the same rows."""
        assert self.num_rows == other.num_rows
        return Columns(
            self.num_rows,
            {**self.sparse, **other.sparse},
            {**self.numbers, **other.numbers},
            self.items or other.items,
        )

    @staticmethod
    def concat(parts: Sequence[Columns]) -> Columns:
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return Columns(
            sum(part.num_rows for part in parts),
            {name: Ragged.concat([part.sparse[name] for part in parts]) for name in first.sparse},
            {name: np.concatenate([part.numbers[name] for part in parts]) for name in first.numbers},
            parts[-1].items,
        )


def take_numbers(number: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows of a (rows, N) float32 array; pairs are copied as one 64-bit value each."""
    if number.shape[1] != 2:
        return number[rows]
    words = np.ascontiguousarray(number).reshape(-1).view(np.int64)
    return words[rows].view(np.float32).reshape(-1, 2)


def transform(
    features: Iterable[FeatureSpec],
    tables: Mapping[str, TableSpec],
    statistics: Mapping[str, Statistics],
    table: pa.Table,
    where: str,
    given: Mapping[str, Ragged] | None = None,
    *,
    uncut: bool = False,
    item_rows: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Columns:
    """Return the features of every row of an Arrow table. DataError names `where`, the column and the row.

    `given` has lists of 64-bit keys for computed columns, such as a sampled half of a history; with `uncut` they
    are not cut to max_length. `item_rows` returns the catalogue rows of keys, for sequences with attributes.
    """
    sparse, numbers = {}, {}
    for feature in features:
        name, column = feature.name, feature.source_column
        place = f"{where}, column {column!r}"
        if given is not None and column in given:
            keys = given[column] if uncut else given[column].newest(feature.length_limit)
            for part, spec in hashings(feature, tables[feature.table_name]):
                sparse[part] = Ragged(keys.offsets, bucket(spec, keys.values), keys.weights)
            continue
        match feature:
            case VectorFeature():
                numbers[name] = vectors(feature, one_chunk(table[column]), place)
            case LanguageModelFeature():
                sparse[name] = tokens(feature, one_chunk(table[column]))
            case NumericFeature() if feature.looks_up_table:
                sparse[name] = binned(feature, *numeric(feature, table, where), statistics[name])
            case NumericFeature():
                numbers[name] = normalize(feature, *numeric(feature, table, where), statistics[name])
            case SequenceFeature():
                spec = tables[feature.table_name]
                sparse |= sequence(feature, spec, one_chunk(table[column]), table, place, item_rows)
            case VocabularyFeature():
                sparse[name] = Ragged.singles(in_vocabulary(one_chunk(table[column]), statistics[name], place))
            case _:
                for part, spec in hashings(feature, tables[feature.table_name]):
                    sparse[part] = looked_up(feature, spec, table, where)
    return Columns(table.num_rows, sparse, numbers)


def hashings(feature: FeatureSpec, spec: TableSpec) -> list[tuple[str, TableSpec]]:
    """Yield the keys of a feature's buckets, each with the table settings of its hash."""
    second = spec.model_copy(update={"seed": spec.seed ^ SECOND_HASH})
    return list(zip(bucket_names(feature.name, spec), (spec, second), strict=False))


def looked_up(feature: FeatureSpec, spec: TableSpec, table: pa.Table, where: str) -> Ragged:
    """Return the table rows that each row of an Arrow table looks up for a feature."""
    array, place = one_chunk(table[feature.source_column]), f"{where}, column {feature.source_column!r}"
    match feature:
        case TimeFeature():
            return Ragged.singles(parts(feature, array, place))
        case CrossFeature():
            crossed = ((one_chunk(table[column]), f"{where}, column {column!r}") for column in feature.columns)
            return Ragged.singles(bucket(spec, cross_keys(crossed)))
        case BagFeature():
            weights = one_chunk(table[feature.weights]) if feature.weights else None
            return bag(feature, spec, array, weights, place, table)
        case TextFeature():
            keys = text_keys(feature, array)
            return Ragged(keys.offsets, bucket(spec, keys.values))
        case CategoryFeature():
            return Ragged.singles(category(spec, array, place))
    return Ragged.singles(buckets(spec, array, place))


def numeric(feature: NumericFeature, table: pa.Table, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of a feature for each row (float64), and which are missing."""
    array, place = one_chunk(table[feature.source_column]), f"{where}, column {feature.source_column!r}"
    if isinstance(feature, NumberFeature):
        return number_values(feature, array, place)
    assert isinstance(feature, AgeFeature)
    return ages(feature, array, one_chunk(table[feature.until]) if feature.until else None, place)


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
    rest = spec.model_copy(update={"buckets": spec.buckets - 1})
    kind = bucket_type(spec.buckets)
    if not array.null_count:
        return buckets(rest, array, where).astype(kind, copy=False) + kind(1)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    out = np.full(len(array), NULL_BUCKET, kind)
    out[valid] = buckets(rest, array.drop_null(), where).astype(kind, copy=False) + kind(1)
    return out


def bag(
    feature: BagFeature,
    spec: TableSpec,
    array: pa.Array,
    weights: pa.Array | None,
    where: str,
    beside_it: pa.Table | None = None,
) -> Ragged:
    """Return hashed lists, cut to the newest `max_length`, without null elements; weights may decay by time."""
    hashed = _element_lists(array, where, lambda ids: buckets(spec, ids, where))
    if weights is not None:
        hashed = with_weights(hashed, array, weights, where, str(feature.weights))
    if feature.half_life_days is not None:
        assert beside_it is not None
        hashed = with_decay(feature, hashed, array, beside_it, where)
    return hashed.newest(feature.max_length)


def with_decay(feature: BagFeature, lists: Ragged, ids: pa.Array, table: pa.Table, where: str) -> Ragged:
    """Return `lists`, the hashed `ids`, with weights that are halved for each half-life of age.

    Ages end at the newest element of the row, or at the time in `until` if the row has one.
    """
    assert feature.times is not None and feature.half_life_days is not None
    times = one_chunk(table[feature.times])
    check_times(feature.times, times.type, where)
    time_s, _ = rising_seconds(feature, parallel_elements(ids, times, where, feature.times), lists, where)
    end_s = np.zeros(len(lists))
    has_any = lists.lengths > 0
    end_s[has_any] = time_s[lists.offsets[1:][has_any] - 1]
    if feature.until is not None:
        place = f"{where}, until column {feature.until!r}"
        until_s, missing = seconds(feature.name, feature.unit, one_chunk(table[feature.until]), place)
        if (early := np.flatnonzero(has_any & ~missing & (until_s < end_s))).size:
            raise DataError(
                f"{where}, row {early[0]:,}: a time in {feature.times!r} is after {feature.until!r} ({early.size:,} "
                "rows are so): these elements are in the future, remove them."
            )
        end_s = np.where(missing, end_s, until_s)
    age_days = (np.repeat(end_s, lists.lengths) - time_s) / DAY_S
    weight = np.exp2(-age_days / feature.half_life_days).astype(np.float32)
    return Ragged(lists.offsets, lists.values, weight if lists.weights is None else weight * lists.weights)


def sequence(
    feature: SequenceFeature,
    spec: TableSpec,
    ids: pa.Array,
    table: pa.Table,
    where: str,
    item_rows: Callable[[np.ndarray], np.ndarray] | None,
) -> dict[str, Ragged]:
    """Return hashed lists and their side columns, cut to the newest `max_length`, without null elements."""
    name = feature.name
    keys = key_lists(ids, where)
    found = {name: Ragged(keys.offsets, bucket(spec, keys.values))}
    if feature.attributes:
        assert item_rows is not None
        found[sub_name(name, "row")] = Ragged(keys.offsets, item_rows(keys.values))
    if feature.times:
        times = one_chunk(table[feature.times])
        check_times(feature.times, times.type, where)
        gaps = gap_buckets(feature, parallel_elements(ids, times, where, feature.times), keys, where)
        found[sub_name(name, "gap")] = Ragged(keys.offsets, gaps)
    if feature.actions:
        actions = one_chunk(table[feature.actions])
        check_actions(feature.actions, actions.type, where)
        actions = parallel_elements(ids, actions, where, feature.actions)
        of_actions = TableSpec(buckets=feature.action_buckets, dim=1)
        found[sub_name(name, "action")] = Ragged(keys.offsets, category(of_actions, actions, where))
    return {part: lists.newest(feature.max_length) for part, lists in found.items()}


def gap_buckets(feature: ItemListFeature, times: pa.Array, steps: Ragged, where: str) -> np.ndarray:
    """Return the bucket of the time since the previous step: 1 + log2(1 + seconds), 0 for the first step."""
    value, is_first = rising_seconds(feature, times, steps, where)
    gap = np.where(is_first, 0.0, np.diff(value, prepend=value[:1]))
    of_gap = np.minimum(1 + np.log2(1 + gap), GAP_BUCKETS - 1).astype(np.int32)
    return np.where(is_first, 0, of_gap).astype(np.int32)


def rising_seconds(
    feature: ItemListFeature, times: pa.Array, steps: Ragged, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the time of each step in seconds (float64), and which steps are the first of their row.

    Raises DataError if the times of a row decrease, are null, or are no valid times in the feature's `unit`.
    """
    column = feature.times
    if times.null_count:
        raise DataError(f"{where}: the times in {column!r} contain null for an id: write the time of every step.")
    value, _ = seconds(feature.name, feature.unit, times, f"{where}, times {column!r}", steps.rows)
    is_first = np.zeros(len(value), bool)
    is_first[steps.offsets[:-1][steps.lengths > 0]] = True
    rises = is_first | (np.diff(value, prepend=value[:1]) >= 0)
    if not rises.all():
        row = int(steps.rows[~rises][0])
        raise DataError(
            f"{where}, row {row:,}: the times in {column!r} decrease, but lists are oldest first: sort each by time."
        )
    return value, is_first


def key_lists(array: pa.Array, where: str) -> Ragged:
    """Return the 64-bit keys of a column of lists of ids; null lists are empty, null elements are dropped."""
    return _element_lists(array, where, lambda ids: id_keys(ids, where))


def _element_lists(array: pa.Array, where: str, of_ids: Callable[[pa.Array], np.ndarray]) -> Ragged:
    """Return the lists of `of_ids(elements)`, without null elements."""
    if not is_id_list(array.type):
        raise DataError(f"{where}: is {array.type}, but a list of integers or strings is needed.")
    if array.null_count:
        array = array.fill_null(pa.scalar([], type=array.type))
    elements = array.flatten()
    offsets = _offsets(array)
    if not elements.null_count:
        return Ragged(offsets, of_ids(elements))
    valid = elements.is_valid().to_numpy(zero_copy_only=False)
    kept = np.concatenate([[0], np.cumsum(valid)])
    return Ragged(kept[offsets].astype(np.int64), of_ids(elements.drop_null()))


def _offsets(array: pa.Array) -> np.ndarray:
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return offsets - offsets[0]


def with_weights(
    lists: Ragged, ids: pa.Array, weights: pa.Array, where: str, column: str, what: str = "weight"
) -> Ragged:
    """Return `lists`, the hashed `ids`, with weights from the parallel column `column`."""
    check_weights(column, weights.type, where)
    flat = parallel_elements(ids, weights, where, column, what)
    values = flat.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    is_odd = ~np.isfinite(values)
    if is_odd.any():
        row = int(lists.rows[is_odd][0])
        raise DataError(
            f"{where}, row {row:,}: the {what}s in {column!r} contain null, NaN or infinity: write finite numbers."
        )
    return Ragged(lists.offsets, lists.values, values)


def parallel_elements(ids: pa.Array, other: pa.Array, where: str, column: str, what: str = "value") -> pa.Array:
    """Return the elements of a column parallel to lists of ids, without those of null ids."""
    other = as_list(other)
    other = other.fill_null(pa.scalar([], type=other.type)) if other.null_count else other
    wanted = _offsets(ids.fill_null(pa.scalar([], type=ids.type)) if ids.null_count else ids)
    found = _offsets(other)
    if not np.array_equal(wanted, found):
        row = int(np.flatnonzero(np.diff(wanted) != np.diff(found))[0])
        raise DataError(
            f"{where}, row {row:,}: {np.diff(wanted)[row]} ids but {np.diff(found)[row]} {what}s in {column!r}: "
            f"write one {what} per id."
        )
    flat, values = ids.flatten(), other.flatten()
    return values.filter(flat.is_valid()) if flat.null_count else values


def divides(feature: FeatureSpec) -> bool:
    """Return whether the pooled sums of the feature are divided."""
    return feature.pooling_mode != "sum" or feature.output_scale != 1.0


def put_pooling_divisor(feature: FeatureSpec, lists: Ragged, out: np.ndarray) -> None:
    """Write the divisor of each row's pooled sum to `out`: 1, the sum of weights, or the root of their sum of squares.

    The divisor includes 1 / scale. Rows of `out` after those of the lists do not change.

    Tables pool by SUM only, because TorchRec's MEAN divides by counts instead of weights, and with row-wise sharding
    also divides the outputs of other tables.
    """
    scale, is_root = np.float32(feature.output_scale), feature.pooling_mode == "sqrtn"
    if feature.pooling_mode == "sum":
        out[: len(lists)] = 1 / scale
        return
    if lists.weights is None:
        put_divisors(lists.offsets, is_root, scale, out)
        return
    weights = lists.weights.astype(np.float64)
    if is_root:
        weights = weights**2
    total = np.add.reduceat(np.append(weights, 0.0), lists.offsets[:-1]) if len(lists) else np.empty(0)
    total[lists.lengths == 0] = 1.0
    total = np.sqrt(total) if is_root else total
    out[: len(lists)] = np.where(np.abs(total) > 1e-12, total, 1.0).astype(np.float32) / scale


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
