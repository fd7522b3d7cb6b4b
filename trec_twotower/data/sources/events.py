"""Source `events`: any log of interactions in Parquet, CSV or JSON, also larger than memory."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import duckdb

from trec_twotower.data.sources.event_logs.event_log import Fault, refuse_faults, write_log
from trec_twotower.data.sources.event_logs.log_options import ORDER
from trec_twotower.data.sources.event_logs.options import IN_FILES, Options
from trec_twotower.data.sources.tables.event_files import (
    LATEST_S,
    LATEST_US,
    Files,
    explained,
    fetch_row,
    fetch_rows,
    sql_name,
)
from trec_twotower.data.sources.tables.id_columns import as_id, id_column, joint_id_type
from trec_twotower.data.sources.tables.table_columns import (
    Column,
    NumberColumn,
    as_kind,
    check_names,
    feature_column,
    order_column,
)
from trec_twotower.data.sources.tables.table_files import TableFiles, open_table
from trec_twotower.data.sources.tables.table_options import TABLES, TableName
from trec_twotower.data.sources.tables.time_columns import TimeColumn
from trec_twotower.data.sources.tables.typed_tables import TypedTable, new_column, no_column, type_table
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import ConfigError, DataError

_RATING = "rating of the event"  # internal column
ROW_NUMBER = "row_number() OVER ()"


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write the parts of the split, items and users; return the content of dataset.yaml."""
    if options.split == "random" and "timestamp" not in options.model_fields_set and not _has_column(options, writer):
        options = options.model_copy(update={"timestamp": None})
    log = _Log(options)
    return write_log("events", options, writer, log.load_events, log.load_sides)


def _has_column(options: Options, writer: DatasetWriter) -> bool:
    """Return whether the events have a column of the default name of times."""
    with closing(duckdb.connect(writer.scratch_dir() / "columns.duckdb")) as database:
        return options.timestamp in open_table(database, options, "events").files.types


