"""The newest state of a user: the input of the user tower, and the items that the user has interacted with.

Evaluation sees a user of test/ as of before the held-out interactions. Serving must not: a user's newest row counts
with the row's own positives at the end of the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.feature_spec import HISTORY, FeatureSpec, ItemListFeature, TimeUnit
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, SERVING, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.datetime_parts import PER_SECOND, counted, is_time
from trec_twotower.data.features.lists import key_lists
from trec_twotower.data.features.numeric import is_number
from trec_twotower.data.item_table import find_id
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.ops.hashing import is_id, is_text
from trec_twotower.ops.ragged import Ragged, offsets_of, side_by_side
from trec_twotower.storage.arrow_values import python_value

TIMESTAMP = "timestamp"  # the time of a row's event, as `prepare` writes it
MAX_SHOWN = 100  # characters of an unknown id in a message
PREFIX = "history_"  # of columns aligned with `history`: `history_X` holds X of each interaction


class UnknownUser(DataError):
    """A user of whom the dataset has no row."""


@dataclass(frozen=True)
class UserState:
    """One user: features (one row) and the catalogue rows of the seen items, oldest first (one list)."""

    user_id: Any
    features: Columns
    seen: Ragged


def newest_state(sources: FeatureDataset, user_id: Any) -> UserState:
    """Return the state after all interactions of the dataset, held-out ones included.

    Raises UnknownUser for a user without a row.
    """
    row, split = find_user(sources, user_id)
    features, seen = newest_states(sources, row, split)
    return UserState(python_value(row[USER_ID], 0), features, seen)


def newest_states(sources: FeatureDataset, rows: pa.Table, split: Split) -> tuple[Columns, Ragged]:
    """Return features and seen items (oldest first) of users, given the newest row of each in `split`."""
    where = str(split.folder)
    positives = _positives(rows)
    seen = sources.item_row_lists(positives, where, known_only=True)
    if HISTORY in rows.column_names:
        seen = side_by_side(sources.item_row_lists(one_chunk(rows[HISTORY]), where, known_only=True), seen)
    if sources.rows == "user" and split.name == "train":  # rows without context, whose input training draws
        given = {HISTORY: key_lists(positives, where)}
        return sources.user_features(rows, where, given), seen
    features = sources.user_features(rows, where)
    of_history = [feature for feature in sources.context if feature.source_column == HISTORY]
    if of_history:
        longer = _with_lists(rows, positives, of_history)
        features = features.merge(sources.history_features(longer, where))
    return features, seen


def state_columns(sources: FeatureDataset, split: Split) -> list[str]:
    """Return the columns of `split` that `newest_states` reads."""
    needed = {*sources.user_columns(), POSITIVES, ITEM_ID, HISTORY, TIMESTAMP}
    for feature in sources.context:
        needed |= {name for column in feature.side_columns.values() for name in _own_names(column)}
    return [name for name in split.columns if name in needed]


def given_state(sources: FeatureDataset, state: Mapping[str, Any], where: str) -> UserState:
    """Return the state that a dict describes: columns of train/ and users/; see Retriever.recommend_now."""
    table = state_table(sources, state, where)
    seen, given = Ragged.empty(1), None
    if HISTORY in table.column_names:
        history = one_chunk(table[HISTORY])
        seen = sources.item_row_lists(history, where, known_only=True)
        given = {HISTORY: key_lists(history, where)} if sources.rows == "user" else None
    return UserState(python_value(table[USER_ID], 0), sources.state_features(table, where, given), seen)


def state_table(sources: FeatureDataset, state: Mapping[str, Any], where: str) -> pa.Table:
    """Return one row with the columns that the user's features read, of the types that train/ has.

    Columns of users/ are among them where `state` has them.
    """
    train = sources.dataset.train.columns
    kinds = {name: train[name] for name in sources.user_columns() if name in train}
    if sources.rows == "user":
        kinds[HISTORY] = train[POSITIVES]
    elif HISTORY in train:
        kinds[HISTORY] = train[HISTORY]
    known = list(kinds)
    if sources.users is not None:
        of_users = sources.users.split.columns
        kinds |= {name: of_users[name] for name in sources.static_columns() if name in state}
        known = [*kinds, *sources.static_columns()]
    for name in state:
        if name not in kinds:
            raise ConfigError(f"{where} has a column {name!r}, which no user feature reads{nearest(str(name), known)}.")
    try:
        return pa.table({name: pa.array([state.get(name)], kind) for name, kind in kinds.items()})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise DataError(f"{where} does not have the types of {sources.dataset.folder}: {error}") from None


def find_user(sources: FeatureDataset, user_id: Any) -> tuple[pa.Table, Split]:
    """Return a user's newest row and its part of the dataset: serving/, test/, valid/ or the last row of train/."""
    text = _id_text(user_id)
    for split in splits_of_states(sources):
        found = _last_row(split, text)
        if found is not None:
            return found, split
    raise UnknownUser(
        f"User {_shown(user_id)} is in no part of {sources.dataset.folder}: give one of its user_ids, such as those of "
        "test/."
    )


