"""Tables with typed columns. One scan of all rows infers the types; DuckDB then converts the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import duckdb

from trec_twotower.data.sources.tables.event_files import (
    FILE_OF_ROW,
    Files,
    explained,
    fetch_row,
    fetch_rows,
    sql_name,
)
from trec_twotower.data.sources.tables.table_columns import Column, Rows, Typed, note
from trec_twotower.data.sources.tables.table_files import TableFiles
from trec_twotower.data.sources.tables.table_options import TableOptions
from trec_twotower.errors import ConfigError, DataError, nearest

_COLUMNS_PER_SCAN = 100  # DuckDB is slow at planning many aggregates
_LINE_BREAKS = "line breaks\n"  # key next to column names, which have no line break


@dataclass(frozen=True)
class TypedTable:
    """Relation `files` of all columns, converted as in `typed` and filtered by the condition `where`."""

    files: Files
    typed: dict[str, Typed]


def new_column(opened: TableFiles, options: TableOptions, name: str, role: str, *, is_needed: bool = True) -> Column:
    """Return a column of the files. Raise DataError if no file has it, or if `is_needed` and a file lacks it."""
    files = opened.files
    where = f"{files.option} = {files.path}"
    if name not in files.types:
        raise no_column(opened, name, role)
    if lacking := opened.lacking.get(name):
        if is_needed:
            others = f" ({len(lacking):,} files lack it)" if len(lacking) > 1 else ""
            raise DataError(
                f"{lacking[0]}: there is no column {name!r}, which other files of {files.path} have{others}."
            )
        note(f"{where}: column {name!r} is not in {len(lacking):,} of {len(opened.paths):,} files: null in their rows.")
    if name in opened.conflicts and name not in options.types:
        raise DataError(
            f"{where}: column {name!r} is {opened.conflicts[name]}: write it with one type, or declare the "
            f"one to read it with, such as types.{name}=text."
        )
    if name in opened.mixed and name not in options.types:
        note(f"{where}: values of {name!r} are of several types of JSON, such as text and numbers: read as text.")
    return Column(name, files.types[name], where, options, role, name in opened.undeclared)


def no_column(opened: TableFiles, name: str, role: str) -> DataError:
    """Return the error for a column that the files do not have."""
    files = opened.files
    hint = ""
    if opened.csv is not None and not opened.csv.layout.columns:
        first = ", ".join(list(files.types)[:8])
        hint = f" (The first line is read as the names {first}: if it holds values, name the columns by columns=[...].)"
    where = f"{files.option} = {files.path}"
    return DataError(f"{where}: there is no column {name!r}{nearest(name, files.types)}: set {role} = NAME.{hint}")


def type_table(
    database: duckdb.DuckDBPyConnection, options: TableOptions, opened: TableFiles, columns: Sequence[Column]
) -> TypedTable:
    """Infer the types of `columns` from a scan of all rows. DataError names the first invalid row."""
    found: dict[str, dict[str, Any]] = {}
    asked = {column.name: aggregates for column in columns if (aggregates := column.aggregates())}
    asked |= _line_breaks(opened, options)
    spelled = [column for column in columns if column.spelling is not None]
    with explained(f"{opened.files.option} = {opened.files.path}", options):
        while names := [name for name in asked if name not in found][:_COLUMNS_PER_SCAN]:
            selected = ", ".join(aggregate for name in names for aggregate in asked[name].values())
            made = [f"{column.spelling} AS {column.spelling_name}" for column in spelled if column.name in names]
            rows = f"(SELECT {', '.join(['*', *made])} FROM {opened.files.relation})"
            try:
                values = iter(fetch_row(database, f"SELECT {selected} FROM {rows}"))
                found |= {name: {key: next(values) for key in asked[name]} for name in names}
            except duckdb.Error as error:
                opened = opened.after(database, error)
    files = opened.files
    if _LINE_BREAKS in found:
        _refuse_line_breaks(opened, found[_LINE_BREAKS])

    def count(condition: str) -> int:
        (rows,) = fetch_row(database, f"SELECT count(*) FILTER ({condition}) FROM {files.relation}")
        return int(rows)

    all_rows = Rows(count, lambda *fault: files.refuse(database, *fault))
    typed = {column.name: column.typed(found.get(column.name, {}), all_rows) for column in columns}
    return TypedTable(_with_types(database, options, files, typed), typed)


def _line_breaks(opened: TableFiles, options: TableOptions) -> dict[str, dict[str, str]]:
    """Return aggregates that count line breaks per column, if these reveal quotes that are plain characters.

    Files separated by tabs and the like are often written without any quoting. There a quote at the beginning of a
    value would swallow the lines up to the next one.
    """
    csv = opened.csv
    if csv is None or csv.layout.separator in ",;" or opened.files.option in options.quote:
        return {}
    counts = {name: f"count(*) FILTER (contains({sql_name(name)}, chr(10)))" for name in opened.files.types}
    return {_LINE_BREAKS: counts}


def _refuse_line_breaks(opened: TableFiles, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        if count:
            raise DataError(
                f"{opened.files.option} = {opened.files.path}: {count:,} quoted values of {name!r} hold line breaks. "
                "Set quote=none if quotes are plain characters in these files, or quote='\"' if this is meant."
            )


def _with_types(
    database: duckdb.DuckDBPyConnection, options: TableOptions, files: Files, typed: dict[str, Typed]
) -> Files:
    """Return the files as a relation of typed columns, filtered by `where` if they are the events."""
    selected = [
        f"{typed[name].expression} AS {sql_name(name)}" if name in typed else sql_name(name) for name in files.types
    ]
    relation = f"(SELECT {', '.join([*selected, sql_name(FILE_OF_ROW)])} FROM {files.relation})"
    types = files.types | {name: each.type for name, each in typed.items()}
    made = replace(files, relation=relation, types=types)
    if files.option != "events" or options.where is None:
        return made
    names = ", ".join(f"{name} ({kind})" for name, kind in list(types.items())[:20])
    try:
        (described,) = fetch_rows(
            database, f"DESCRIBE SELECT ({options.where}) FROM {relation} WHERE ({options.where})"
        )
    except duckdb.Error as error:
        why = str(error).split("\n")[0]
        raise ConfigError(f"where = {options.where}: {why} The columns are {names}.") from None
    if described[1] != "BOOLEAN":
        raise ConfigError(f"where = {options.where}: this is {described[1]}, not a condition. The columns are {names}.")
    return replace(made, where=options.where)
