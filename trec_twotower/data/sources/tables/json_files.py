"""Read files of JSON objects as a DuckDB relation. Every key is a column, of a type that fits all values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import duckdb

from trec_twotower.data.sources.tables.csv_files import refuse_twins
from trec_twotower.data.sources.tables.event_files import (
    FILE_OF_ROW,
    describe,
    duckdb_paths,
    fetch_row,
    fetch_rows,
    row_place,
    sql_text,
)
from trec_twotower.data.sources.tables.raw_text import broken_json_line, open_unzipped
from trec_twotower.errors import DataError

# Types that DuckDB infers from text, and JSON for mixed types. Quoted field names are not types.
_GUESSED = re.compile(r'("(?:[^"]|"")*")|\b(?:DATE|TIME|TIMESTAMP(?:TZ|_\w+| WITH TIME ZONE)?|UUID|JSON)(?=[\[\],)]|$)')


def json_relation(database: duckdb.DuckDBPyConnection, paths: Sequence[Path]) -> tuple[str, frozenset[str]]:
    """Return an SQL relation of the objects in these files, and the keys with values of several types (text here).

    Text stays text, even if it looks like a date. All objects are scanned for keys and types, with little memory.
    """
    read = f"read_json([{duckdb_paths(list(paths))}], hive_partitioning = false"
    scan = f"{read}, sample_size = -1, maximum_sample_files = {len(paths)}, union_by_name = true"
    types = describe(database, f"{scan})")
    if next(iter(types.values())).startswith("MAP"):  # DuckDB infers a map from rare keys
        types = describe(database, f"{scan}, map_inference_threshold = -1)")
    if types == {"json": "JSON"}:
        raise _no_objects(database, paths)
    _refuse_twins(database, paths, types)
    kept = {name: _GUESSED.sub(lambda found: found[1] or "VARCHAR", kind) for name, kind in types.items()}
    typed = ", ".join(f"{sql_text(name)}: {sql_text(kind)}" for name, kind in kept.items())
    mixed = frozenset(name for name, kind in types.items() if kind == "JSON")
    return f"(SELECT * FROM {read}, columns = {{{typed}}}, filename = {sql_text(FILE_OF_ROW)}))", mixed


def json_place(path: str, row: int) -> str:
    """Return the line of row number `row` (from 0), if each line is an object."""
    count = -1
    with open_unzipped(Path(path)) as source:
        for number, line in enumerate(source, 1):
            count += bool(line.strip())
            if number == 1 and not line.rstrip().endswith(b"}"):
                break
            if count == row:
                return f"line {number:,}"
    return row_place(path, row)


def _no_objects(database: duckdb.DuckDBPyConnection, paths: Sequence[Path]) -> DataError:
    """Return the error for files with no JSON object, or with values that are not objects."""
    (rows,) = fetch_row(database, f"SELECT count(*) FROM read_json_objects([{duckdb_paths(list(paths))}])")
    if not rows:
        return DataError(
            f"{paths[0]}{' and the other files' if len(paths) > 1 else ''}: empty, there is no JSON object."
        )
    for path in paths:
        (other,) = fetch_row(
            database,
            f"SELECT count(*) FROM read_json_objects([{duckdb_paths([path])}]) WHERE json_type(json) <> 'OBJECT'",
        )
        if other:
            return broken_json_line(path, f"{other:,} values are not objects of names and values")
    return DataError(f"{paths[0]}: the objects have no keys.")


def _refuse_twins(database: duckdb.DuckDBPyConnection, paths: Sequence[Path], types: dict[str, str]) -> None:
    """Raise DataError if two keys differ only in case: DuckDB renames one of them to, say, "Brand_1"."""
    known = {name.casefold() for name in types}
    if not any(re.sub(r"_\d+$", "", name).casefold() in known - {name.casefold()} for name in types):
        return
    keys = fetch_rows(
        database,
        "SELECT DISTINCT unnest(json_keys(json)) AS key FROM "
        f"read_json_objects([{duckdb_paths(list(paths))}]) ORDER BY key",
    )
    refuse_twins(
        f"{paths[0].parent if len(paths) > 1 else paths[0]}", [key for (key,) in keys], "give the keys other names"
    )