class _Log:
    """Tables of a log. All are opened and typed before the first is loaded, because they share id types."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tables: dict[TableName, TypedTable] = {}
        self.id_types: dict[str, str] = {}  # DuckDB type of the user ids and the item ids

    def load_events(self, database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        """Make the table `events` and return counts; DataError where a row cannot be an event."""
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
        time = table.typed[str(options.timestamp)].microseconds if options.has_times else "CAST(0 AS BIGINT)"
        columns = {"user_id": self._id("events", "user"), "item_id": self._id("events", "item"), "timestamp": time}
        columns |= {"weight": sql_name(options.weight)} if options.weight else {}
        columns |= {name: sql_name(name) for name in (*options.context, *options.outcomes)}
        order = _order(options)
        columns |= {ORDER: order} if order is not None else {}
        columns |= {_RATING: sql_name(options.rating)} if options.rating else {}
        selected = ", ".join(f"{expression} AS {sql_name(name)}" for name, expression in columns.items())
        condition = f", where = {options.where}" if options.where is not None else ""
        with explained(f"events = {options.events}{condition}", options):
            counts_rows = "true" if order == ROW_NUMBER else "false"  # true needs more memory
            fetch_rows(database, f"SET preserve_insertion_order = {counts_rows}")
            fetch_rows(
                database, f"CREATE TABLE events AS SELECT {selected} FROM {files.relation} WHERE ({files.where})"
            )
            fetch_rows(database, "SET preserve_insertion_order = false")
        if condition and not fetch_row(database, "SELECT count(*) FROM events")[0]:
            raise DataError(f"events = {options.events}: no row meets the condition where = {options.where}.")
        counts = {"events_read": refuse_faults(database, files, columns, self._faults(files))}
        return counts | (_drop_low_ratings(database, options) if options.rating else {})

    def _faults(self, files: Files) -> list[Fault]:
        """Return the faults that make an event row invalid."""
        options = self.options
        faults: list[Fault] = []
        for role, column in (("user", options.user), ("item", options.item)):
            name = column if column.isidentifier() else sql_name(column)
            is_null, others = "{} IS NULL", f"{name} IS NOT NULL"
            if self.id_types[role] == "VARCHAR":
                is_null, others = "{0} IS NULL OR {0} = ''", f"{name} <> ''"
            faults.append((column, f"{role}_id", is_null, f"remove these rows, or leave them out by where={others!r}"))
        if options.has_times:
            time = str(options.timestamp)
            unit = f"more than {LATEST_S:,} seconds, as if in milliseconds: set time_unit=ms, or divide"
            faults += [
                (time, "timestamp", "{} IS NULL", "remove these rows, or give them a time"),
                (time, "timestamp", "{} < 0", "times before 1970 are treated as mistakes: remove these rows"),
                (time, "timestamp", f"{{}} > {LATEST_US}", unit),
            ]
        if options.weight:
            bad = "coalesce(NOT isfinite({0}) OR {0} < 0, true)"
            faults.append((options.weight, "weight", bad, "weights are finite and at least 0"))
        if options.rating:
            faults.append((options.rating, _RATING, "coalesce(NOT isfinite({}), true)", "a rating is a finite number"))
        if options.order not in (None, IN_FILES):
            is_float = files.types[str(options.order)] in ("FLOAT", "DOUBLE")
            fault = "coalesce(isnan({}), true)" if is_float else "{} IS NULL"
            faults.append((str(options.order), ORDER, fault, "give each row a value, or order by another column"))
        return faults

    def _id(self, table: TableName, role: str) -> str:
        column = self.options.user if role == "user" else self.options.item
        return as_id(column, self.tables[table].typed[column], self.id_types[role])

    def load_sides(self, database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
        """Make the table `items` and, where given, `users`; return counts."""
        counts: dict[str, int] = {}
        if options.items is None:
            fetch_rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
        else:
            counts |= self._load_side(database, "items", options.item, "item", options.min_item_events == 1)
        if options.users is not None:
            counts |= self._load_side(database, "users", options.user, "user", options.min_user_events == 1)
        return counts

    def _load_side(
        self, database: duckdb.DuckDBPyConnection, side: TableName, column: str, role: str, keeps_idle: bool
    ) -> dict[str, int]:
        """Make the table `items` or `users`: a row for each id of the kept events, with nulls where the files lack it.

        Ids of the files that are in no event have a row where `keeps_idle`. DataError where ids are null or repeated,
        or where the files have none of the events' ids.
        """
        files, key, given = self.tables[side].files, f"{role}_id", f"given_{side}"
        where = f"{side} = {files.path}"
        expression = self._id(side, role)
        others = [name for name in files.types if name != column]
        existing = [name for name in others if name.casefold() == key]
        if existing:
            raise DataError(
                f"{where}: {column!r} is to become {key!r}, but there is a column {existing[0]!r} too: rename it."
            )
        features = "".join(f", {sql_name(name)}" for name in others)
        with explained(where, self.options):
            fetch_rows(
                database, f"CREATE TABLE {given} AS SELECT {expression} AS {key}{features} FROM {files.relation}"
            )
        _check_ids(database, files, column, key, expression, is_text=self.id_types[role] == "VARCHAR")

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
                f"{where}: none of the {num_kept:,} {side} of the events has a row there, {first!r} for one: check "
                f"that the events and this file write {role} ids in the same way."
            )
        if num_missing and self.options.missing_rows == "error":
            raise DataError(
                f"{where}: {num_missing:,} of the {num_kept:,} {side} of the events have no row there, the first of "
                f"them {first!r}: write a row for each {role}, or set missing_rows = keep, which gives them nulls."
            )
        ids = f"SELECT {key} FROM kept_{role}s" + (f" UNION ALL SELECT {key} {idle}" if keeps_idle else "")
        fetch_rows(database, f"CREATE TABLE {side} AS SELECT * FROM ({ids}) LEFT JOIN {given} USING ({key})")
        removed = num_dropped if keeps_idle else num_dropped + num_idle
        counts = {"without_row": num_missing, "without_events": num_idle if keeps_idle else 0, "removed": removed}
        return {f"{side}_{name}": count for name, count in counts.items()}


def _order(options: Options) -> str | None:
    """Return an SQL expression that orders events of equal time; None where nothing is known."""
    if options.order not in (None, IN_FILES):
        return sql_name(str(options.order))
    is_in_files = options.order == IN_FILES or (not options.has_times and options.split != "random")
    return ROW_NUMBER if is_in_files else None


def _check_ids(
    database: duckdb.DuckDBPyConnection, files: Files, column: str, key: str, expression: str, *, is_text: bool
) -> None:
    """Raise DataError if ids of the table given_items or given_users are null or repeated."""
    table = f"given_{files.option}"
    is_null = "{0} IS NULL OR {0} = ''" if is_text else "{} IS NULL"
    (nulls,) = fetch_row(database, f"SELECT count(*) FROM {table} WHERE {is_null.format(key)}")
    if nulls:
        raise files.refuse(database, column, is_null.format(expression), nulls, "remove these rows")
    repeated = f"SELECT {key} FROM {table} GROUP BY {key} HAVING count(*) > 1"
    count, first = fetch_row(database, f"SELECT count(*), min({key}) FROM ({repeated})")
    if count:
        raise DataError(
            f"{files.option} = {files.path}: {count:,} ids of {column!r} are in more than one row, the first of them "
            f"{first!r}: keep one row per id."
        )


def _event_columns(table: TableFiles, options: Options) -> list[Column]:
    """Return the event columns to read, each as the subclass that determines its type."""
    columns = {name: id_column(new_column(table, options, name, role)) for name, role in _ids(options)}
    if options.has_times:
        columns[str(options.timestamp)] = _time_column(table, options, str(options.timestamp))
    for name, role in ((options.weight, "weight"), (options.rating, "rating")):
        if name is not None and name not in columns:
            columns[name] = as_kind(new_column(table, options, name, role), NumberColumn)
    features = [(name, "context") for name in options.context] + [(name, "outcomes") for name in options.outcomes]
    for name, role in features:
        if name not in columns:
            columns[name] = feature_column(new_column(table, options, name, role, is_needed=False))
    if options.order not in (None, IN_FILES) and options.order not in columns:
        columns[str(options.order)] = order_column(new_column(table, options, str(options.order), "order"))
    if options.where is not None:
        used = options.where.casefold()
        for name in table.files.types:
            if name not in columns and name.casefold() in used:
                column = new_column(table, options, name, "where", is_needed=False)
                columns[name] = feature_column(column, is_noted=False)
    return list(columns.values())


def _ids(options: Options) -> tuple[tuple[str, str], tuple[str, str]]:
    return (options.user, "user"), (options.item, "item")


def _time_column(table: TableFiles, options: Options, name: str) -> Column:
    if name not in table.files.types:
        raise DataError(
            f"{no_column(table, name, 'timestamp')} For a log without times set split = position (rows are in order in "
            "the files), or split = random."
        )
    return as_kind(new_column(table, options, name, "timestamp"), TimeColumn)


def _side_columns(table: TableFiles, options: Options) -> list[Column]:
    """Return the id column and the feature columns of items or users."""
    column, role = (options.item, "item") if table.files.option == "items" else (options.user, "user")
    ids = id_column(new_column(table, options, column, role))
    others = [name for name in table.files.types if name != column]
    return [ids, *(feature_column(new_column(table, options, name, role, is_needed=False)) for name in others)]


def _drop_low_ratings(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Delete the events below `min_rating` from the table `events` and return their count."""
    assert options.min_rating is not None
    condition = f"{sql_name(_RATING)} < {options.min_rating!r}"
    low, rows = fetch_row(database, f"SELECT count(*) FILTER ({condition}), count(*) FROM events")
    if low == rows:
        raise ConfigError(f"min_rating = {options.min_rating:g}: none of {rows:,} ratings reaches it: lower it.")
    fetch_rows(database, f"DELETE FROM events WHERE {condition}")
    fetch_rows(database, f"ALTER TABLE events DROP COLUMN {sql_name(_RATING)}")
    return {"not_positive": low}
