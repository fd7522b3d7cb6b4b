"""Convert a log of interactions, stored in DuckDB tables, into a dataset.

A source makes the table `events` (user_id, item_id, timestamp in microseconds, and columns to keep). Here repeats and
rare users and items are dropped, which leaves the view `kept`. For its users and items the source makes the tables
`items` and, where it has features of users, `users`. The sorted events become the rows of the split.

DuckDB sorts on disk, spilling beyond `memory_gb`. The sorted rows come back in batches that are cut between users, so
that the events before an event are a range of rows, found with a few numpy passes. Memory holds a row group of each
part, and all events of one user.

DuckDB can make the histories itself, but slower. 2 million events of 120,000 users, sorted, with histories of 50, on
two cores: 2 s here; 11 s by `list(item_id) OVER (... RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)`, which is
exact but grows with the square of a user's events (1,000 users: 1 s against 41 s); 5 s by `ROWS BETWEEN 50 PRECEDING
AND 1 PRECEDING`, which does not grow so, but includes events of the same time.

Two events of one instant are not in each other's history: their order is unknown. Times without a zone are UTC.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import duckdb
import pyarrow as pa

from trec_twotower.data.sources.event_logs.log_options import LogOptions, utc
from trec_twotower.data.sources.event_logs.splits import Piece, Splits, break_ties, whole_users
from trec_twotower.data.sources.tables.event_files import (
    Files,
    configure,
    explained,
    fetch_batches,
    fetch_row,
    fetch_rows,
    sql_name,
)
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError

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
        "threads": max(1, min(len(os.sched_getaffinity(0)), int(8 * options.memory_gb))),  # each needs memory
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


Fault = tuple[str, str, str, str]  # column of the file, column of `events`, SQL condition ({}: column), fix


def refuse_faults(
    database: duckdb.DuckDBPyConnection, files: Files, columns: dict[str, str], faults: Sequence[Fault]
) -> int:
    """Return the row count of the table `events`. Raise DataError if it is empty or has invalid rows.

    `columns` maps each column of `events` to its SQL expression. The error names the first row of each fault.
    """
    tests = ", ".join(f"count(*) FILTER ({fault.format(sql_name(name))})" for _, name, fault, _ in faults)
    rows, *found = fetch_row(database, f"SELECT count(*), {tests} FROM events")
    if not rows:
        raise DataError(f"{files.option} = {files.path}: the files have no rows.")
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
        order = ", ".join(map(sql_name, ["timestamp", *options.order_columns, *_others(options)]))
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
                f"No event is in the {split} period: the events run from {utc(first // 1_000_000)} to "
                f"{utc(last // 1_000_000)}, but valid_from is {utc(options.valid_from)} and test_from "
                f"{utc(options.test_from)}: move them."
            )


def _write_sides(database: duckdb.DuckDBPyConnection, options: LogOptions, writer: DatasetWriter) -> dict[str, int]:
    """Write items/ and, where there is such a table, users/, in the order of their ids."""
    tables = {name for (name,) in fetch_rows(database, "SELECT table_name FROM duckdb_tables()")}
    for side, key in (("items", "item_id"), ("users", "user_id")):
        if side in tables:
            for batch in fetch_batches(database, f"SELECT * FROM {side} ORDER BY {key}", options):
                writer.write(side, pa.Table.from_batches([batch]))
    return {"items": fetch_row(database, "SELECT count(*) FROM items")[0]}


def _others(options: LogOptions) -> list[str]:
    """Return the last sort columns, which make the result independent of the order of the files."""
    return list(dict.fromkeys([*options.kept[1:], *options.outcome_columns]))


def _write_splits(database: duckdb.DuckDBPyConnection, options: LogOptions, writer: DatasetWriter) -> dict[str, int]:
    splits = Splits(options, writer)
    columns = ", ".join(
        map(sql_name, dict.fromkeys(["user_id", "item_id", "timestamp", *options.order_columns, *_others(options)]))
    )
    order = ["user_id", "timestamp", *options.order_columns, "item_id", *_others(options)]
    query = f"SELECT {columns} FROM kept ORDER BY {', '.join(map(sql_name, order))}"
    for table in whole_users(fetch_batches(database, query, options)):
        if options.tie_seed is not None:
            table = break_ties(table, options.tie_seed, is_order=options.draws_order)
        splits.write(Piece(table))
    if not splits.rows["train"]:
        raise DataError(
            f"No train row is left: no event that is not held out has min_history = {options.min_history:,} earlier "
            "items of its user: lower it, or give more events."
        )
    for name in options.periods if options.split == "time" else ():
        if not splits.rows[name]:
            raise DataError(
                f"In the {name} period no user has an event with a new item: there is nothing to find. Move "
                "valid_from and test_from, or set hold_out = any."
            )
    return dict(splits.counts)