def splits_of_states(sources: FeatureDataset) -> Iterator[Split]:
    """Yield the parts of the dataset in the order in which a user's newest row is looked for.

    Raises ConfigError for a part that lacks a column which the user tower reads.
    """
    for name in (SERVING, "test", "valid", "train"):
        if not sources.dataset.has(name):
            continue
        split = sources.dataset.split(name)
        if name != "train":
            for column in sources.user_columns():
                split.require(column, "the user tower reads")
        yield split


def _id_text(user_id: Any) -> str:
    """Return the id as a person types it; raises UnknownUser for a value that is no id."""
    value = user_id.as_py() if isinstance(user_id, pa.Scalar) else user_id
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | str | np.integer):
        raise UnknownUser(f"User {_shown(value)} is {type(value).__name__}, but ids are integers or strings.")
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _last_row(split: Split, text: str) -> pa.Table | None:
    for group in reversed(split.row_groups):
        ids = one_chunk(split.read(group, [USER_ID])[USER_ID])
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        try:
            first = find_id(ids, text)
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no column
            return None
        if first is not None:
            rows = np.flatnonzero(pc.equal(ids, ids[first]).fill_null(False).to_numpy(zero_copy_only=False))
            return split.read(group, list(split.columns)).slice(rows[-1], 1).combine_chunks()
    return None


def _positives(rows: pa.Table) -> pa.Array:
    """Return the ids of the items that each row is about, without nulls; an empty list where a row names none."""
    if POSITIVES in rows.column_names:
        return _without_nulls(one_chunk(rows[POSITIVES]))
    if ITEM_ID in rows.column_names:
        ids = one_chunk(rows[ITEM_ID])
        return _without_nulls(pa.ListArray.from_arrays(np.arange(len(ids) + 1, dtype=np.int32), ids))
    return _lists(np.zeros(len(rows), np.int64), pa.array([], pa.int64()))


def _without_nulls(lists: pa.Array) -> pa.Array:
    """Return lists without null elements, where null lists are empty."""
    elements = _plain(lists.flatten())  # without those of null lists
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    if elements.null_count:
        is_valid = elements.is_valid().to_numpy(zero_copy_only=False)
        lengths = np.diff(np.concatenate([[0], np.cumsum(is_valid)])[offsets_of(lengths)])
    return _lists(lengths, elements.drop_null())


def _with_lists(rows: pa.Table, lists: pa.Array, features: Sequence[FeatureSpec]) -> pa.Table:
    """Return the rows with the ids of `lists` at the end of `history` and its aligned columns (with_interactions)."""
    aligned = {name for each in features for role, name in each.side_columns.items() if role != "until"}
    if aligned or len(rows) == 1:  # row by row: values depend on the types and times of the row
        for name in sorted({HISTORY, *aligned}):  # one type of list, whether a row is extended or not
            column = one_chunk(rows[name])
            kind = pa.list_(column.type.value_type)
            rows = rows.set_column(rows.schema.get_field_index(name), name, column.cast(kind))
        longer = [
            with_interactions(rows.slice(row, 1), lists.slice(row, 1).flatten(), features) for row in range(len(rows))
        ]
        return pa.concat_tables(longer).combine_chunks()
    history = one_chunk(rows[HISTORY])
    first = _without_null_lists(history)
    elements = _plain(first.flatten())
    added = lists.flatten().cast(elements.type, safe=False)
    num_first = pc.list_value_length(first).to_numpy(zero_copy_only=False).astype(np.int64)
    num_added = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    start = offsets_of(num_first + num_added)
    place = np.empty(start[-1], np.int64)
    for lengths, begin, base in ((num_first, start[:-1], 0), (num_added, start[:-1] + num_first, len(elements))):
        step = np.arange(lengths.sum()) - np.repeat(offsets_of(lengths)[:-1], lengths)
        place[np.repeat(begin, lengths) + step] = base + np.arange(lengths.sum())
    whole = _lists(num_first + num_added, pa.concat_arrays([elements, added]).take(pa.array(place)))
    return rows.set_column(rows.schema.get_field_index(HISTORY), HISTORY, whole)


def _without_null_lists(lists: pa.Array) -> pa.Array:
    return lists.fill_null(pa.scalar([], type=lists.type)) if lists.null_count else lists


def _lists(lengths: np.ndarray, elements: pa.Array) -> pa.Array:
    """Return consecutive lists of these lengths; the offsets have 64 bits, so that the lists of many users fit."""
    return pa.LargeListArray.from_arrays(offsets_of(lengths), elements)


