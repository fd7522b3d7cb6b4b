"""Any log of interactions, from Parquet, CSV or JSON, larger than memory: each event with what came before it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import duckdb
from pydantic import Field, model_validator

from trec_twotower.data.sources.event_files import explained, fetch_row, fetch_rows, sql_name
from trec_twotower.data.sources.event_log import LATEST_S, Fault, refuse_faults, write_log
from trec_twotower.data.sources.id_columns import as_id, id_column, joint_id_type
from trec_twotower.data.sources.table_columns import Column, NumberColumn, Typed, as_kind, check_names, feature_column
from trec_twotower.data.sources.table_files import TableFiles, open_table
from trec_twotower.data.sources.table_options import TABLES, TableName, TableOptions
from trec_twotower.data.sources.time_columns import TimeColumn
from trec_twotower.data.sources.typed_tables import TypedTable, new_column, type_table
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import ConfigError, DataError

OURS = ("user_id", "item_id", "timestamp", "weight", "positives", "history")


class Options(TableOptions):
    """Where the log lies, and which columns say what."""

    events: str = Field(min_length=1)  # a file, a folder or a glob of Parquet, CSV or JSON
    items: str | None = None  # the catalogue, given likewise; by default the distinct items of the events
    users: str | None = None  # static features of users, given likewise
    user: str = "user_id"  # the column of that name in the events and in `users`
    item: str = "item_id"  # and in `items`
    timestamp: str = "timestamp"
    weight: str | None = None  # becomes the column `weight` of the train rows
    context: tuple[str, ...] = ()  # further columns of the events to keep
    rating: str | None = None  # with min_rating: events with a lower rating are left out
    min_rating: float | None = None

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        columns = [self.user, self.item, self.timestamp, *([self.weight] if self.weight else []), *self.context]
        twice = [name for name, count in Counter(map(str.casefold, columns)).items() if count > 1]
        if twice:
            raise ValueError(f"column {twice[0]!r} is named twice among user, item, timestamp, weight and context")
        taken = [name for name in self.context if name.casefold() in OURS]
        if taken:
            raise ValueError(f"context column {taken[0]!r} has the name of a column of the dataset: rename it")
        if (self.rating is None) != (self.min_rating is None):
            raise ValueError("rating and min_rating go together: the column of ratings, and the lowest that counts")
        if self.rating in (self.user, self.item, self.timestamp):
            raise ValueError(f"rating = {self.rating} is the column of users, items or times")
        return self

    @property
    def kept(self) -> list[str]:
        return ["timestamp", *(["weight"] if self.weight else []), *self.context]

    @property
    def asked(self) -> list[str]:
        return ["timestamp", *self.context]

    def named_columns(self, table: TableName) -> list[str]:
        if table != "events":
            return [self.item if table == "items" else self.user]
        others = [name for name in (self.weight, self.rating) if name is not None]
        return [self.user, self.item, self.timestamp, *others, *self.context]


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and users; returns the content of dataset.yaml."""
    log = _Log(options)
    return write_log("events", options, writer, log.load_events, log.load_sides)


