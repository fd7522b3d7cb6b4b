"""Queries of DuckDB on the files that an option names, and its errors with file and line."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from trec_twotower.data.sources.event_logs.log_options import LogOptions
from trec_twotower.data.sources.tables.raw_text import (
    COPIES,
    broken_json_line,
    check_zipped,
    copy_path,
    damaged_zip,
    wrong_encoding,
)
from trec_twotower.errors import ConfigError, DataError, nearest

FILE_OF_ROW = "file of the row"  # column that DuckDB adds with the file name
_ROWS_PER_BATCH = 131_072
LATEST_S = 10**11  # the year 5138; larger values are in another unit
LATEST_US = LATEST_S * 1_000_000
_JSON_FAULT = re.compile(r"JSON .*?in file \"(.+?)\"")
_CSV_FAULT = re.compile(
    r"CSV Error on Line: (\d+)\n(?:Original Line:\s*(.*?)\n)?(.*?)\n\s*(?:Possible|file = )", re.DOTALL
)
_CSV_FILE = re.compile(r"^  file = (.+)$", re.MULTILINE)
_COPY = re.compile(rf"[^\s\"']*/{COPIES}(?=/)")  # before the path of the original


def row_place(path: str, row: int) -> str:
    """Return a description of a row's position; `row` counts from 0 within the file."""
    return f"row {row:,} (counted from 0)"


@dataclass(frozen=True)
class Files:
    """Files that an option names, as a DuckDB relation, and the type of each column.

    `where` is an SQL condition: rows that do not meet it are left out. `place` gives the line of a row.
    """

    option: str
    path: str
    relation: str
    types: dict[str, str]
    where: str = "true"
    place: Callable[[str, int], str] = row_place

    @classmethod
    def read(
        cls,
        database: duckdb.DuckDBPyConnection,
        options: LogOptions,
        option: str,
        path: str,
        paths: list[Path],
        reader: str,
        how: str,
    ) -> Files:
        """Return `paths`, which the option found as `path`, read by a DuckDB reader with the options `how`."""
        for file in paths:
            check_zipped(file)
        relation = f"{reader}([{duckdb_paths(paths)}], {how}, filename = {sql_text(FILE_OF_ROW)})"
        with explained(f"{option} = {path}", options):
            types = describe(database, relation)
        return cls(option, path, relation, types)

    def require(self, column: str, role: str) -> str:
        """Return the column's type. For an unknown column, DataError suggests the nearest name."""
        if column not in self.types:
            raise DataError(
                f"{self.option} = {self.path}: there is no column {column!r}{nearest(column, self.types)}: "
                f"set {role} = NAME."
            )
        return self.types[column]

    def refuse(self, database: duckdb.DuckDBPyConnection, column: str, fault: str, count: int, why: str) -> DataError:
        """Return the error for rows with a fault (an SQL condition): their number, and file and line of the first."""
        fetch_rows(database, "SET preserve_insertion_order = true")
        is_bad = f"({fault}) AND ({self.where})"
        # FILTER, because DuckDB skips row groups of Parquet by statistics that do not count NaN where it has a WHERE.
        first_file = f"min({sql_name(FILE_OF_ROW)}) FILTER ({is_bad})"
        (path,) = fetch_row(database, f"SELECT {first_file} FROM {self.relation}")
        row, value = fetch_row(
            database,
            f"SELECT row, value FROM (SELECT row_number() OVER () - 1 AS row, CAST({sql_name(column)} AS VARCHAR) AS "
            f"value, {is_bad} AS is_bad FROM {self.relation} WHERE {sql_name(FILE_OF_ROW)} = {sql_text(path)}) "
            "WHERE is_bad ORDER BY row LIMIT 1",
        )
        found = "null" if value is None else value if value.strip() else repr(value)
        return DataError(
            f"{path}, {self.place(path, row)}: {column!r} is {found}, the first of {count:,} such rows: {why}."
        )


# DuckDB


def fetch_batches(database: duckdb.DuckDBPyConnection, query: str, options: LogOptions) -> Iterator[pa.RecordBatch]:
    with explained("the sorted rows", options):
        reader = _do(database, lambda: database.sql(query).to_arrow_reader(_ROWS_PER_BATCH))
    while True:
        with explained("the sorted rows", options):
            batch = _do(database, lambda: next(reader, None))
        if batch is None:
            return
        if len(batch):
            yield batch