def with_interactions(row: pa.Table, ids: pa.Array, features: Sequence[FeatureSpec]) -> pa.Table:
    """Return the row with `ids` at the end of `history`, and a value for each in the columns aligned with it.

    `features` are those that read `history`. A column `history_X` aligned with it is given the row's own X where the
    row has one (times: else the row's `until` column or `timestamp`). Without it, times repeat the time of the newest
    interaction, weights are the mean of the row's weights, and actions repeat the newest action.
    """
    if not len(ids):
        return row
    length, longer = len(_elements(row[HISTORY])), _with_more(row, HISTORY, ids)
    done = {HISTORY}
    for feature in features:
        columns = feature.side_columns
        for role, value_of in (("times", _time), ("weights", _weight), ("actions", _action)):
            column = columns.get(role)
            # A list of another length is refused by name where the features are made.
            if column is None or column in done or len(_elements(row[column])) != length:
                continue
            longer = _with_more(longer, column, pa.concat_arrays([value_of(row, column, feature)] * len(ids)))
            done.add(column)
    return longer


def _time(row: pa.Table, column: str, feature: FeatureSpec) -> pa.Array:
    """Return the time of the row's own interactions (one element), not before those of the list."""
    times = _elements(row[column]).drop_null()
    newest = times.slice(max(len(times) - 1, 0))
    unit: TimeUnit = feature.unit if isinstance(feature, ItemListFeature) else "s"  # of plain numbers
    newest_s = _seconds(newest, unit) if len(newest) else -np.inf
    for name in (feature.side_columns.get("until"), *_own_names(column), TIMESTAMP):
        own = None if name is None else _scalar(row, name)
        if own is None or not is_time(own.type):
            continue
        own_s = _seconds(own.cast(pa.timestamp("s")) if pa.types.is_date(own.type) else own, unit)
        if newest_s <= own_s < np.inf:
            if pa.types.is_timestamp(times.type):
                return (
                    pa.array([round(own_s * 1e6)]).cast(pa.timestamp("us", times.type.tz)).cast(times.type, safe=False)
                )
            return pa.array([own_s * PER_SECOND[unit]]).cast(times.type, safe=False)
    return newest if len(newest) else pa.array([0]).cast(times.type)


def _seconds(time: pa.Array, unit: TimeUnit) -> float:
    """Return one time in seconds; plain numbers are in `unit`, as in the lists of times of the feature."""
    second = PER_SECOND[unit]
    if pa.types.is_timestamp(time.type):
        time, own_unit = counted(time)
        second = PER_SECOND[own_unit]
    return float(time[0].as_py()) / second


def _weight(row: pa.Table, column: str, feature: FeatureSpec) -> pa.Array:
    """Return the row's own weight, else the mean of its list, else 1 (one element)."""
    weights = _elements(row[column])
    for name in _own_names(column):
        own = _scalar(row, name)
        if own is not None and is_number(own.type):
            return own.cast(weights.type, safe=False)
    mean = pc.mean(weights.cast(pa.float64())).as_py()
    return pa.array([1.0 if mean is None else mean]).cast(weights.type, safe=False)


def _action(row: pa.Table, column: str, feature: FeatureSpec) -> pa.Array:
    """Return the row's own action, else the newest of its list, else null (one element)."""
    actions = _plain(_elements(row[column]))
    for name in _own_names(column):
        own = _scalar(row, name)
        if own is not None and is_id(own.type) and is_text(own.type) == is_text(actions.type):
            return own.cast(actions.type, safe=False)
    return actions.slice(len(actions) - 1) if len(actions) else pa.nulls(1, actions.type)


def _own_names(column: str) -> list[str]:
    """`history_actions` -> ["actions", "action"]: names of the row's own value for an aligned column."""
    name = column.removeprefix(PREFIX)
    return list(dict.fromkeys([name, name.removesuffix("s")])) if name != column else []


def _scalar(row: pa.Table, name: str) -> pa.Array | None:
    """Return a column's value (one element); None where there is no such column, or a list or null in it."""
    if name not in row.column_names or pa.types.is_nested(row[name].type):
        return None
    value = _plain(one_chunk(row[name]))
    return None if value.null_count else value


def _elements(column: pa.ChunkedArray) -> pa.Array:
    """Return the elements of the one list of a column; none where it is null."""
    return one_chunk(column).flatten()


def _plain(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _list_of(elements: pa.Array) -> pa.Array:
    """Return one list of these elements."""
    return pa.ListArray.from_arrays(pa.array([0, len(elements)], pa.int32()), elements)


def _with_more(row: pa.Table, column: str, more: pa.Array) -> pa.Table:
    """Return the row with more elements at the end of a column's list."""
    elements = _plain(_elements(row[column]))
    whole = _list_of(pa.concat_arrays([elements, more.cast(elements.type, safe=False)]))
    return row.set_column(row.schema.get_field_index(column), column, whole)
