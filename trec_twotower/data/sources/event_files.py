"""The files an option names, and DuckDB, which reads them: its answers, and its errors in our words."""

from __future__ import annotations

import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from trec_twotower.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from trec_twotower.data.sources.event_log import LogOptions

READERS = {".parquet": "read_parquet", ".pq": "read_parquet", ".csv": "read_csv", ".tsv": "read_csv"}
READERS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "read_json")
COMPRESSED = (".gz", ".zst")
_FILE = "file of the row"  # the column in which DuckDB gives it
_INTEGERS = {sign + kind for sign in ("", "U") for kind in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")}
_TEXTS = {"VARCHAR", "UUID"}
_ROWS_PER_BATCH = 131_072
LATEST_S = 10**11  # the year 5138; what is larger is in another unit
LATEST_US = LATEST_S * 1_000_000
_JSON_FAULT = re.compile(r"JSON .*?in file \"(.+?)\"")


@dataclass(frozen=True)
class Files:
    """The files an option names, as something DuckDB selects from; and the type of each of their columns."""

    option: str
    path: str
    relation: str
    types: dict[str, str]

    @classmethod
    def find(cls, database: duckdb.DuckDBPyConnection, options: LogOptions, option: str) -> Files:
        """DataError where there are no such files, of several formats, or of none we read."""
        path = getattr(options, option)
        paths = _paths(option, path)
        readers = {READERS[ending]: file for file in reversed(paths) if (ending := _ending(file)) in READERS}
        if len(readers) != 1:
            odd = next((file for file in paths if _ending(file) not in READERS), paths[0])
            found = " and ".join(sorted(file.name for file in readers.values())) if readers else odd.name
            raise DataError(
                f"{option} = {path}: found {found}; give files of one format: {', '.join(READERS)}, "
                f"CSV and JSON also with {' or '.join(COMPRESSED)}."
            )
        return cls.read(database, options, option, str(path), paths, next(iter(readers)), "union_by_name = true")

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
        """`paths`, which the option `option` has found as `path`, through a reader of DuckDB's that is told `how`."""
        for file in paths:
            _check_zipped(file)
        names = ", ".join(sql_text(glob.escape(str(file))) for file in paths)
        relation = f"{reader}([{names}], {how}, filename = {sql_text(_FILE)})"
        with explained(f"{option} = {path}", options):
            described = fetch_rows(database, f"DESCRIBE SELECT * FROM {relation}")
        types = {name: kind for name, kind, *_ in described if name != _FILE}
        return cls(option, path, relation, types)

    def require(self, column: str, role: str) -> str:
        """The column's type; DataError names the nearest where there is no such column."""
        if column not in self.types:
            raise DataError(
                f"{self.option} = {self.path}: there is no column {column!r}{nearest(column, self.types)}: "
                f"say {role} = NAME."
            )
        return self.types[column]

    def id(self, column: str, role: str) -> str:
        """An SQL expression: the ids of `column` as BIGINT or VARCHAR."""
        kind = self.require(column, role)
        if kind not in _INTEGERS | _TEXTS:
            raise self._refusal(column, kind, "ids are whole numbers or text")
        return f"CAST({sql_name(column)} AS {'BIGINT' if kind in _INTEGERS else 'VARCHAR'})"

    def microseconds(self, column: str) -> str:
        """Return an SQL expression: microseconds since 1970; NULL where the file has null, NaN or an infinity.

        Numbers in the file are seconds.
        """
        kind = self.require(column, "timestamp")
        name = sql_name(column)
        if kind in _INTEGERS:
            return to_microseconds(name, 1_000_000)
        if kind in ("FLOAT", "DOUBLE"):
            return to_microseconds(f"CASE WHEN isfinite({name}) THEN floor(CAST({name} AS DOUBLE) * 1000000) END", 1)
        if kind == "DATE" or kind.startswith("TIMESTAMP"):
            has_zone = kind.endswith("ZONE") or kind.startswith("TIMESTAMPTZ")
            zoned = f"CAST({name} AS {'TIMESTAMPTZ' if has_zone else 'TIMESTAMP'})"
            return f"CASE WHEN isfinite({zoned}) THEN epoch_us({zoned}) END"
        raise self._refusal(column, kind, "timestamps are whole seconds since 1970, or TIMESTAMP")

    def number(self, column: str) -> str:
        kind = self.require(column, "weight")
        if kind not in _INTEGERS | {"FLOAT", "DOUBLE"} and not kind.startswith("DECIMAL"):
            raise self._refusal(column, kind, "weights are numbers")
        return f"CAST({sql_name(column)} AS DOUBLE)"

    def feature(self, column: str, role: str) -> str:
        """An SQL expression: the column as it is, but numbers of a kind that models do not read as DOUBLE."""
        kind = self.require(column, role)
        is_odd = kind.startswith("DECIMAL") or kind in ("HUGEINT", "UHUGEINT")
        return f"CAST({sql_name(column)} AS DOUBLE)" if is_odd else sql_name(column)

    def sortable(self, column: str, role: str) -> str:
        """Return an SQL expression: a column whose values have an order."""
        kind = self.require(column, role)
        if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION", "JSON", "BLOB", "BIT")):
            raise self._refusal(column, kind, "an order is given by numbers, text or times")
        return sql_name(column)

    def refuse(self, database: duckdb.DuckDBPyConnection, column: str, fault: str, count: int, why: str) -> DataError:
        """Says how many rows have the fault (an SQL condition), and which file and row is the first."""
        fetch_rows(database, "SET preserve_insertion_order = true")
        # FILTER, because DuckDB skips row groups of Parquet by statistics that do not count NaN where it has a WHERE.
        first_file = f"min({sql_name(_FILE)}) FILTER ({fault})"
        (path,) = fetch_row(database, f"SELECT {first_file} FROM {self.relation}")
        row, value = fetch_row(
            database,
            f"SELECT row, value FROM (SELECT row_number() OVER () - 1 AS row, CAST({sql_name(column)} AS VARCHAR) AS "
            f"value, {fault} AS is_bad FROM {self.relation} WHERE {sql_name(_FILE)} = {sql_text(path)}) "
            "WHERE is_bad ORDER BY row LIMIT 1",
        )
        found = "null" if value is None else value
        return DataError(
            f"{path}, row {row:,} (counted from 0): {column!r} is {found}, the first of {count:,} such rows: {why}."
        )

    def _refusal(self, column: str, kind: str, why: str) -> DataError:
        return DataError(f"{self.option} = {self.path}: column {column!r} is {kind}, but {why}: cast it.")


def _paths(option: str, path: str) -> list[Path]:
    """The files, sorted by name; of a folder those with an ending we read, at any depth."""
    place = Path(path).expanduser()
    if place.is_dir():
        inside = [file for file in sorted(place.rglob("*")) if file.is_file() and _is_shown(file.relative_to(place))]
        paths = [file for file in inside if _ending(file) in READERS]
        there = f" (there: {', '.join(file.name for file in inside[:5])})" if inside else ""
        if not paths:
            raise DataError(f"{option} = {path}: the folder holds no {', '.join(READERS)}{there}.")
        return paths
    if place.is_file():
        return [place]
    paths = [Path(file) for file in sorted(glob.glob(str(place), recursive=True)) if os.path.isfile(file)]
    if not paths:
        beside = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"{option} = {path}: there is no such file{nearest(place.name, sorted(beside))}.")
    return paths


