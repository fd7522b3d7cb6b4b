"""Any log of interactions, from Parquet, CSV or JSON lines, larger than memory: each event with what came before it."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import Any, Literal, Self

import duckdb
from pydantic import Field, model_validator

from trec_twotower.data.sources.event_files import (
    LATEST_S,
    LATEST_US,
    Files,
    explained,
    fetch_row,
    fetch_rows,
    sql_name,
)
from trec_twotower.data.sources.event_log import LogOptions, refuse_faults, write_log
from trec_twotower.data.sources.event_splits import ORDER
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import DataError, nearest

OURS = ("user_id", "item_id", "timestamp", "weight", "positives", "history")
IN_FILES = "file"  # order = file: the order of rows in the files
ROW_NUMBER = "row_number() OVER ()"


class Options(LogOptions):
    """Which files hold the log, what their columns are, and how it is split."""

    events: str = Field(min_length=1)  # a file, a folder or a glob of Parquet, CSV or JSON lines
    items: str | None = None  # the catalogue, given likewise; by default the distinct items of the events
    users: str | None = None  # static features of users, given likewise
    user: str = "user_id"  # the column of that name in the events and in `users`
    item: str = "item_id"  # and in `items`
    timestamp: str | None = "timestamp"  # seconds since 1970, or TIMESTAMP; null: the log has no times
    order: str | None = None  # a column that orders events of equal time; file: the order of rows in the files
    weight: str | None = None  # becomes the column `weight` of the train rows
    context: tuple[str, ...] = ()  # further columns of the events to keep, known before the item is chosen
    outcomes: tuple[str, ...] = ()  # columns known only after it: rows have them of earlier events, as history_NAME
    valid_share: float = Field(0.1, ge=0, lt=1)  # split = random: of each user's items
    test_share: float = Field(0.1, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63)  # of split = random, and of the order of events whose order is unknown
    missing_rows: Literal["keep", "error"] = "keep"  # of users and items that `users` and `items` have no row for

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        columns = [self.user, self.item, *([self.timestamp] if self.timestamp and self.has_times else [])]
        columns += [*([self.weight] if self.weight and self.weight not in self.outcomes else []), *self.context]
        twice = [name for name, count in Counter(map(str.casefold, [*columns, *self.outcomes])).items() if count > 1]
        if twice:
            raise ValueError(
                f"column {twice[0]!r} is named twice among user, item, timestamp, weight, context and outcomes"
            )
        histories = [f"history_{name}".casefold() for name in self.outcomes]
        taken = [name for name in self.context if name.casefold() in (*OURS, *histories)]
        if taken:
            raise ValueError(f"context column {taken[0]!r} has the name of a column of the dataset: rename it")
        return self

    @model_validator(mode="after")
    def _order_fits(self) -> Self:
        if self.timestamp is None and self.split not in ("position", "random", "none"):
            raise ValueError(
                f"timestamp is null, but split = {self.split} needs times: name the column, or set split = position "
                "(rows are in order in the files) or split = random"
            )
        if self.split == "position" and self.timestamp not in (None, "timestamp"):
            raise ValueError(
                f"timestamp = {self.timestamp!r} is set, but split = position reads no times: leave timestamp out, or "
                "use split = leave-last-out with order = file"
            )
        if self.split == "last-basket" and self.order is not None:
            raise ValueError(
                f"order = {self.order} is set, but split = last-basket holds out all items of one time: leave order "
                "out, or use split = leave-last-out"
            )
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        given = [name for name in ("valid_share", "test_share") if getattr(self, name) != 0.1]
        if self.split != "random" and given:
            raise ValueError(f"{given[0]} is set, but split is {self.split}: set split = random, or leave it out")
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                f"valid_share + test_share = {self.valid_share + self.test_share:g} leaves nothing to train on: they "
                "must be below 1 together"
            )
        if self.split == "random" and not self.valid_share + self.test_share:
            raise ValueError("valid_share and test_share are 0, so nothing is held out: set split = none for that")
        return self

    @property
    def kept(self) -> list[str]:
        return ["timestamp", *(["weight"] if self.weight else []), *self.context]

    @property
    def asked(self) -> list[str]:
        return ["timestamp", *self.context]

    @property
    def outcome_columns(self) -> list[str]:
        return list(self.outcomes)

    @property
    def has_times(self) -> bool:
        return self.timestamp is not None and self.split != "position"

    @property
    def order_columns(self) -> list[str]:
        return [ORDER] if self.order is not None or not (self.has_times or self.draws_order) else []

    @property
    def tie_seed(self) -> int | None:
        return self.seed

    @property
    def draws_order(self) -> bool:
        return self.split == "random" and self.order is None and not self.has_times

    @property
    def shares(self) -> tuple[float, float]:
        return self.valid_share, self.test_share


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write the parts of the split, items and users; return the content of dataset.yaml."""
    if options.split == "random" and "timestamp" not in options.model_fields_set and not _has_column(options):
        options = options.model_copy(update={"timestamp": None})
    return write_log("events", options, writer, _load_events, _load_sides)


