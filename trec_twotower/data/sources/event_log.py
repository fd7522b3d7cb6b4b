"""A log of interactions, in DuckDB's tables, becomes a dataset: what is dropped, what is held out, what came before.

A source makes the table `events` (user_id, item_id, timestamp in whole seconds, and columns to keep); here repeats and
rare users and items are dropped, which leaves the view `kept`; for its users and items the source makes the tables
`items` and, where there is something to say of them, `users`; the sorted events become train, valid and test.

DuckDB sorts on disk, spilling beyond `memory_gb`. The sorted rows come back in batches that are cut between users, so
that the past of an event is a range of rows, found with a few numpy passes. Memory holds a row group of each part, and
all events of one user.

DuckDB can make the histories itself, but slower. 2 million events of 120,000 users, sorted, with histories of 50, on
two cores: 2 s here; 11 s by `list(item_id) OVER (... RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)`, which is
exact but grows with the square of a user's events (1,000 users: 1 s against 41 s); 5 s by `ROWS BETWEEN 50 PRECEDING
AND 1 PRECEDING`, which does not grow so, but takes in events of the same second.

Two events of one second are not in each other's history: nobody knows which came first. Times without a zone are UTC.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Annotated, Any, Literal, Self

import duckdb
import pyarrow as pa
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from trec_twotower.data.sources.event_files import (
    Files,
    configure,
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


class LogOptions(SourceOptions):
    """What is dropped, and what is held out."""

    max_history: PositiveInt = 50  # newest items kept in a train row; valid and test rows keep all
    min_history: int = Field(0, ge=0)  # train rows with fewer earlier items are left out
    rows: Literal["event", "both"] = "event"  # both: also train_users/, a row per user, for data.rows: user
    split: Literal["leave-last-out", "time"] = "leave-last-out"
    valid_from: Moment | None = None  # split = time: seconds, or a date such as 2024-05-31
    test_from: Moment | None = None
    min_user_events: PositiveInt = 1  # with min_item_events: users and items with fewer go, until none has fewer
    min_item_events: PositiveInt = 1
    dedupe: bool = False  # keep only the first event of the same user and item
    memory_gb: float = Field(4.0, ge=0.1)  # what DuckDB may use before it spills to disk

    @model_validator(mode="after")
    def _split_fits(self) -> Self:
        given = [name for name in ("valid_from", "test_from") if name in self.model_fields_set]
        given = [name for name in given if getattr(self, name) is not None]
        if self.split == "leave-last-out" and given:
            raise ValueError(f"{given[0]} is set, but split is leave-last-out: set split = time, or leave it out")
        if self.split == "time" and (self.valid_from is None or self.test_from is None):
            raise ValueError("split = time needs both valid_from and test_from, such as 2024-05-31")
        if self.split == "time" and not self.periods["valid"][0] < self.periods["test"][0]:
            raise ValueError(
                f"valid_from ({utc(self.valid_from)}) is not before test_from ({utc(self.test_from)}): swap them"
            )
        return self

    @property
    def kept(self) -> list[str]:
        """The columns of the events besides the ids, as the dataset calls them; `timestamp` first."""
        return ["timestamp"]

    @property
    def asked(self) -> list[str]:
        """Those of them that valid and test rows of leave-last-out have."""
        return ["timestamp"]

    @property
    def shows_times(self) -> bool:
        """Whether `timestamp` is one, and not merely a place in an order."""
        return True

    @property
    def periods(self) -> dict[str, tuple[int, int]]:
        """First second, and first one after; of split = time."""
        assert self.valid_from is not None and self.test_from is not None
        return {"valid": (self.valid_from, self.test_from), "test": (self.test_from, 2**63 - 1)}


Load = Callable[[duckdb.DuckDBPyConnection, Any], dict[str, int]]


def write_log(
    source: str, options: LogOptions, writer: DatasetWriter, load_events: Load, load_sides: Load
) -> dict[str, Any]:
    """Write train, valid, test, items and users of a log; returns the content of dataset.yaml.

    `load_events` makes the table `events`, `load_sides` later `items` and perhaps `users`; both return counts.
    """
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
            configure(database)
            counts = load_events(database, options)
            counts |= _drop(database, options)
            _check_periods(database, options)
            counts |= load_sides(database, options)
            counts |= _write_sides(database, options, writer)
        counts |= _write_splits(database, options, writer)
    return writer.finish(source, options.model_dump(mode="json"), counts)


Fault = tuple[str, str, str, str]  # a column of the file, what it became, a condition with {} for it, and the mend


def refuse_faults(
    database: duckdb.DuckDBPyConnection, files: Files, columns: dict[str, str], faults: Sequence[Fault]
) -> int:
    """How many rows the table `events` has; DataError where it has none, or where rows have faults: the first of each.

    `columns` has the expression that each column of `events` was made by.
    """
    tests = ", ".join(f"count(*) FILTER ({fault.format(sql_name(name))})" for _, name, fault, _ in faults)
    rows, *found = fetch_row(database, f"SELECT count(*), {tests} FROM events")
    if not rows:
        raise DataError(f"{files.option} = {files.path}: the files hold not one row.")
    refused = [
        str(files.refuse(database, column, fault.format(columns[name]), count, why))
        for (column, name, fault, why), count in zip(faults, found, strict=True)
        if count
    ]
    if refused:
        raise DataError("\n  ".join(refused))
    return rows


def _drop(database: duckdb.DuckDBPyConnection, options: LogOptions) -> dict[str, int]:
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


def _find_core(database: duckdb.DuckDBPyConnection, options: LogOptions) -> None:
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


def _check_periods(database: duckdb.DuckDBPyConnection, options: LogOptions) -> None:
    if options.split != "time":
        return
    first, last = fetch_row(database, "SELECT min(timestamp), max(timestamp) FROM kept")
    for split, (start, stop) in {"train": (0, options.periods["valid"][0]), **options.periods}.items():
        inside = f"timestamp >= {start} AND timestamp < {stop}"
        if not fetch_row(database, f"SELECT count(*) FROM kept WHERE {inside}")[0]:
            raise DataError(
                f"No event is in the {split} period: the events run from {utc(first)} to {utc(last)}, but valid_from "
                f"is {utc(options.valid_from)} and test_from {utc(options.test_from)}: move them."
            )


def _write_sides(database: duckdb.DuckDBPyConnection, options: LogOptions, writer: DatasetWriter) -> dict[str, int]:
    """Write items/ and, where there is such a table, users/, in the order of their ids."""
    tables = {name for (name,) in fetch_rows(database, "SELECT table_name FROM duckdb_tables()")}
    for side, key in (("items", "item_id"), ("users", "user_id")):
        if side in tables:
            for batch in fetch_batches(database, f"SELECT * FROM {side} ORDER BY {key}", options):
                writer.write(side, pa.Table.from_batches([batch]))
    return {"items": fetch_row(database, "SELECT count(*) FROM items")[0]}


def _write_splits(database: duckdb.DuckDBPyConnection, options: LogOptions, writer: DatasetWriter) -> dict[str, int]:
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


def utc(second: int | None) -> str:
    assert second is not None
    return f"{datetime.datetime.fromtimestamp(second, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