def _check_zipped(path: Path) -> None:
    """Raises DataError where a file is called .gz and is none, of which DuckDB says no name."""
    if path.suffix == ".gz":
        with path.open("rb") as file:
            begin = file.read(2)
        if begin != b"\x1f\x8b":
            found = f"begins with {begin!r}" if begin else "is empty"
            raise DataError(
                f"{path} is called .gz, but {found}, as no gzip file does: download it again, or take .gz off its name "
                "if it is plain text."
            )


def _is_shown(path: Path) -> bool:
    """Not what Spark and others leave beside the data, such as _SUCCESS or ._part.crc."""
    return not any(part.startswith((".", "_")) for part in path.parts)


def _ending(path: Path) -> str:
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    return stem.suffix.lower()


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
    """What DuckDB raises, as a ConfigError or DataError in its words."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        words = "; ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
        if (broken := _JSON_FAULT.search(words)) is not None:
            raise broken_line(Path(broken[1]), words) from None
        if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in words:
            raise ConfigError(f"memory_gb = {options.memory_gb:g} is too little here: raise it. ({words})") from None
        raise DataError(f"{what}: DuckDB gave up: {words}") from None


def broken_line(path: Path, words: str) -> DataError:
    """Names the first line of a file of JSON lines that is no JSON object: DuckDB counts lines roughly."""
    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            try:
                is_object = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                is_object = False
            if not is_object:
                shown = line[:60].decode("utf-8", "replace").strip()
                return DataError(
                    f"{path}, line {number:,}: {shown!r} is not one JSON object: mend the line or take it out."
                )
    return DataError(f"{path}: DuckDB gave up: {words}")


def _do(database: duckdb.DuckDBPyConnection, action: Callable[[], Any]) -> Any:
    """What `action` returns. It has a thread of its own: in the main one Ctrl-C would wait for the end of a scan."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(action)
        try:
            return answer.result()
        except KeyboardInterrupt:
            database.interrupt()
            raise


def fetch_rows(database: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    """All of them: a result that is left unread keeps the connection from its next query."""
    return _do(database, lambda: database.execute(query).fetchall())


def fetch_row(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    (row,) = fetch_rows(database, query)
    return row


def to_microseconds(time: str, factor: int) -> str:
    """Return an SQL expression: the whole number `time`, whose unit is `factor` microseconds, in microseconds.

    Times before 1970 become a negative number, those after LATEST_US a larger one: nothing overflows.
    """
    too_late = LATEST_US // factor + 1_000_000  # which a double can tell from LATEST_US
    clamped = f"CAST(least(greatest({time}, -1), {too_late}) AS BIGINT)"
    return f"CASE WHEN {time} IS NOT NULL THEN {clamped} * {factor} END"


def sql_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
