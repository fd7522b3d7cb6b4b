"""Any log of interactions, from Parquet, CSV or JSON lines, larger than memory: each event with what came before it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import duckdb
from pydantic import Field, model_validator

from trec_twotower.data.sources.event_files import LATEST_S, LATEST_US, Files, explained, fetch_row, fetch_rows, sql_name
from trec_twotower.data.sources.event_log import LogOptions, refuse_faults, write_log
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError

OURS = ("user_id", "item_id", "timestamp", "weight", "positives", "history")


class Options(LogOptions):
    """Where the log lies, and which columns say what."""

    events: str = Field(min_length=1)  # a file, a folder or a glob of Parquet, CSV or JSON lines
    items: str | None = None  # the catalogue, given likewise; by default the distinct items of the events
    users: str | None = None  # static features of users, given likewise
    user: str = "user_id"  # the column of that name in the events and in `users`
    item: str = "item_id"  # and in `items`
    timestamp: str = "timestamp"  # whole seconds since 1970, or TIMESTAMP
    weight: str | None = None  # becomes the column `weight` of the train rows
    context: tuple[str, ...] = ()  # further columns of the events to keep

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        columns = [self.user, self.item, self.timestamp, *([self.weight] if self.weight else []), *self.context]
        twice = [name for name, count in Counter(map(str.casefold, columns)).items() if count > 1]
        if twice:
            raise ValueError(f"column {twice[0]!r} is named twice among user, item, timestamp, weight and context")
        taken = [name for name in self.context if name.casefold() in OURS]
        if taken:
            raise ValueError(f"context column {taken[0]!r} has the name of a column of the dataset: rename it")
        return self

    @property
    def kept(self) -> list[str]:
        return ["timestamp", *(["weight"] if self.weight else []), *self.context]

    @property
    def asked(self) -> list[str]:
        return ["timestamp", *self.context]


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and users; returns the content of dataset.yaml."""
    return write_log("events", options, writer, _load_events, _load_sides)


def _load_events(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the table `events`; DataError where a row cannot be one."""
    files = Files.find(database, options, "events")
    columns = {
        "user_id": files.id(options.user, "user"),
        "item_id": files.id(options.item, "item"),
        "timestamp": files.microseconds(options.timestamp),
    }
    if options.weight:
        columns["weight"] = files.number(options.weight)
    columns |= {name: files.feature(name, "context") for name in options.context}
    selected = ", ".join(f"{expression} AS {sql_name(name)}" for name, expression in columns.items())
    with explained(f"events = {options.events}", options):
        fetch_rows(database, f"CREATE TABLE events AS SELECT {selected} FROM {files.relation}")

    unit = f"more than {LATEST_S:,} seconds, as if in milliseconds: divide, so that it counts seconds"
    faults = [
        (options.user, "user_id", "{} IS NULL", "remove these rows"),
        (options.item, "item_id", "{} IS NULL", "remove these rows"),
        (options.timestamp, "timestamp", "{} IS NULL", "remove these rows, or give them a time"),
        (options.timestamp, "timestamp", "{} < 0", "times before 1970 are taken for mistakes: remove these rows"),
        (options.timestamp, "timestamp", f"{{}} > {LATEST_US}", unit),
    ]
    if options.weight:
        bad = "coalesce(NOT isfinite({0}) OR {0} < 0, true)"
        faults.append((options.weight, "weight", bad, "weights are finite and at least 0"))
    return {"events_read": refuse_faults(database, files, columns, faults)}


def _load_sides(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the table `items` and, where given, `users`."""
    if options.items is None:
        fetch_rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
    else:
        _load_side(database, options, "items", options.item, "item")
    if options.users is not None:
        _load_side(database, options, "users", options.user, "user")
    return {}


def _load_side(database: duckdb.DuckDBPyConnection, options: Options, side: str, column: str, role: str) -> None:
    """Make the table `items` or `users`; DataError where ids are null, stand twice, or are not all there."""
    files, key = Files.find(database, options, side), f"{role}_id"
    where = f"{side} = {files.path}"
    expression = files.id(column, role)
    others = [name for name in files.types if name != column]
    taken = [name for name in others if name.casefold() == key]
    if taken:
        raise DataError(f"{where}: {column!r} is to become {key!r}, but there is a column {taken[0]!r} too: rename it.")
    features = "".join(f", {files.feature(name, role)} AS {sql_name(name)}" for name in others)
    with explained(where, options):
        fetch_rows(database, f"CREATE TABLE {side} AS SELECT {expression} AS {key}{features} FROM {files.relation}")

    kind, wanted = (
        fetch_row(database, f"SELECT column_type FROM (DESCRIBE {table}) WHERE column_name = '{key}'")[0]
        for table in (side, "events")
    )
    if kind != wanted:
        raise DataError(
            f"{where}: {column!r} is {files.types[column]}, but the events hold {wanted}: write both with one type."
        )
    (nulls,) = fetch_row(database, f"SELECT count(*) FROM {side} WHERE {key} IS NULL")
    if nulls:
        raise files.refuse(database, column, f"{expression} IS NULL", nulls, "remove these rows")
    twice = f"SELECT {key} FROM {side} GROUP BY {key} HAVING count(*) > 1"
    missing = f"SELECT {key} FROM (SELECT DISTINCT {key} FROM kept) ANTI JOIN {side} USING ({key})"
    for ids, what, mend in (
        (twice, f"ids of {column!r} stand in more than one row", "keep one row an id"),
        (missing, f"{side} of the events are not there", f"write a row for each {role}, or remove their events"),
    ):
        count, first = fetch_row(database, f"SELECT count(*), min({key}) FROM ({ids})")
        if count:
            raise DataError(f"{where}: {count:,} {what}, the first of them {first!r}: {mend}.")
