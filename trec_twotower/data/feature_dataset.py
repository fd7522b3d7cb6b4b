"""A dataset with a schema: the source of each feature, checked, and the catalogue of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from trec_twotower.config.base import Side
from trec_twotower.config.data import DataConfig
from trec_twotower.config.feature_spec import HISTORY, FeatureSpec, ItemListFeature
from trec_twotower.config.features import IdFeature, SequenceFeature
from trec_twotower.config.schema import Schema
from trec_twotower.data.arrow_types import is_list, one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, USER_ID, Dataset
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.reader import FeatureRows
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import reader_of, transform
from trec_twotower.data.item_table import Catalogue, check_side
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.ops.hashing import is_id, is_text
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.arrow_values import python_value
from trec_twotower.storage.cache_dir import CacheFolder


def open_cache(data: DataConfig) -> CacheFolder:
    """Return the cache directory that `data.cache` and `data.cache_gb` describe; nothing is created yet."""
    return CacheFolder(data.cache, int(data.cache_gb * 1e9))


class Counter(Protocol):
    """Counts something per item in the pass over the training rows that counts interactions."""

    @property
    def columns(self) -> Sequence[str]:
        """Return the columns that `count` reads."""

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        """Return (I,) float64: the counts over some rows with these positives (catalogue rows)."""


class FeatureDataset:
    """A dataset with a schema: the source of each feature, checked; catalogue and users, hashed.

    With `cache`, large ones are stored there and mapped by all processes of a host. Otherwise they are in memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        schema: Schema,
        rows: str,
        statistics: Mapping[str, Statistics] | None = None,
        cache: CacheFolder | None = None,
    ) -> None:
        self.dataset = dataset = dataset.by(rows)
        self.schema = schema
        self.rows = rows
        self.cache = cache
        self.context, self.static = self._placed()
        check_side(list(schema.item), dataset.items)
        self._check_targets()
        self._check_types(dataset.train)
        self.statistics = dict(statistics) if statistics is not None else self.learn()
        self.catalogue = Catalogue(
            dataset.items, ITEM_ID, list(schema.item), schema.tables, self._statistics_of("item"), cache
        )
        self.users = None
        if self.static:
            assert dataset.users is not None
            user = self._statistics_of("user")
            self.users = Catalogue(dataset.users, USER_ID, self.static, schema.tables, user, cache)
        self._check_signs(dataset.train)

    def _statistics_of(self, side: Side) -> dict[str, Statistics]:
        learning = (feature.name for feature in self.schema.features(side) if feature.learns_from_data)
        return {name: self.statistics[f"{side}:{name}"] for name in learning}

    def _placed(self) -> tuple[list[FeatureSpec], list[FeatureSpec]]:
        """Return the user features of the rows, and those of users/."""
        train, users = self.dataset.train, self.dataset.users
        context, static = [], []
        for feature in self.schema.user:
            if self._is_drawn(feature.source_column) or train.has(feature.source_column):
                context.append(feature)
                if not self._is_drawn(feature.source_column):
                    check_side([feature], train)
                elif not feature.reads_samples:
                    raise ConfigError(
                        f"user feature {feature.name!r} reads {HISTORY!r}, which is sampled per epoch here: make it "
                        "a bag without weights or times."
                    )
            elif users is not None and users.has(feature.source_column) and feature.source_column != USER_ID:
                if isinstance(feature, SequenceFeature):
                    raise ConfigError(
                        f"user feature {feature.name!r} is a sequence, but its column {feature.source_column!r} is in "
                        f"{users.folder}, which has one value per user: write it into {train.folder}."
                    )
                static.append(feature)
                check_side([feature], users)
            else:
                known = [*train.columns, *(users.columns if users is not None else [])]
                raise ConfigError(
                    f"user feature {feature.name!r} reads column {feature.source_column!r}, which neither "
                    f"{train.folder} nor users/ has{nearest(feature.source_column, known)}: correct the config, or "
                    "write the column."
                )
        return context, static

    def lists_of_items(self) -> list[list[str]]:
        """Return the columns of train/ whose lists may contain the target item, each with its parallel columns.

        They are `history` and the columns of row features that share the table of the item id.
        """
        history = [HISTORY] if self.dataset.train.has(HISTORY) else []
        found = []
        of_rows = [each.source_column for each in self._of_items if each in self.context]
        for column in dict.fromkeys([*history, *of_rows]):
            reading = [each for each in self.context if each.source_column == column]
            named = {name for each in reading for role, name in each.side_columns.items() if role != "until"}
            found.append([column, *sorted(named)])
        return found

    @property
    def _of_items(self) -> list[FeatureSpec]:
        """Return the user features that are lists of items: those that share the table of the item id."""
        ids = [each for each in self.schema.item if isinstance(each, IdFeature) and each.source_column == ITEM_ID]
        tables = {each.table_name for each in ids}
        return [each for each in self.schema.user if isinstance(each, ItemListFeature) and each.table_name in tables]

    def check_lists_of_items(self) -> None:
        """Raise ConfigError for such a feature in users/, whose list is the same in all rows of a user."""
        for feature in self._of_items:
            if feature in self.static:
                assert self.dataset.users is not None
                raise ConfigError(
                    f"data.target_in_history is not keep, but user feature {feature.name!r} reads lists of items in "
                    f"{self.dataset.users.folder}, which has one list for all rows of a user: "
                    f"write column {feature.source_column!r} into {self.dataset.train.folder}, or set "
                    "data.target_in_history: keep."
                )

    def _is_drawn(self, column: str) -> bool:
        """Check the columns of `data.rows`: with one row per user, the history is a part of the row's positives."""
        return self.rows == "user" and column == HISTORY

    def _check_targets(self) -> None:
        train = self.dataset.train
        wanted, other = (POSITIVES, "event") if self.rows == "user" else (ITEM_ID, "user")
        if not train.has(wanted):
            hint = " (or train_users/ next to it, as `prepare ... rows=both` does)" if self.rows == "user" else ""
            raise ConfigError(
                f"data.rows is {self.rows!r}, which needs the column {wanted!r} in {train.folder}, but its columns are "
                f"{', '.join(train.columns)}: set data.rows: {other}, or write {wanted!r}{hint}."
            )

    def check_ids(self, split: Split) -> None:
        """Raise DataError if the id type of `split` makes its ids differ from those of other parts."""
        self._check_types(split)
        self._check_signs(split)

    def _id_columns(self) -> list[tuple[str, Split, str]]:
        """Return the id columns, each with the part and column that it refers to."""
        items, users = self.dataset.items, self.dataset.users
        of_items = (ITEM_ID, POSITIVES, HISTORY, *(each.source_column for each in self._of_items))
        pairs = [(column, items, ITEM_ID) for column in dict.fromkeys(of_items)]
        return [*pairs, *([(USER_ID, users, USER_ID)] if users is not None and self.static else [])]

    def _check_signs(self, split: Split) -> None:
        """Raise DataError if ids of 2^63 and above in one part have the bits of negative integers in another."""
        for column, other, name in self._id_columns():
            catalogue = self.catalogue if name == ITEM_ID else self.users
            if column not in split.columns or catalogue is None:
                continue
            kind, wanted = split.columns[column], other.columns[name]
            kind = kind.value_type if is_list(kind) else kind
            if not (pa.types.is_integer(kind) and pa.types.is_uint64(kind) != pa.types.is_uint64(wanted)):
                continue
            if (catalogue.keys < 0).any():
                some = "2^63 or more" if pa.types.is_uint64(wanted) else "negative"
                raise DataError(
                    f"{split.folder}: column {column!r} is {kind}, but {name!r} in {other.folder} is {wanted} and some "
                    f"of its ids are {some}, which are other ids in {kind}: write both with one type."
                )

    def _check_types(self, split: Split) -> None:
        """Raise DataError if `split` has ids as text that other parts have as integers: no id would match."""
        train = self.dataset.train
        for column, other, name in [*self._id_columns(), *((each, train, each) for each in self.user_columns())]:
            if column not in split.columns or name not in other.columns:
                continue
            kind, wanted = split.columns[column], other.columns[name]
            if {_is_of_text(kind), _is_of_text(wanted)} == {True, False}:
                raise DataError(
                    f"{split.folder}: column {column!r} is {kind}, but {name!r} in {other.folder} is {wanted}, and "
                    "text is never the same id as a number: write both with one type."
                )

    def learn(self) -> dict[str, Statistics]:
        """Learn statistics and vocabularies of the features in one pass over train/, users/ and items/."""
        found = {}
        places: list[tuple[str, list[FeatureSpec], Split | None]] = [
            ("item", list(self.schema.item), self.dataset.items),
            ("user", self.context, self.dataset.train),
            ("user", self.static, self.dataset.users),
        ]
        for side, features, split in places:
            for feature in features:
                if not feature.learns_from_data or split is None:
                    continue
                groups = split.tables(feature.source_columns)
                rows = (FeatureRows(feature, table, str(group)) for group, table in groups)
                kind = split.columns[feature.source_column]
                found[f"{side}:{feature.name}"] = reader_of(feature).learn(feature, kind, rows)
        return found

    def over(self, dataset: Dataset) -> FeatureDataset:
        """Return a dataset with the same catalogue and users and other training rows of the same columns."""
        other = copy(self)
        other.dataset = dataset
        return other

    def user_columns(self) -> list[str]:
        """Return the columns of a row that `user_features` reads."""
        return sorted({USER_ID, *(column for feature in self.context for column in feature.source_columns)})

    def user_features(
        self, table: pa.Table, where: str, given: Mapping[str, Ragged] | None = None, *, uncut: bool = False
    ) -> Columns:
        """Return the features of the users of these rows, from the row itself and from users/ by user_id.

        `given` has 64-bit keys for computed columns; `uncut` columns are not cut to max_length.
        """
        columns = self._of_rows(table, where, given, uncut=uncut)
        if self.users is None:
            return columns
        ids = one_chunk(table[USER_ID])
        rows = self.users.rows_of(ids, f"{where}, column {USER_ID!r}")
        if (rows < 0).any():
            first = int(np.flatnonzero(rows < 0)[0])
            raise DataError(
                f"{where}: user {python_value(ids, first)!r} is not in {self.users.split.folder} "
                f"({int((rows < 0).sum()):,} rows have such users): write one row for each user there."
            )
        return columns.merge(self.users.columns.take(rows))

    def state_features(self, table: pa.Table, where: str, given: Mapping[str, Ragged] | None = None) -> Columns:
        """Return the features of one user from one row (`state_table`). The user may be missing in users/.

        A column of users/ that is in the row overrides the value in users/. The other columns
        are null for a user without an id or a row in users/.
        """
        columns = self._of_rows(table, where, given)
        if self.users is None:
            return columns
        ids, users = one_chunk(table[USER_ID]), self.users
        row = -1 if ids.null_count else int(users.rows_of(ids, f"{where}, column {USER_ID!r}")[0])
        told = {name: table[name] for name in self.static_columns() if name in table.column_names}
        anew = [each for each in self.static if row < 0 or not told.keys().isdisjoint(each.source_columns)]
        if row >= 0:
            columns = columns.merge(users.columns.take(np.array([row])))
        if not anew:
            return columns
        others = sorted({name for each in anew for name in each.source_columns} - told.keys())
        kinds = users.split.columns
        if row < 0:
            kept = pa.table({name: pa.nulls(1, kinds[name]) for name in others})
        else:
            kept = users.row(row, others) if others else pa.table({})
        whole = pa.table({**told, **{name: kept[name] for name in others}})
        made = transform(anew, self.schema.tables, self._statistics_of("user"), whole, where)
        return columns.merge(made)

    def static_columns(self) -> list[str]:
        """Return the columns that `user_features` reads from users/, without those that it reads from the row."""
        of_rows = self.user_columns()
        return sorted({name for each in self.static for name in each.source_columns if name not in of_rows})

    def _of_rows(
        self, table: pa.Table, where: str, given: Mapping[str, Ragged] | None, *, uncut: bool = False
    ) -> Columns:
        """Return the features whose columns are in the rows."""
        return self.with_items(self._transformed(self.context, table, where, given, uncut=uncut))

    def history_features(self, table: pa.Table, where: str) -> Columns:
        """Return the features that read the column `history` of these rows."""
        return self._transformed([each for each in self.context if each.source_column == HISTORY], table, where)

    def _transformed(
        self,
        features: Sequence[FeatureSpec],
        table: pa.Table,
        where: str,
        given: Mapping[str, Ragged] | None = None,
        *,
        uncut: bool = False,
    ) -> Columns:
        tables, statistics = self.schema.tables, self._statistics_of("user")
        find = self.catalogue.rows_of_keys if self.steps_have_attributes else None
        return transform(features, tables, statistics, table, where, given, uncut=uncut, item_rows=find)

    @property
    def steps_have_attributes(self) -> bool:
        return any(feature.attributes for feature in self.schema.sequences)

    def with_items(self, columns: Columns) -> Columns:
        """Return the columns of users, with the catalogue columns for the attributes of their sequences."""
        return replace(columns, items=self.catalogue.columns) if self.steps_have_attributes else columns

    def item_rows(self, ids: pa.Array, where: str) -> np.ndarray:
        """Return the catalogue row of each item. Raises DataError for an unknown item."""
        rows = self.catalogue.rows_of(ids, where)
        if (rows < 0).any():
            first = int(np.flatnonzero(rows < 0)[0])
            raise self.unknown(python_value(ids, first), int((rows < 0).sum()), where)
        return rows

    def unknown(self, item: object, count: int, where: str) -> DataError:
        """Return the error for an item that is not in the catalogue."""
        return DataError(
            f"{where}: item {item!r} is not in the catalogue {self.dataset.items.folder} ({count:,} entries are such "
            "items): add it there, or remove these rows."
        )

    def item_row_lists(self, lists: pa.Array, where: str, *, known_only: bool = False) -> Ragged:
        """Return the catalogue rows of lists of items; with `known_only`, without items outside the catalogue."""
        rows = self.catalogue.rows_of_lists(lists, where)
        unknown = rows.values < 0
        if unknown.any():
            if known_only:
                return rows.where(~unknown)
            row = int(rows.rows[unknown][0])
            item = python_value(lists.flatten().drop_null(), int(unknown.argmax()))
            raise self.unknown(item, int(unknown.sum()), f"{where}, row {row:,}")
        return rows

    def positives(self, table: pa.Table, where: str) -> Ragged:
        """Return the positives of the rows of a table, as catalogue rows."""
        column = POSITIVES if self.rows == "user" else ITEM_ID
        array, where = one_chunk(table[column]), f"{where}, column {column!r}"
        if self.rows == "user":
            return self.item_row_lists(array, where)
        return Ragged.singles(self.item_rows(array, where))

    def item_counts(self, counters: Sequence[Counter] = ()) -> np.ndarray:
        """Return (I,) int64: the number of interactions of each item in train/.

        With `counters`, return (1 + counters, I) float64: the interactions, then the result of each counter.
        """
        columns = {POSITIVES if self.rows == "user" else ITEM_ID, *(name for each in counters for name in each.columns)}
        interactions_I = np.zeros(len(self.catalogue), np.int64)
        others = [np.zeros(len(self.catalogue)) for _ in counters]
        for group, table in self.dataset.train.tables(sorted(columns)):
            positives = self.positives(table, str(group))
            interactions_I += np.bincount(positives.values, minlength=len(interactions_I))
            for counter, other_I in zip(counters, others, strict=True):
                other_I += counter.count(table, str(group), positives)
        return np.stack([interactions_I.astype(np.float64), *others]) if counters else interactions_I


def _is_of_text(kind: pa.DataType) -> bool | None:
    """Return whether ids, or lists of ids, are text; None if the column has neither text nor integers."""
    kind = kind.value_type if is_list(kind) else kind
    return is_text(kind) if is_id(kind) else None
