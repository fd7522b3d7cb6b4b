"""A dataset seen through a schema: where each feature comes from, checked, and the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from trec_twotower.data.cache_folder import CacheFolder
from trec_twotower.data.catalogue import Catalogue, check_side
from trec_twotower.data.dataset import HISTORY, ITEM_ID, POSITIVES, USER_ID, Dataset, Split
from trec_twotower.data.lists import Lists
from trec_twotower.data.numbers import Statistics, learn_statistics
from trec_twotower.data.transforms import Columns, numeric, one_chunk, transform
from trec_twotower.data.vocabulary import make_vocabulary
from trec_twotower.data.words import python_value
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.schema import FeatureSpec, Schema, Side


class Counter(Protocol):
    """Counts something of every item in the pass over the training rows that counts how often each was taken."""

    @property
    def columns(self) -> Sequence[str]:
        """That it reads."""

    def count(self, table: pa.Table, where: str, positives: Lists) -> np.ndarray:
        """(I,) float64: of some rows, whose positives (catalogue rows) are these."""


class Sources:
    """A dataset seen through a schema: where each feature comes from, checked; catalogue and users, hashed.

    With `cache`, large ones are kept there and mapped by all processes of a host; without, they are in memory.
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
        self.statistics = dict(statistics) if statistics is not None else self.learn()
        self.catalogue = Catalogue(
            dataset.items, ITEM_ID, list(schema.item), schema.tables, self._statistics_of("item"), cache
        )
        self.users = None
        if self.static:
            assert dataset.users is not None
            user = self._statistics_of("user")
            self.users = Catalogue(dataset.users, USER_ID, self.static, schema.tables, user, cache)

    def _statistics_of(self, side: Side) -> dict[str, Statistics]:
        learning = (feature.name for feature in self.schema.features(side) if feature.learns)
        return {name: self.statistics[f"{side}:{name}"] for name in learning}

    def _placed(self) -> tuple[list[FeatureSpec], list[FeatureSpec]]:
        """The user features that stand in the rows, and those that stand in users/."""
        train, users = self.dataset.train, self.dataset.users
        context, static = [], []
        for feature in self.schema.user:
            if self._is_drawn(feature.reads) or train.has(feature.reads):
                context.append(feature)
                if not self._is_drawn(feature.reads):
                    check_side([feature], train)
                elif feature.kind != "bag" or feature.weights or feature.times:
                    raise ConfigError(
                        f"user feature {feature.name!r} reads {HISTORY!r}, which is drawn here: make it a bag without "
                        "weights or times."
                    )
            elif users is not None and users.has(feature.reads) and feature.reads != USER_ID:
                if feature.kind == "sequence":
                    raise ConfigError(
                        f"user feature {feature.name!r} is a sequence, but its column {feature.reads!r} stands in "
                        f"{users.folder}, which does not change from row to row: write it into {train.folder}."
                    )
                static.append(feature)
                check_side([feature], users)
            else:
                known = [*train.columns, *(users.columns if users is not None else [])]
                raise ConfigError(
                    f"user feature {feature.name!r} reads column {feature.reads!r}, which neither {train.folder} nor "
                    f"users/ has{nearest(feature.reads, known)}: correct the config, or write the column."
                )
        return context, static

    def _is_drawn(self, column: str) -> bool:
        """With a row per user the history is a part of the row's own positives."""
        return self.rows == "user" and column == HISTORY

    def _check_targets(self) -> None:
        train = self.dataset.train
        wanted, other = (POSITIVES, "event") if self.rows == "user" else (ITEM_ID, "user")
        if not train.has(wanted):
            beside = " (or train_users/ beside it, as `prepare ... rows=both` does)" if self.rows == "user" else ""
            raise ConfigError(
                f"data.rows is {self.rows!r}, which needs the column {wanted!r} in {train.folder}, but its columns are "
                f"{', '.join(train.columns)}: set data.rows: {other}, or write {wanted!r}{beside}."
            )

    def learn(self) -> dict[str, Statistics]:
        """What features learn of their columns: one pass over those of train, users/ and items/."""
        found = {}
        places: list[tuple[str, list[FeatureSpec], Split | None]] = [
            ("item", list(self.schema.item), self.dataset.items),
            ("user", self.context, self.dataset.train),
            ("user", self.static, self.dataset.users),
        ]
        for side, features, split in places:
            for feature in features:
                if not feature.learns or split is None:
                    continue
                groups = split.tables(feature.all_columns)
                if feature.vocabulary is not None:
                    columns = (one_chunk(table[feature.reads]) for _, table in groups)
                    learned = make_vocabulary(feature, split.columns[feature.reads], columns)
                else:
                    learned = learn_statistics(
                        feature, (numeric(feature, table, str(group)) for group, table in groups)
                    )
                found[f"{side}:{feature.name}"] = learned
        return found

    def over(self, dataset: Dataset) -> Sources:
        """The same catalogue and users beside other training rows, whose columns agree with those checked here."""
        other = copy(self)
        other.dataset = dataset
        return other

    def user_columns(self) -> list[str]:
        """The columns of a row that user_features reads."""
        return sorted({USER_ID, *(column for feature in self.context for column in feature.all_columns)})

    def user_features(
        self, table: pa.Table, where: str, given: Mapping[str, Lists] | None = None, *, uncut: bool = False
    ) -> Columns:
        """The features of the users of these rows: from the row itself, and from users/ by user_id.

        `given` has 64-bit keys for columns that are made rather than read; `uncut` leaves those longer than max_length.
        """
        tables, statistics = self.schema.tables, self._statistics_of("user")
        find = self.catalogue.rows_of_keys if self.steps_have_attributes else None
        columns = transform(self.context, tables, statistics, table, where, given, uncut=uncut, item_rows=find)
        columns = self.with_items(columns)
        if self.users is None:
            return columns
        ids = one_chunk(table[USER_ID])
        rows = self.users.rows_of(ids, f"{where}, column {USER_ID!r}")
        if (rows < 0).any():
            first = int(np.flatnonzero(rows < 0)[0])
            raise DataError(
                f"{where}: user {python_value(ids, first)!r} is not in {self.users.split.folder} "
                f"({int((rows < 0).sum()):,} rows name such users): write a row for each user there."
            )
        return columns.beside(self.users.columns.take(rows))

    @property
    def steps_have_attributes(self) -> bool:
        return any(feature.attributes for feature in self.schema.sequences)

    def with_items(self, columns: Columns) -> Columns:
        """Users' columns beside the catalogue that their steps' attributes stand in."""
        return replace(columns, items=self.catalogue.columns) if self.steps_have_attributes else columns

    def item_rows(self, ids: pa.Array, where: str) -> np.ndarray:
        """The catalogue row of each item; an unknown item is a DataError."""
        rows = self.catalogue.rows_of(ids, where)
        if (rows < 0).any():
            first = int(np.flatnonzero(rows < 0)[0])
            raise self.unknown(python_value(ids, first), int((rows < 0).sum()), where)
        return rows

    def unknown(self, item: object, count: int, where: str) -> DataError:
        """What to say of an item that is in no catalogue."""
        return DataError(
            f"{where}: item {item!r} is not in the catalogue {self.dataset.items.folder} ({count:,} entries name such "
            "items): add it there, or leave these rows out."
        )

    def item_row_lists(self, lists: pa.Array, where: str, *, known_only: bool = False) -> Lists:
        """Catalogue rows of lists of items; with `known_only`, items outside the catalogue are left out."""
        rows = self.catalogue.rows_of_lists(lists, where)
        unknown = rows.values < 0
        if unknown.any():
            if known_only:
                return rows.where(~unknown)
            row = int(rows.rows[unknown][0])
            item = python_value(lists.flatten().drop_null(), int(unknown.argmax()))
            raise self.unknown(item, int(unknown.sum()), f"{where}, row {row:,}")
        return rows

    def positives(self, table: pa.Table, where: str) -> Lists:
        """What the rows of a table took: catalogue rows."""
        column = POSITIVES if self.rows == "user" else ITEM_ID
        array, where = one_chunk(table[column]), f"{where}, column {column!r}"
        if self.rows == "user":
            return self.item_row_lists(array, where)
        return Lists.singles(self.item_rows(array, where))

    def item_counts(self, counters: Sequence[Counter] = ()) -> np.ndarray:
        """How often each item of the catalogue was taken in train: (I,) int64.

        With `counters` (1 + counters, I) float64, and behind that what each of them counted.
        """
        columns = {POSITIVES if self.rows == "user" else ITEM_ID, *(name for each in counters for name in each.columns)}
        taken_I = np.zeros(len(self.catalogue), np.int64)
        others = [np.zeros(len(self.catalogue)) for _ in counters]
        for group, table in self.dataset.train.tables(sorted(columns)):
            positives = self.positives(table, str(group))
            taken_I += np.bincount(positives.values, minlength=len(taken_I))
            for counter, other_I in zip(counters, others, strict=True):
                other_I += counter.count(table, str(group), positives)
        return np.stack([taken_I.astype(np.float64), *others]) if counters else taken_I