@contextmanager
def explained(what: str, options: LogOptions) -> Iterator[None]:
    """Convert errors of DuckDB to ConfigError or DataError with its message."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        explanation = _explanation(what, str(error), options)
        raise type(explanation)(_COPY.sub("", str(explanation))) from None


def _explanation(what: str, message: str, options: LogOptions) -> ConfigError | DataError:
    """Return the error for a message of DuckDB, with its file and line, and how to fix it."""
    summary = "; ".join(line.strip() for line in message.splitlines()[:3] if line.strip())
    file = _CSV_FILE.search(message)
    if (broken := _JSON_FAULT.search(summary)) is not None:
        return broken_json_line(Path(broken[1]), summary)
    if (zipped := re.search(r"end of GZIP stream: (.+)|ZSTD.*?: (.+)", summary)) is not None:
        return damaged_zip((zipped[1] or zipped[2]).split(";")[0], "it ends too early")
    if "Out of Memory" in summary:
        return ConfigError(f"memory_gb = {options.memory_gb:g} is too little here: raise it. ({summary})")
    if file is not None and ("Invalid unicode" in message or "not utf-8" in message):
        return wrong_encoding(Path(file[1]), "utf-8", has_option="encoding" in type(options).model_fields)
    if (fault := _CSV_FAULT.search(message)) is not None and file is not None:
        return _csv_fault(file[1], *fault.groups(), has_options="separator" in type(options).model_fields)
    at = f"{what}, file {file[1]}" if file is not None else what
    return DataError(f"{at}: DuckDB cannot read it: {summary}")


def _csv_fault(file: str, line: str, text: str | None, why: str, *, has_options: bool) -> DataError:
    """Return the error for a CSV line with too few or too many columns, an open quote, or too many bytes."""
    columns = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", why)
    if columns is not None:
        why = f"{columns[2]} columns where the first line has {columns[1]}"
        option = "or set separator= if the columns are separated by something else"
    elif "quote" in why:
        why = "a quoted value does not end where a column ends"
        option = "or set quote=none if quotes are plain characters in these files"
    else:
        option, why = "or take it out", why.splitlines()[-1].strip()
    fix = f"fix the line, {option if has_options else 'or take it out'}"
    shown = f" {text[:60]!r}" if text else ""
    return DataError(f"{file}, line {int(line):,}:{shown}: {why}: {fix}.")


def _do(database: duckdb.DuckDBPyConnection, action: Callable[[], Any]) -> Any:
    """Return the result of `action`. It runs in a thread, so that Ctrl-C need not wait for the end of a scan."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(action)
        try:
            return answer.result()
        except KeyboardInterrupt:
            database.interrupt()
            raise


def configure(database: duckdb.DuckDBPyConnection) -> None:
    """Set the DuckDB options that reading relies on, overriding the machine's settings."""
    for setting in (
        "TimeZone = 'UTC'",  # applies to times without a zone
        "disabled_optimizers = 'statistics_propagation'",  # DuckDB assumes that TRY_CAST of a number is never null
    ):
        fetch_rows(database, f"SET {setting}")
    # The progress bar goes to stdout in notebooks and under `python -c`. DuckDB turns it off itself, and refuses to set
    # it, in a notebook without ipywidgets.
    if fetch_rows(database, "SELECT current_setting('enable_progress_bar')") == [(True,)]:
        fetch_rows(database, "SET enable_progress_bar = false")


def fetch_rows(database: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    """Return all rows: an unread result would block the connection for the next query."""
    return _do(database, lambda: database.execute(query).fetchall())


def fetch_row(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    (row,) = fetch_rows(database, query)
    return row


def describe(database: duckdb.DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Return the DuckDB type of each column of a relation except FILE_OF_ROW."""
    described = fetch_rows(database, f"DESCRIBE SELECT * FROM {relation}")
    return {name: kind for name, kind, *_ in described if name != FILE_OF_ROW}


def scratch_dir_of(database: duckdb.DuckDBPyConnection) -> Path:
    """Return the folder of the database file, which is removed at the end."""
    (path,) = fetch_row(database, "SELECT path FROM duckdb_databases() WHERE database_name = current_database()")
    return Path(path).parent


def duckdb_paths(paths: list[Path]) -> str:
    """Return the paths as an SQL list, with glob characters escaped."""
    return ", ".join(sql_text(glob.escape(str(path))) for path in paths)


def original_names(path: Path, scratch_dir: Path) -> str:
    """Return the SELECT list that replaces the path of a copy by its original. `path` is any original."""
    file = sql_name(FILE_OF_ROW)
    return f"* REPLACE (substr({file}, {len(str(copy_path(path, scratch_dir))) - len(str(path)) + 1}) AS {file})"


def to_microseconds(time: str, factor: int) -> str:
    """Return an SQL expression: the whole number `time`, whose unit is `factor` microseconds, in microseconds.

    Times before 1970 become a negative number, those after LATEST_US a larger one: nothing overflows.
    """
    too_late = LATEST_US // factor + 1_000_000  # far enough above LATEST_US to differ as a double
    clamped = f"CAST(least(greatest({time}, -1), {too_late}) AS BIGINT)"
    return f"CASE WHEN {time} IS NOT NULL THEN {clamped} * {factor} END"


def sql_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
