"""A table whose columns have their types: one scan of all rows decides them, and DuckDB reads the rows by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import duckdb

from trec_twotower.data.sources.event_files import (
    FILE_OF_ROW,
    Files,
    describe,
    explained,
    fetch_row,
    sql_name,
)
from trec_twotower.data.sources.table_columns import Column, Typed, note
from trec_twotower.data.sources.table_files import TableFiles
from trec_twotower.data.sources.table_options import TableOptions
from trec_twotower.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class TypedTable:
    """`files` is the relation of all columns, those of `typed` with their types, without the rows `where` drops."""

    files: Files
    typed: dict[str, Typed]


def new_column(opened: TableFiles, options: TableOptions, name: str, role: str, *, is_needed: bool = True) -> Column:
    """A column of the files; DataError where there is none, or, if every row needs a value, not in every file."""
    files = opened.files
    where = f"{files.option} = {files.path}"
    if name not in files.types:
        raise _no_column(opened, name, role)
    if lacking := opened.lacking.get(name):
        if is_needed:
            others = f" ({len(lacking):,} files lack it)" if len(lacking) > 1 else ""
            raise DataError(
                f"{lacking[0]}: there is no column {name!r}, which other files of {files.path} have{others}."
            )
        note(f"{where}: column {name!r} is not in {len(lacking):,} of {len(opened.paths):,} files: null in their rows.")
    if name in opened.conflicts and name not in options.types:
        raise DataError(
            f"{where}: column {name!r} is {opened.conflicts[name]}: write it with one type, or say which to read it "
            f"with, such as types={{{name}: text}}."
        )
    return Column(name, files.types[name], where, options, role, name in opened.undeclared)


def _no_column(opened: TableFiles, name: str, role: str) -> DataError:
    files = opened.files
    hint = ""
    if opened.csv is not None and not opened.csv.layout.columns:
        first = ", ".join(list(files.types)[:8])
        hint = f" (The first line is read as the names {first}: if it holds values, name the columns by columns=[...].)"
    where = f"{files.option} = {files.path}"
    return DataError(f"{where}: there is no column {name!r}{nearest(name, files.types)}: say {role} = NAME.{hint}")


def type_table(
    database: duckdb.DuckDBPyConnection, options: TableOptions, opened: TableFiles, columns: Sequence[Column]
) -> TypedTable:
    """Give `columns` their types by one scan of all rows; DataError names the first row that does not allow it."""
    asked = {
        f"{number} {name}": aggregate
        for number, column in enumerate(columns)
        for name, aggregate in column.aggregates().items()
    }
    found: dict[str, Any] = {}
    where = f"{opened.files.option} = {opened.files.path}"
    with explained(where, options):
        while asked and not found:
            selected = ", ".join(f"{aggregate} AS {sql_name(name)}" for name, aggregate in asked.items())
            try:
                row = fetch_row(database, f"SELECT {selected} FROM {opened.files.relation}")
                found = dict(zip(asked, row, strict=True))
            except duckdb.Error as error:
                opened = opened.after(database, error)
    files = opened.files

    def refuse(column: str, fault: str, count: int, why: str) -> DataError:
        return files.refuse(database, column, fault, count, why)

    typed = {}
    for number, column in enumerate(columns):
        known = {name: found[f"{number} {name}"] for name in column.aggregates()}
        typed[column.name] = column.typed(known, refuse)
    return TypedTable(_with_types(database, options, files, typed), typed)


def _with_types(
    database: duckdb.DuckDBPyConnection, options: TableOptions, files: Files, typed: dict[str, Typed]
) -> Files:
    """The files as a relation of typed columns, and with the condition `where` if these are the events."""
    selected = [
        f"{typed[name].expression} AS {sql_name(name)}" if name in typed else sql_name(name) for name in files.types
    ]
    relation = f"(SELECT {', '.join([*selected, sql_name(FILE_OF_ROW)])} FROM {files.relation})"
    types = files.types | {name: each.type for name, each in typed.items()}
    made = replace(files, relation=relation, types=types)
    if files.option != "events" or options.where is None:
        return made
    try:
        describe(database, f"{relation} WHERE ({options.where})")
    except duckdb.Error as error:
        why = str(error).split("\n")[0]
        names = ", ".join(f"{name} ({kind})" for name, kind in list(types.items())[:20])
        raise ConfigError(f"where = {options.where}: {why} The columns are {names}.") from None
    return replace(made, where=options.where)
