"""Any log of interactions, from Parquet, CSV or JSON lines, larger than memory: each event with what came before it.

DuckDB reads the log into a table on disk, drops what is asked for and sorts the rest by user and second, spilling
beyond `memory_gb`. The sorted rows come back in batches that are cut between users, so that the past of an event is a
range of rows, found with a few numpy passes. Memory holds a row group of each part, and all events of one user.

DuckDB can make the histories itself, but slower. 2 million events of 120,000 users, sorted, with histories of 50, on
two cores: 2 s here; 11 s by `list(item_id) OVER (... RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)`, which is
exact but grows with the square of a user's events (1,000 users: 1 s against 41 s); 5 s by `ROWS BETWEEN 50 PRECEDING
AND 1 PRECEDING`, which does not grow so, but takes in events of the same second.

Two events of one second are not in each other's history: nobody knows which came first. Times without a zone are UTC.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any, Literal, Self

import duckdb
import pyarrow as pa
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from trec_twotower.data.sources.event_files import (
    Files,
    explained,
    fetch_batches,
    fetch_row,
    fetch_rows,
    sql_name,
)
from trec_twotower.data.sources.event_splits import Piece, Splits, whole_users
from trec_twotower.data.sources.options import SourceOptions
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError

LATEST_S = 10**11  # the year 5138; what is larger is in another unit
OURS = ("user_id", "item_id", "timestamp", "weight", "positives", "history")


def _seconds(value: Any) -> Any:
    """A date or a time of day as seconds since 1970, in UTC where it names no zone."""
    if isinstance(value, str) and not value.isdecimal():
        value = datetime.datetime.fromisoformat(value)
    elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        value = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        return int(value.timestamp())
    return value


Moment = Annotated[int, BeforeValidator(_seconds)]


class Options(SourceOptions):
    """Where the log lies, which columns say what, what is dropped, and what is held out."""

    events: str = Field(min_length=1)  # a file, a folder or a glob of Parquet, CSV or JSON lines
    items: str | None = None  # the catalogue, given likewise; by default the distinct items of the events
    users: str | None = None  # static features of users, given likewise
    user: str = "user_id"  # the column of that name in the events and in `users`
    item: str = "item_id"  # and in `items`
    timestamp: str = "timestamp"  # whole seconds since 1970, or TIMESTAMP
    weight: str | None = None  # becomes the column `weight` of the train rows
    context: tuple[str, ...] = ()  # further columns of the events to keep
    max_history: PositiveInt = 50  # newest items kept in a train row; valid and test rows keep all
    min_history: int = Field(0, ge=0)  # train rows with fewer earlier items are left out
    split: Literal["leave-last-out", "time"] = "leave-last-out"
    valid_from: Moment | None = None  # split = time: seconds, or a date such as 2024-05-31
    test_from: Moment | None = None
    min_user_events: PositiveInt = 1  # with min_item_events: users and items with fewer go, until none has fewer
    min_item_events: PositiveInt = 1
    dedupe: bool = False  # keep only the first event of the same user and item
    memory_gb: float = Field(4.0, ge=0.1)  # what DuckDB may use before it spills to disk

    @model_validator(mode="after")
    def _fits(self) -> Self:
        columns = [self.user, self.item, self.timestamp, *([self.weight] if self.weight else []), *self.context]
        twice = [name for name, count in Counter(map(str.casefold, columns)).items() if count > 1]
        if twice:
            raise ValueError(f"column {twice[0]!r} is named twice among user, item, timestamp, weight and context")
        taken = [name for name in self.context if name.casefold() in OURS]
        if taken:
            raise ValueError(f"context column {taken[0]!r} has the name of a column of the dataset: rename it")
        given = [name for name in ("valid_from", "test_from") if getattr(self, name) is not None]
        if self.split == "leave-last-out" and given:
            raise ValueError(f"{given[0]} is set, but split is leave-last-out: set split = time, or leave it out")
        if self.split == "time" and len(given) < 2:
            raise ValueError("split = time needs both valid_from and test_from, such as 2024-05-31")
        if self.split == "time" and not self.periods["valid"][0] < self.periods["test"][0]:
            raise ValueError(
                f"valid_from ({_utc(self.valid_from)}) is not before test_from ({_utc(self.test_from)}): swap them"
            )
        return self

    @property
    def kept(self) -> list[str]:
        """The columns of the events besides the ids, as the dataset calls them."""
        return ["timestamp", *(["weight"] if self.weight else []), *self.context]

    @property
    def periods(self) -> dict[str, tuple[int, int]]:
        """First second, and first one after; of split = time."""
        assert self.valid_from is not None and self.test_from is not None
        return {"valid": (self.valid_from, self.test_from), "test": (self.test_from, 2**63 - 1)}


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and users; returns the content of dataset.yaml."""
    scratch_dir = writer.scratch_dir()
    settings = {
        "memory_limit": f"{options.memory_gb}GB",
        "temp_directory": str(scratch_dir / "spilled"),
        "threads": max(1, min(len(os.sched_getaffinity(0)), int(8 * options.memory_gb))),  # each needs its share
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    with closing(duckdb.connect(scratch_dir / "events.duckdb", config=settings)) as database:  # type: ignore[arg-type]
        with explained("the files", options):
            fetch_rows(database, "SET enable_progress_bar = false")  # from a notebook, or python -c, it goes to stdout
            counts = _load(database, options)
            counts |= _drop(database, options)
            _check_periods(database, options)
            counts |= _write_sides(database, options, writer)
        counts |= _write_splits(database, options, writer)
    return writer.finish("events", options.model_dump(mode="json"), counts)


# What is kept


def _load(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the table `events`; DataError where a row cannot be one."""
    files = Files.find(database, options, "events")
    columns = {
        "user_id": files.id(options.user, "user"),
        "item_id": files.id(options.item, "item"),
        "timestamp": files.seconds(options.timestamp),
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
        (options.timestamp, "timestamp", f"{{}} > {LATEST_S}", unit),
    ]
    if options.weight:
        bad = "coalesce(NOT isfinite({0}) OR {0} < 0, true)"
        faults.append((options.weight, "weight", bad, "weights are finite and at least 0"))
    tests = ", ".join(f"count(*) FILTER ({fault.format(name)})" for _, name, fault, _ in faults)
    rows, *found = fetch_row(database, f"SELECT count(*), {tests} FROM events")
    if not rows:
        raise DataError(f"events = {options.events}: the files hold not one row.")
    for (column, name, fault, why), count in zip(faults, found, strict=True):
        if count:
            raise files.refuse(database, column, fault.format(columns[name]), count, why)
    return {"events_read": rows}


def _drop(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the view `kept`: the events without repeats and without rare users and items, as asked for."""
    (read,) = fetch_row(database, "SELECT count(*) FROM events")
    if options.dedupe:
        order = ", ".join(map(sql_name, options.kept))
        fetch_rows(
            database,
            "CREATE TABLE first_events AS SELECT * FROM events "
            f"QUALIFY row_number() OVER (PARTITION BY user_id, item_id ORDER BY {order}) = 1",
        )
        fetch_rows(database, "DROP TABLE events")
        fetch_rows(database, "ALTER TABLE first_events RENAME TO events")
    (distinct,) = fetch_row(database, "SELECT count(*) FROM events")
    is_core = options.min_user_events > 1 or options.min_item_events > 1
    if is_core:
        _find_core(database, options)
    both = "WHERE user_id IN (FROM core_users) AND item_id IN (FROM core_items)" if is_core else ""
    fetch_rows(database, f"CREATE VIEW kept AS SELECT * FROM events {both}")
    (interactions,) = fetch_row(database, "SELECT count(*) FROM kept")
    if not interactions:
        raise DataError(
            f"No event is left of {distinct:,}: no set of users with min_user_events = {options.min_user_events:,} "
            f"and items with min_item_events = {options.min_item_events:,} each exists: lower them."
        )
    (users,) = fetch_row(database, "SELECT count(DISTINCT user_id) FROM kept")
    dropped = {"repeats_dropped": read - distinct, "rare_dropped": distinct - interactions}
    return {"users": users, "interactions": interactions, **dropped}


def _find_core(database: duckdb.DuckDBPyConnection, options: Options) -> None:
    """Make the tables `core_users` and `core_items`: the largest sets with enough events among themselves."""
    sizes: tuple[int, ...] = ()
    among_core = ""
    while True:
        for side, other, at_least in (
            ("user", "item", options.min_user_events),
            ("item", "user", options.min_item_events),
        ):
            among = among_core if side == "user" else f"WHERE {other}_id IN (FROM core_{other}s)"
            fetch_rows(
                database,
                f"CREATE OR REPLACE TABLE core_{side}s AS SELECT {side}_id FROM events {among} "
                f"GROUP BY {side}_id HAVING count(*) >= {at_least}",
            )
        among_core = "WHERE item_id IN (FROM core_items)"
        before, sizes = sizes, fetch_row(database, "SELECT (SELECT count(*) FROM core_users), count(*) FROM core_items")
        if sizes == before:
            return


def _check_periods(database: duckdb.DuckDBPyConnection, options: Options) -> None:
    if options.split != "time":
        return
    first, last = fetch_row(database, "SELECT min(timestamp), max(timestamp) FROM kept")
    for split, (start, stop) in {"train": (0, options.periods["valid"][0]), **options.periods}.items():
        inside = f"timestamp >= {start} AND timestamp < {stop}"
        if not fetch_row(database, f"SELECT count(*) FROM kept WHERE {inside}")[0]:
            raise DataError(
                f"No event is in the {split} period: the events run from {_utc(first)} to {_utc(last)}, but valid_from "
                f"is {_utc(options.valid_from)} and test_from {_utc(options.test_from)}: move them."
            )


# The catalogue and the users


def _write_sides(database: duckdb.DuckDBPyConnection, options: Options, writer: DatasetWriter) -> dict[str, int]:
    """Write items/ and, where given, users/, in the order of their ids."""
    if options.items is None:
        fetch_rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
    else:
        _load_side(database, options, "items", options.item, "item")
    if options.users is not None:
        _load_side(database, options, "users", options.user, "user")
    for side, key in (("items", "item_id"), ("users", "user_id")):
        if side == "items" or options.users is not None:
            for batch in fetch_batches(database, f"SELECT * FROM {side} ORDER BY {key}", options):
                writer.write(side, pa.Table.from_batches([batch]))
    return {"items": fetch_row(database, "SELECT count(*) FROM items")[0]}


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


# The splits


def _write_splits(database: duckdb.DuckDBPyConnection, options: Options, writer: DatasetWriter) -> dict[str, int]:
    splits = Splits(options, writer)
    order = ["user_id", "timestamp", "item_id", *options.kept[1:]]  # all of them: no file's order shows
    query = f"SELECT user_id, item_id, {', '.join(map(sql_name, options.kept))} FROM kept ORDER BY "
    split: Callable[[Piece], None] = splits.time if options.split == "time" else splits.leave_last_out
    for table in whole_users(fetch_batches(database, query + ", ".join(map(sql_name, order)), options)):
        split(Piece(table))
    if not splits.rows["train"]:
        raise DataError(
            f"No train row is left: no event that is not held out has min_history = {options.min_history:,} earlier "
            "items of its user: lower it, or give more events."
        )
    for name in options.periods if options.split == "time" else ():
        if not splits.rows[name]:
            raise DataError(f"In the {name} period no user took an item for the first time: there is nothing to find.")
    return {"repeats_kept": splits.repeats_kept, "repeats_held_out": splits.repeats_held_out}


def _utc(second: int | None) -> str:
    assert second is not None
    return f"{datetime.datetime.fromtimestamp(second, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
