"""Find the files of a table (events, items or users) and open them in their format.

Columns of CSV are text here, and so are the keys in the names of Hive's folders (`store=7/`). The types that Parquet
and JSON declare are kept. `table_columns` gives columns their types.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.data.sources.tables.csv_files import CsvFiles, CsvLayout, detect_separator, refuse_twins
from trec_twotower.data.sources.tables.event_files import (
    FILE_OF_ROW,
    Files,
    describe,
    duckdb_paths,
    explained,
    original_names,
    row_place,
    scratch_dir_of,
    sql_name,
    sql_text,
)
from trec_twotower.data.sources.tables.json_files import json_place, json_relation
from trec_twotower.data.sources.tables.raw_text import check_zipped, copy_as_utf_8, copy_path
from trec_twotower.data.sources.tables.table_options import TableName, TableOptions
from trec_twotower.data.table_formats import refuse_table_format
from trec_twotower.errors import DataError, nearest

FORMATS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv"}
FORMATS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
COMPRESSED = (".gz", ".zst")
Place = Callable[[str, int], str]
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class TableFiles:
    """Files of a table and their columns.

    `undeclared` are the columns whose type nobody declares: those of CSV, and the keys of Hive's folders. `mixed` are
    those of JSON whose values are of several types. `lacking` has the files that a column is missing in, `conflicts`
    what to report where files declare different types for it.
    """

    files: Files
    paths: tuple[Path, ...]
    undeclared: frozenset[str]
    lacking: dict[str, list[Path]] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    csv: CsvFiles | None = None
    base: Path | None = None  # root of the Hive partition folders

    def after(self, database: duckdb.DuckDBPyConnection, error: duckdb.Error) -> TableFiles:
        """Return the table reopened in a way that avoids `error`. Raise `error` if there is none."""
        if self.csv is None:
            raise error
        return _with_csv(database, self, self.csv.after(error))


def open_table(database: duckdb.DuckDBPyConnection, options: TableOptions, table: TableName) -> TableFiles:
    """Find and open the files of a table; DataError where there are none, or none that can be read."""
    place = str(getattr(options, table))
    paths, base = _find(table, place, options.format.get(table))
    for path in paths:
        check_zipped(path)
    format = options.format.get(table) or _format_of(table, place, paths)
    empty = Files(table, place, "", {})
    opened = TableFiles(empty, tuple(paths), frozenset(), base=base)
    with explained(f"{table} = {place}", options):
        if format == "csv":
            return _with_csv(database, opened, _csv_files(database, options, table, paths))
        if format == "json":
            return _with_json(database, options, table, opened)
        names, conflicts = _parquet_columns(paths)
        relation = (
            f"read_parquet([{duckdb_paths(paths)}], union_by_name = true, hive_partitioning = false, "
            f"filename = {sql_text(FILE_OF_ROW)})"
        )
        return _finished(database, replace(opened, lacking=_lacking(names), conflicts=conflicts), relation, row_place)


# Finding the files


def _find(table: str, place: str, format: str | None) -> tuple[list[Path], Path | None]:
    """Return the files sorted by name, and the root of the `key=value` folders (None for a single file)."""
    path = Path(place).expanduser()
    if path.is_file():
        return [path], None
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        inside = [file for file in found if _is_shown(file.relative_to(path))]
        paths = inside if format else [file for file in inside if _ending(file) in FORMATS]
        base = path
    else:
        inside = paths = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(file)]
        base = Path(*path.parts[: next((at for at, part in enumerate(path.parts) if glob.has_magic(part)), 0)])
        if not paths:
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            known = sorted(name for name in siblings if not name.startswith("."))
            raise DataError(f"{table} = {place}: there is no such file{nearest(path.name, known)}.")
    for folder in sorted({path, *(parent for file in paths for parent in file.absolute().parents)}):
        refuse_table_format(folder)
    if not paths:
        names = f" (there: {', '.join(file.name for file in inside[:5])})" if inside else ""
        hint = f": set format.{table}=csv, json or parquet" if inside else ""
        raise DataError(f"{table} = {place}: the folder holds no {', '.join(FORMATS)}{names}{hint}.")
    return paths, base


def _format_of(table: str, place: str, paths: list[Path]) -> str:
    """Return the common format of the files, from their endings."""
    formats = {FORMATS.get(_ending(file), ""): file for file in reversed(paths)}
    if "" in formats:
        raise DataError(
            f"{table} = {place}: {formats[''].name} has none of the endings {', '.join(FORMATS)} (CSV and JSON also "
            f"with {' or '.join(COMPRESSED)}): set format.{table}=csv, json or parquet."
        )
    if len(formats) > 1:
        found = " and ".join(sorted(file.name for file in formats.values()))
        raise DataError(f"{table} = {place}: found {found}; give files of one format.")
    return next(iter(formats))


def _is_shown(path: Path) -> bool:
    """Return whether a path is data, not a marker of Spark and others such as _SUCCESS or ._part.crc."""
    return not any(part.startswith((".", "_")) for part in path.parts)


def _ending(path: Path) -> str:
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    return stem.suffix.lower()


# Opening them


def _csv_files(
    database: duckdb.DuckDBPyConnection, options: TableOptions, table: TableName, paths: list[Path]
) -> CsvFiles:
    columns = options.columns.get(table, ())
    layout = CsvLayout(
        separator=options.separator.get(table, ","),
        quote=options.quote.get(table, '"'),
        header=options.header.get(table, not columns),
        columns=columns,
        encoding=options.encoding.get(table, "utf-8"),
        null=options.null,
    )
    filled = next((path for path in paths if path.stat().st_size), None)
    if table not in options.separator and filled is not None:
        layout = replace(layout, separator=detect_separator(filled, layout, options.named_columns(table)))
    csv = CsvFiles(tuple(paths), layout, scratch_dir_of(database))
    if not csv.heads:
        what = "the file is" if len(paths) == 1 else f"all {len(paths):,} files are"
        raise DataError(f"{table} = {getattr(options, table)}: {what} empty: there is not even a line of names.")
    return csv.in_utf_8()


def _with_csv(database: duckdb.DuckDBPyConnection, opened: TableFiles, csv: CsvFiles) -> TableFiles:
    lacking = _lacking({path: head.names for path, head in csv.heads.items()})
    return _finished(database, replace(opened, csv=csv, lacking=lacking), csv.relation(), csv.place)


def _finished(database: duckdb.DuckDBPyConnection, opened: TableFiles, relation: str, place: Place) -> TableFiles:
    """Return the table with the Hive keys as columns, and the type of each column."""
    types = describe(database, relation)
    keys = _hive_keys(opened, types)
    files = replace(opened.files, types=types | dict.fromkeys(keys, "VARCHAR"), place=place)
    if keys:
        values = ", ".join(f"{value} AS {sql_name(key)}" for key, value in keys.items())
        relation = f"(SELECT *, {values} FROM {relation})"
    undeclared = frozenset(keys) | (frozenset(types) if opened.csv is not None else frozenset())
    return replace(opened, files=replace(files, relation=relation), undeclared=undeclared)


def _hive_keys(opened: TableFiles, types: Collection[str]) -> dict[str, str]:
    """Return the keys of `key=value` folders with the SQL expression of each value (text; Hive's null is NULL)."""
    base = opened.base
    if base is None:
        return {}
    known = {name.casefold(): name for name in types}
    keys: dict[str, str] = {}
    for path in opened.paths:
        for part in path.relative_to(base).parts[:-1]:
            key, equals, _ = part.partition("=")
            if not equals or not key or key in keys:
                continue
            if key.casefold() in known:
                raise DataError(
                    f"{path}: the folder {part!r} gives a value to {key!r}, and the files have a column "
                    f"{known[key.casefold()]!r}: one of them must go. Rename the folders, or give the files alone, as "
                    "by a copy of them in one folder."
                )
            below = f"substr({sql_name(FILE_OF_ROW)}, {len(str(base)) + 1})"
            value = f"regexp_extract({below}, {sql_text(f'/{re.escape(key)}=([^/]*)/')}, 1)"
            keys[key] = f"nullif(nullif(url_decode({value}), ''), {sql_text(_HIVE_NULL)})"
    refuse_twins(f"{base}", keys, "rename the folders")
    return keys


def _with_json(
    database: duckdb.DuckDBPyConnection, options: TableOptions, table: TableName, opened: TableFiles
) -> TableFiles:
    """Return the table of JSON files, read from copies if their encoding is not UTF-8."""
    encoding = options.encoding.get(table, "utf-8")
    if encoding == "utf-8":
        relation, mixed = json_relation(database, opened.paths)
        return _finished(database, replace(opened, mixed=mixed), relation, json_place)
    scratch_dir = scratch_dir_of(database)
    for path in opened.paths:
        copy_as_utf_8(path, encoding, scratch_dir)
    relation, mixed = json_relation(database, [copy_path(path, scratch_dir) for path in opened.paths])
    relation = f"(SELECT {original_names(opened.paths[0], scratch_dir)} FROM {relation})"
    return _finished(database, replace(opened, mixed=mixed), relation, row_place)


def _parquet_columns(paths: list[Path]) -> tuple[dict[Path, tuple[str, ...]], dict[str, str]]:
    """Return the columns of each file, and the error text of each column with conflicting types."""
    names: dict[Path, tuple[str, ...]] = {}
    kinds: dict[str, tuple[str, str, Path]] = {}
    conflicts: dict[str, str] = {}
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a Parquet file, or a damaged one: {str(error).splitlines()[0]}") from None
        names[path] = tuple(schema.names)
        refuse_twins(f"{path}", schema.names, "write the file with other names")
        for column in schema:
            kind, first, first_path = kinds.setdefault(column.name, (_kind(column.type), str(column.type), path))
            if _kind(column.type) not in (kind, "null"):
                if kind == "null":
                    kinds[column.name] = (_kind(column.type), str(column.type), path)
                    continue
                conflicts[column.name] = f"{first} in {first_path}, but {column.type} in {path}"
    return names, conflicts


def _kind(type: pa.DataType) -> str:
    """Return the broad kind of a type: columns of one kind can be read together."""
    if pa.types.is_dictionary(type):
        return _kind(type.value_type)
    for kind, holds in (
        ("null", pa.types.is_null),
        ("boolean", pa.types.is_boolean),
        ("number", lambda type: pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)),
        ("time", lambda type: pa.types.is_timestamp(type) or pa.types.is_date(type)),
        ("text", lambda type: pa.types.is_string(type) or pa.types.is_large_string(type) or type == pa.string_view()),
        ("bytes", lambda type: pa.types.is_binary(type) or pa.types.is_large_binary(type)),
        ("list", lambda type: pa.types.is_nested(type) and not pa.types.is_struct(type)),
    ):
        if holds(type):
            return kind
    return str(type.id)


def _lacking(names: dict[Path, tuple[str, ...]]) -> dict[str, list[Path]]:
    """Return the files that lack each column. Raise DataError if files spell a name in different case."""
    spelled: dict[str, tuple[str, Path]] = {}
    holders: dict[str, set[Path]] = {}
    for path, columns in names.items():
        for name in columns:
            first, first_path = spelled.setdefault(name.casefold(), (name, path))
            if first != name:
                raise DataError(f"Column {first!r} of {first_path} is {name!r} in {path}: give it one name.")
            holders.setdefault(name, set()).add(path)
    return {
        name: [path for path in names if path not in having]
        for name, having in holders.items()
        if len(having) < len(names)
    }
