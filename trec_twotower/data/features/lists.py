"""Features that are lists of ids: bags and sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec, ItemListFeature
from trec_twotower.config.features import BagFeature, SequenceFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import sub_name
from trec_twotower.data.arrow_types import as_list, is_list, one_chunk
from trec_twotower.data.features.datetime_parts import DAY_S, is_time, seconds
from trec_twotower.data.features.hashed import HashedReader, bucket, buckets, category
from trec_twotower.data.features.numeric import is_number
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Values
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import id_keys, is_id
from trec_twotower.ops.kernels import put_divisors
from trec_twotower.ops.ragged import Ragged

GAP_BUCKETS = 40  # buckets of the time between two steps: 0 for the first step, then powers of two


class BagReader(HashedReader[BagFeature]):
    """Hashed lists, cut to the newest `max_length`, without null elements; weights may decay by time."""

    needs = "lists of integers or strings"

    def fits(self, kind: pa.DataType) -> bool:
        return is_id_list(kind)

    def look_up(self, rows: FeatureRows[BagFeature], settings: TableSpec) -> Ragged:
        feature, ids, place = rows.feature, rows.array, rows.place
        hashed = _element_lists(ids, place, lambda elements: buckets(settings, elements, place))
        if feature.weights is not None:
            hashed = with_weights(hashed, ids, rows.column(feature.weights), place, feature.weights)
        if feature.half_life_days is not None:
            hashed = with_decay(feature, hashed, ids, rows.table, place)
        return hashed.newest(feature.max_length)

    def keys(self, rows: FeatureRows[BagFeature]) -> np.ndarray:
        return key_lists(rows.array, rows.place).values


class SequenceReader(FeatureReader[SequenceFeature]):
    """Hashed lists and their side columns, cut to the newest `max_length`, without null elements."""

    needs = "lists of integers or strings"
    has_keys = True

    def fits(self, kind: pa.DataType) -> bool:
        return is_id_list(kind)

    def read(self, rows: FeatureRows[SequenceFeature]) -> Values:
        feature, ids, place = rows.feature, rows.array, rows.place
        keys = key_lists(ids, place)
        found = {feature.name: Ragged(keys.offsets, bucket(rows.table_settings, keys.values))}
        if feature.attributes:
            assert rows.item_rows is not None
            found[sub_name(feature.name, "row")] = Ragged(keys.offsets, rows.item_rows(keys.values))
        if feature.times:
            times = rows.column(feature.times)
            check_times(feature.times, times.type, place)
            gaps = gap_buckets(feature, parallel_elements(ids, times, place, feature.times), keys, place)
            found[sub_name(feature.name, "gap")] = Ragged(keys.offsets, gaps)
        if feature.actions:
            actions = rows.column(feature.actions)
            check_actions(feature.actions, actions.type, place)
            actions = parallel_elements(ids, actions, place, feature.actions)
            of_actions = TableSpec(buckets=feature.action_buckets, dim=1)
            found[sub_name(feature.name, "action")] = Ragged(keys.offsets, category(of_actions, actions, place))
        return {part: lists.newest(feature.max_length) for part, lists in found.items()}

    def keys(self, rows: FeatureRows[SequenceFeature]) -> np.ndarray:
        return key_lists(rows.array, rows.place).values


def is_id_list(kind: pa.DataType) -> bool:
    return is_list(kind) and is_id(kind.value_type)


def check_weights(column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid for weights of a bag."""
    if not (is_list(kind) and is_number(kind.value_type)):
        raise DataError(f"{where}: its weights, column {column!r}, are {kind}, not a list of numbers: cast them.")


def check_times(column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid for times of steps."""
    if not (is_list(kind) and is_time(kind.value_type)):
        raise DataError(
            f"{where}: its times, column {column!r}, are {kind}, not a list of timestamps, dates or numbers."
        )


def check_actions(column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid for actions of steps."""
    if not is_id_list(kind):
        raise DataError(f"{where}: its actions, column {column!r}, are {kind}, not a list of integers or strings.")


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