class _Log:
    """The tables of a log. All are opened and typed before the first is loaded, since they share their ids."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tables: dict[TableName, TypedTable] = {}
        self.id_types: dict[str, str] = {}  # the DuckDB type of users' and items' ids

    def load_events(self, database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        """Make the table `events`; DataError where a row cannot be one."""
        given: list[TableName] = [name for name in TABLES if getattr(options, name) is not None]
        opened = {name: open_table(database, options, name) for name in given}
        check_names(options, [name for table in opened.values() for name in table.files.types])
        for name, table in opened.items():
            columns = _event_columns(table, options) if name == "events" else _side_columns(table, options)
            self.tables[name] = type_table(database, options, table, columns)
        for role, column in (("user", options.user), ("item", options.item)):
            holders = [(name, table) for name, table in self.tables.items() if name in ("events", f"{role}s")]
            ids = [(f"{name} = {table.files.path}", column, table.typed[column]) for name, table in holders]
            self.id_types[role] = joint_id_type(ids)
        return self._load_events(database, self.tables["events"])

    def _load_events(self, database: duckdb.DuckDBPyConnection, table: TypedTable) -> dict[str, int]:
        options, files = self.options, table.files
        columns = {
            "user_id": self._id(table.typed, "user"),
            "item_id": self._id(table.typed, "item"),
            "timestamp": table.typed[options.timestamp].seconds,
        }
        columns |= {"weight": sql_name(options.weight)} if options.weight else {}
        columns |= {name: sql_name(name) for name in options.context}
        rating = "rating of the row"
        read = columns | ({rating: sql_name(options.rating)} if options.rating else {})
        selected = ", ".join(f"{expression} AS {sql_name(name)}" for name, expression in read.items())
        condition = f", where = {options.where}" if options.where is not None else ""
        with explained(f"events = {options.events}{condition}", options):
            fetch_rows(
                database, f"CREATE TABLE events AS SELECT {selected} FROM {files.relation} WHERE ({files.where})"
            )
        if condition and not fetch_row(database, "SELECT count(*) FROM events")[0]:
            raise DataError(f"events = {options.events}: no row meets the condition where = {options.where}.")
        counts = {"events_read": refuse_faults(database, files, read, self._faults(rating))}
        if options.rating:
            counts["low_ratings_dropped"] = _drop_low_ratings(database, options, rating)
        return counts

    def _faults(self, rating: str) -> list[Fault]:
        """What a row of the events must not have."""
        options = self.options
        faults: list[Fault] = []
        for role, column in (("user", options.user), ("item", options.item)):
            name = column if column.isidentifier() else sql_name(column)
            is_null, others = "{} IS NULL", f"{name} IS NOT NULL"
            if self.id_types[role] == "VARCHAR":
                is_null, others = "{0} IS NULL OR {0} = ''", f"{name} <> ''"
            faults.append((column, f"{role}_id", is_null, f"remove these rows, or leave them out by where={others!r}"))
        unit = f"more than {LATEST_S:,} seconds, as if in milliseconds: say time_unit=ms, or divide"
        time = options.timestamp
        faults += [
            (time, "timestamp", "{} IS NULL", "remove these rows, or give them a time"),
            (time, "timestamp", "{} < 0", "times before 1970 are taken for mistakes: remove these rows"),
            (time, "timestamp", f"{{}} > {LATEST_S}", unit),
        ]
        if options.weight:
            bad = "coalesce(NOT isfinite({0}) OR {0} < 0, true)"
            faults.append((options.weight, "weight", bad, "weights are finite and at least 0"))
        if options.rating:
            faults.append((options.rating, rating, "coalesce(NOT isfinite({}), true)", "a rating is a finite number"))
        return faults

    def _id(self, typed: dict[str, Typed], role: str) -> str:
        column = self.options.user if role == "user" else self.options.item
        return as_id(column, typed[column], self.id_types[role])

    def load_sides(self, database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        """Make the table `items` and, where given, `users`."""
        if options.items is None:
            fetch_rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
        else:
            self._load_side(database, "items", options.item, "item")
        if options.users is not None:
            self._load_side(database, "users", options.user, "user")
        return {}

    def _load_side(self, database: duckdb.DuckDBPyConnection, side: TableName, column: str, role: str) -> None:
        """Make the table `items` or `users`; DataError where ids are null, stand twice, or are not all there."""
        table, key = self.tables[side], f"{role}_id"
        files = table.files
        where = f"{side} = {files.path}"
        expression = self._id(table.typed, role)
        others = [name for name in files.types if name != column]
        taken = [name for name in others if name.casefold() == key]
        if taken:
            raise DataError(
                f"{where}: {column!r} is to become {key!r}, but there is a column {taken[0]!r} too: rename it."
            )
        features = "".join(f", {sql_name(name)}" for name in others)
        with explained(where, self.options):
            fetch_rows(database, f"CREATE TABLE {side} AS SELECT {expression} AS {key}{features} FROM {files.relation}")

        is_null = f"{key} IS NULL" + (f" OR {key} = ''" if self.id_types[role] == "VARCHAR" else "")
        (nulls,) = fetch_row(database, f"SELECT count(*) FROM {side} WHERE {is_null}")
        if nulls:
            raise files.refuse(database, column, is_null.replace(key, expression), nulls, "remove these rows")
        twice = f"SELECT {key} FROM {side} GROUP BY {key} HAVING count(*) > 1"
        missing = f"SELECT {key} FROM (SELECT DISTINCT {key} FROM kept) ANTI JOIN {side} USING ({key})"
        for ids, what, mend in (
            (twice, f"ids of {column!r} stand in more than one row", "keep one row an id"),
            (missing, f"{side} of the events are not there", f"write a row for each {role}, or remove their events"),
        ):
            count, first = fetch_row(database, f"SELECT count(*), min({key}) FROM ({ids})")
            if count:
                raise DataError(f"{where}: {count:,} {what}, the first of them {first!r}: {mend}.")


def _event_columns(table: TableFiles, options: Options) -> list[Column]:
    """The columns of the events that are read, each with the way in which it gets its type."""
    made = [
        id_column(new_column(table, options, name, role))
        for name, role in ((options.user, "user"), (options.item, "item"))
    ]
    made.append(as_kind(new_column(table, options, options.timestamp, "timestamp"), TimeColumn))
    for name, role in ((options.weight, "weight"), (options.rating, "rating")):
        if name is not None and name not in {column.name for column in made}:
            made.append(as_kind(new_column(table, options, name, role), NumberColumn))
    known = {column.name for column in made}
    for name in options.context:
        if name not in known:
            made.append(feature_column(new_column(table, options, name, "context", is_needed=False)))
    if options.where is not None:
        known = {column.name for column in made}
        used = options.where.casefold()
        others = [name for name in table.files.types if name not in known and name.casefold() in used]
        made += [
            feature_column(new_column(table, options, name, "where", is_needed=False), is_noted=False)
            for name in others
        ]
    return made


def _side_columns(table: TableFiles, options: Options) -> list[Column]:
    """The ids and the features of items or users."""
    column, role = (options.item, "item") if table.files.option == "items" else (options.user, "user")
    ids = id_column(new_column(table, options, column, role))
    others = [name for name in table.files.types if name != column]
    return [ids, *(feature_column(new_column(table, options, name, role, is_needed=False)) for name in others)]


def _drop_low_ratings(database: duckdb.DuckDBPyConnection, options: Options, rating: str) -> int:
    """Take the events below `min_rating` out of the table `events`; return how many they are."""
    assert options.min_rating is not None
    condition = f"{sql_name(rating)} < {options.min_rating!r}"
    low, rows = fetch_row(database, f"SELECT count(*) FILTER ({condition}), count(*) FROM events")
    if low == rows:
        raise ConfigError(f"min_rating = {options.min_rating:g}: none of {rows:,} ratings is so high: lower it.")
    fetch_rows(database, f"DELETE FROM events WHERE {condition}")
    fetch_rows(database, f"ALTER TABLE events DROP COLUMN {sql_name(rating)}")
    return int(low)