def _has_column(options: Options) -> bool:
    """Return whether the events have a column of the default name of times."""
    with closing(duckdb.connect()) as database:
        return options.timestamp in Files.find(database, options, "events").types


def _load_events(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the table `events`; DataError where a row cannot be one."""
    files = Files.find(database, options, "events")
    columns = {
        "user_id": files.id(options.user, "user"),
        "item_id": files.id(options.item, "item"),
        "timestamp": _time(files, options),
    }
    if options.weight:
        columns["weight"] = files.number(options.weight)
    columns |= {name: files.feature(name, "context") for name in options.context}
    columns |= {name: files.feature(name, "outcomes") for name in options.outcomes}
    order = _order(files, options)
    columns |= {ORDER: order} if order is not None else {}
    selected = ", ".join(f"{expression} AS {sql_name(name)}" for name, expression in columns.items())
    with explained(f"events = {options.events}", options):
        counts_rows = "true" if order == ROW_NUMBER else "false"  # which keeps more in memory
        fetch_rows(database, f"SET preserve_insertion_order = {counts_rows}")
        fetch_rows(database, f"CREATE TABLE events AS SELECT {selected} FROM {files.relation}")
        fetch_rows(database, "SET preserve_insertion_order = false")

    unit = f"more than {LATEST_S:,} seconds, as if in milliseconds: divide, so that it counts seconds"
    faults = [
        (options.user, "user_id", "{} IS NULL", "remove these rows"),
        (options.item, "item_id", "{} IS NULL", "remove these rows"),
    ]
    if options.has_times:
        time = str(options.timestamp)
        faults += [
            (time, "timestamp", "{} IS NULL", "remove these rows, or give them a time"),
            (time, "timestamp", "{} < 0", "times before 1970 are taken for mistakes: remove these rows"),
            (time, "timestamp", f"{{}} > {LATEST_US}", unit),
        ]
    if options.weight:
        bad = "coalesce(NOT isfinite({0}) OR {0} < 0, true)"
        faults.append((options.weight, "weight", bad, "weights are finite and at least 0"))
    if options.order not in (None, IN_FILES):
        is_float = files.types[str(options.order)] in ("FLOAT", "DOUBLE")
        fault = "coalesce(isnan({}), true)" if is_float else "{} IS NULL"
        faults.append((str(options.order), ORDER, fault, "give each row a value, or order by another column"))
    return {"events_read": refuse_faults(database, files, columns, faults)}


def _time(files: Files, options: Options) -> str:
    """Return an SQL expression: the time of an event in microseconds, 0 where the log has none."""
    if not options.has_times:
        return "CAST(0 AS BIGINT)"
    column = str(options.timestamp)
    if column not in files.types:
        raise DataError(
            f"{files.option} = {files.path}: there is no column {column!r}{nearest(column, files.types)}: say "
            "timestamp = NAME. For a log without times set split = position (rows are in order in the files), or "
            "split = random."
        )
    return files.microseconds(column)


def _order(files: Files, options: Options) -> str | None:
    """Return an SQL expression that orders events of equal time; None where nothing is known."""
    if options.order not in (None, IN_FILES):
        return files.sortable(str(options.order), "order")
    is_in_files = options.order == IN_FILES or (not options.has_times and options.split != "random")
    return ROW_NUMBER if is_in_files else None


def _load_sides(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the table `items` and, where given, `users`; return counts."""
    counts: dict[str, int] = {}
    if options.items is None:
        fetch_rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
    else:
        counts |= _load_side(database, options, "items", options.item, "item", options.min_item_events == 1)
    if options.users is not None:
        counts |= _load_side(database, options, "users", options.user, "user", options.min_user_events == 1)
    return counts


def _load_side(
    database: duckdb.DuckDBPyConnection, options: Options, side: str, column: str, role: str, keeps_idle: bool
) -> dict[str, int]:
    """Make the table `items` or `users`: a row for each id of the kept events, with nulls where the files have none.

    Ids of the files that are in no event have a row where `keeps_idle`. DataError where ids are null or repeated, or
    where the files have none of the events' ids.
    """
    files, key, given = Files.find(database, options, side), f"{role}_id", f"given_{side}"
    where = f"{side} = {files.path}"
    expression = files.id(column, role)
    others = [name for name in files.types if name != column]
    taken = [name for name in others if name.casefold() == key]
    if taken:
        raise DataError(f"{where}: {column!r} is to become {key!r}, but there is a column {taken[0]!r} too: rename it.")
    features = "".join(f", {files.feature(name, role)} AS {sql_name(name)}" for name in others)
    with explained(where, options):
        fetch_rows(database, f"CREATE TABLE {given} AS SELECT {expression} AS {key}{features} FROM {files.relation}")
    _check_ids(database, files, column, key, given)

    fetch_rows(database, f"CREATE TABLE kept_{role}s AS SELECT DISTINCT {key} FROM kept")
    idle = f"FROM {given} ANTI JOIN events USING ({key})"
    dropped = f"FROM {given} SEMI JOIN events USING ({key}) ANTI JOIN kept_{role}s USING ({key})"
    missing = f"FROM kept_{role}s ANTI JOIN {given} USING ({key})"
    num_kept, num_idle, num_dropped, num_missing, first = fetch_row(
        database,
        f"SELECT (SELECT count(*) FROM kept_{role}s), (SELECT count(*) {idle}), (SELECT count(*) {dropped}), "
        f"(SELECT count(*) {missing}), (SELECT min({key}) {missing})",
    )
    if num_missing == num_kept:
        raise DataError(
            f"{where}: none of the {num_kept:,} {side} of the events has a row there, {first!r} for one: check that "
            f"the events and this file write {role} ids in the same way."
        )
    if num_missing and options.missing_rows == "error":
        raise DataError(
            f"{where}: {num_missing:,} of the {num_kept:,} {side} of the events have no row there, the first of them "
            f"{first!r}: write a row for each {role}, or set missing_rows = keep, which gives them nulls."
        )
    ids = f"SELECT {key} FROM kept_{role}s" + (f" UNION ALL SELECT {key} {idle}" if keeps_idle else "")
    fetch_rows(database, f"CREATE TABLE {side} AS SELECT * FROM ({ids}) LEFT JOIN {given} USING ({key})")
    removed = num_dropped if keeps_idle else num_dropped + num_idle
    counts = {"without_row": num_missing, "without_events": num_idle if keeps_idle else 0, "removed": removed}
    return {f"{side}_{name}": count for name, count in counts.items()}


def _check_ids(database: duckdb.DuckDBPyConnection, files: Files, column: str, key: str, table: str) -> None:
    """DataError where the ids of a table have another type than in the events, are null, or are repeated."""
    where = f"{files.option} = {files.path}"
    kind, wanted = (
        fetch_row(database, f"SELECT column_type FROM (DESCRIBE {each}) WHERE column_name = '{key}'")[0]
        for each in (table, "events")
    )
    if kind != wanted:
        raise DataError(
            f"{where}: {column!r} is {files.types[column]}, but the events hold {wanted}: write both with one type."
        )
    (nulls,) = fetch_row(database, f"SELECT count(*) FROM {table} WHERE {key} IS NULL")
    if nulls:
        expression = files.id(column, key.removesuffix("_id"))
        raise files.refuse(database, column, f"{expression} IS NULL", nulls, "remove these rows")
    repeated = f"SELECT {key} FROM {table} GROUP BY {key} HAVING count(*) > 1"
    count, first = fetch_row(database, f"SELECT count(*), min({key}) FROM ({repeated})")
    if count:
        raise DataError(
            f"{where}: {count:,} ids of {column!r} stand in more than one row, the first of them {first!r}: keep one "
            "row an id."
        )
