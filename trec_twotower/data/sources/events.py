"""Any log of interactions, from Parquet, CSV or JSON lines, larger than memory: each event with what came before it.

DuckDB reads the log into a table on disk, drops what is asked for and sorts the rest by user and second, spilling
beyond `memory_gb`. The sorted rows come back in batches that are cut between users, so that the past of an event is a
range of rows, found with a few numpy passes. Memory holds a row group of each part, and all events of one user.

DuckDB can make the histories itself, but slower. 2 million events of 120,000 users, sorted, with histories of 50, on
two cores: 2 s here; 11 s by `list(item_id) OVER (... RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)`, which is
exact but grows with the square of a user's events (1,000 users: 1 s against 41 s); 5 s by `ROWS BETWEEN 50 PRECEDING
AND 1 PRECEDING`, which does not grow so, but takes in events of the same second.

Two events of one second are not in each other's history: nobody knows which came first. Times without a zone are UTC.
"""

from __future__ import annotations

import datetime
import glob
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from trec_twotower.data.lists import offsets_of
from trec_twotower.data.sources.options import SourceOptions
from trec_twotower.data.sources.writer import DatasetWriter, list_column
from trec_twotower.errors import ConfigError, DataError, nearest

MIN_EVENTS = 3  # leave-last-out: users with fewer are trained on, not evaluated
LATEST_S = 10**11  # the year 5138; what is larger is in another unit
READERS = {".parquet": "read_parquet", ".pq": "read_parquet", ".csv": "read_csv", ".tsv": "read_csv"}
READERS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "read_json")
COMPRESSED = (".gz", ".zst")
OURS = ("user_id", "item_id", "timestamp", "weight", "positives", "history")
_FILE = "file of the row"  # the column in which DuckDB gives it
_INTEGERS = {sign + kind for sign in ("", "U") for kind in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")}
_TEXTS = {"VARCHAR", "UUID"}
_ROWS_PER_BATCH = 131_072
_VALUES_PER_PIECE = 4_000_000  # list elements made at a time


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


class Options(SourceOptions):
    """Where the log lies, which columns say what, what is dropped, and what is held out."""

    events: str = Field(min_length=1)  # a file, a folder or a glob of Parquet, CSV or JSON lines
    items: str | None = None  # the catalogue, given likewise; by default the distinct items of the events
    users: str | None = None  # static features of users, given likewise
    user: str = "user_id"  # the column of that name in the events and in `users`
    item: str = "item_id"  # and in `items`
    timestamp: str = "timestamp"  # whole seconds since 1970, or TIMESTAMP
    weight: str | None = None  # becomes the column `weight` of the train rows
    context: tuple[str, ...] = ()  # further columns of the events to keep
    max_history: PositiveInt = 50  # newest items kept in a train row; valid and test rows keep all
    min_history: int = Field(0, ge=0)  # train rows with fewer earlier items are left out
    split: Literal["leave-last-out", "time"] = "leave-last-out"
    valid_from: Moment | None = None  # split = time: seconds, or a date such as 2024-05-31
    test_from: Moment | None = None
    min_user_events: PositiveInt = 1  # with min_item_events: users and items with fewer go, until none has fewer
    min_item_events: PositiveInt = 1
    dedupe: bool = False  # keep only the first event of the same user and item
    memory_gb: float = Field(4.0, ge=0.1)  # what DuckDB may use before it spills to disk

    @model_validator(mode="after")
    def _fits(self) -> Self:
        columns = [self.user, self.item, self.timestamp, *([self.weight] if self.weight else []), *self.context]
        twice = [name for name, count in Counter(map(str.casefold, columns)).items() if count > 1]
        if twice:
            raise ValueError(f"column {twice[0]!r} is named twice among user, item, timestamp, weight and context")
        taken = [name for name in self.context if name.casefold() in OURS]
        if taken:
            raise ValueError(f"context column {taken[0]!r} has the name of a column of the dataset: rename it")
        given = [name for name in ("valid_from", "test_from") if getattr(self, name) is not None]
        if self.split == "leave-last-out" and given:
            raise ValueError(f"{given[0]} is set, but split is leave-last-out: set split = time, or leave it out")
        if self.split == "time" and len(given) < 2:
            raise ValueError("split = time needs both valid_from and test_from, such as 2024-05-31")
        if self.split == "time" and not self.periods["valid"][0] < self.periods["test"][0]:
            raise ValueError(
                f"valid_from ({_utc(self.valid_from)}) is not before test_from ({_utc(self.test_from)}): swap them"
            )
        return self

    @property
    def kept(self) -> list[str]:
        """The columns of the events besides the ids, as the dataset calls them."""
        return ["timestamp", *(["weight"] if self.weight else []), *self.context]

    @property
    def periods(self) -> dict[str, tuple[int, int]]:
        """First second, and first one after; of split = time."""
        assert self.valid_from is not None and self.test_from is not None
        return {"valid": (self.valid_from, self.test_from), "test": (self.test_from, 2**63 - 1)}


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test, items and users; returns the content of dataset.yaml."""
    scratch_dir = writer.scratch_dir()
    settings = {
        "memory_limit": f"{options.memory_gb}GB",
        "temp_directory": str(scratch_dir / "spilled"),
        "threads": max(1, min(len(os.sched_getaffinity(0)), int(8 * options.memory_gb))),  # each needs its share
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    with closing(duckdb.connect(scratch_dir / "events.duckdb", config=settings)) as database:  # type: ignore[arg-type]
        with _explained("the files", options):
            _rows(database, "SET enable_progress_bar = false")  # from a notebook, or python -c, it goes to stdout
            counts = _load(database, options)
            counts |= _drop(database, options)
            _check_periods(database, options)
            counts |= _write_sides(database, options, writer)
        counts |= _write_splits(database, options, writer)
    return writer.finish("events", options.model_dump(mode="json"), counts)


# The files


@dataclass(frozen=True)
class Files:
    """The files an option names, as something DuckDB selects from; and the type of each of their columns."""

    option: str
    path: str
    relation: str
    types: dict[str, str]

    @classmethod
    def find(cls, database: duckdb.DuckDBPyConnection, options: Options, option: str) -> Files:
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
        names = ", ".join(_text(glob.escape(str(file))) for file in paths)
        relation = f"{next(iter(readers))}([{names}], union_by_name = true, filename = {_text(_FILE)})"
        with _explained(f"{option} = {path}", options):
            described = _rows(database, f"DESCRIBE SELECT * FROM {relation}")
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
        return f"CAST({_name(column)} AS {'BIGINT' if kind in _INTEGERS else 'VARCHAR'})"

    def seconds(self, column: str) -> str:
        """An SQL expression: whole seconds since 1970; NULL where the file has null, NaN or an infinity."""
        kind = self.require(column, "timestamp")
        name = _name(column)
        if kind in _INTEGERS:
            return f"CAST({name} AS BIGINT)"
        if kind in ("FLOAT", "DOUBLE"):
            return f"CASE WHEN isfinite({name}) THEN CAST(floor({name}) AS BIGINT) END"
        if kind == "DATE" or kind.startswith("TIMESTAMP"):
            zoned = f"CAST({name} AS {'TIMESTAMPTZ' if kind.endswith('ZONE') else 'TIMESTAMP'})"
            return f"CASE WHEN isfinite({zoned}) THEN epoch_us({zoned}) // 1000000 END"
        raise self._refusal(column, kind, "timestamps are whole seconds since 1970, or TIMESTAMP")

    def number(self, column: str) -> str:
        kind = self.require(column, "weight")
        if kind not in _INTEGERS | {"FLOAT", "DOUBLE"} and not kind.startswith("DECIMAL"):
            raise self._refusal(column, kind, "weights are numbers")
        return f"CAST({_name(column)} AS DOUBLE)"

    def feature(self, column: str, role: str) -> str:
        """An SQL expression: the column as it is, but numbers of a kind that models do not read as DOUBLE."""
        kind = self.require(column, role)
        is_odd = kind.startswith("DECIMAL") or kind in ("HUGEINT", "UHUGEINT")
        return f"CAST({_name(column)} AS DOUBLE)" if is_odd else _name(column)

    def refuse(self, database: duckdb.DuckDBPyConnection, column: str, fault: str, count: int, why: str) -> DataError:
        """Says how many rows have the fault (an SQL condition), and which file and row is the first."""
        _rows(database, "SET preserve_insertion_order = true")
        select = f"FROM {self.relation} WHERE {fault}"
        (path,) = _one_row(database, f"SELECT min({_name(_FILE)}) {select}")
        row, value = _one_row(
            database,
            f"SELECT row, value FROM (SELECT row_number() OVER () - 1 AS row, CAST({_name(column)} AS VARCHAR) AS "
            f"value, {fault} AS is_bad FROM {self.relation} WHERE {_name(_FILE)} = {_text(path)}) "
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


def _is_shown(path: Path) -> bool:
    """Not what Spark and others leave beside the data, such as _SUCCESS or ._part.crc."""
    return not any(part.startswith((".", "_")) for part in path.parts)


def _ending(path: Path) -> str:
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    return stem.suffix.lower()


# What is kept


def _load(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the table `events`; DataError where a row cannot be one."""
    files = Files.find(database, options, "events")
    columns = {
        "user_id": files.id(options.user, "user"),
        "item_id": files.id(options.item, "item"),
        "timestamp": files.seconds(options.timestamp),
    }
    if options.weight:
        columns["weight"] = files.number(options.weight)
    columns |= {name: files.feature(name, "context") for name in options.context}
    selected = ", ".join(f"{expression} AS {_name(name)}" for name, expression in columns.items())
    with _explained(f"events = {options.events}", options):
        _rows(database, f"CREATE TABLE events AS SELECT {selected} FROM {files.relation}")

    unit = f"more than {LATEST_S:,} seconds, as if in milliseconds: divide, so that it counts seconds"
    faults = [
        (options.user, "user_id", "{} IS NULL", "remove these rows"),
        (options.item, "item_id", "{} IS NULL", "remove these rows"),
        (options.timestamp, "timestamp", "{} IS NULL", "remove these rows, or give them a time"),
        (options.timestamp, "timestamp", "{} < 0", "times before 1970 are taken for mistakes: remove these rows"),
        (options.timestamp, "timestamp", f"{{}} > {LATEST_S}", unit),
    ]
    if options.weight:
        bad = "coalesce(NOT isfinite({0}) OR {0} < 0, true)"
        faults.append((options.weight, "weight", bad, "weights are finite and at least 0"))
    tests = ", ".join(f"count(*) FILTER ({fault.format(name)})" for _, name, fault, _ in faults)
    rows, *found = _one_row(database, f"SELECT count(*), {tests} FROM events")
    if not rows:
        raise DataError(f"events = {options.events}: the files hold not one row.")
    for (column, name, fault, why), count in zip(faults, found, strict=True):
        if count:
            raise files.refuse(database, column, fault.format(columns[name]), count, why)
    return {"events_read": rows}


def _drop(database: duckdb.DuckDBPyConnection, options: Options) -> dict[str, int]:
    """Make the view `kept`: the events without repeats and without rare users and items, as asked for."""
    (read,) = _one_row(database, "SELECT count(*) FROM events")
    if options.dedupe:
        order = ", ".join(map(_name, options.kept))
        _rows(
            database,
            "CREATE TABLE first_events AS SELECT * FROM events "
            f"QUALIFY row_number() OVER (PARTITION BY user_id, item_id ORDER BY {order}) = 1",
        )
        _rows(database, "DROP TABLE events")
        _rows(database, "ALTER TABLE first_events RENAME TO events")
    (distinct,) = _one_row(database, "SELECT count(*) FROM events")
    is_core = options.min_user_events > 1 or options.min_item_events > 1
    if is_core:
        _find_core(database, options)
    both = "WHERE user_id IN (FROM core_users) AND item_id IN (FROM core_items)" if is_core else ""
    _rows(database, f"CREATE VIEW kept AS SELECT * FROM events {both}")
    (interactions,) = _one_row(database, "SELECT count(*) FROM kept")
    if not interactions:
        raise DataError(
            f"No event is left of {distinct:,}: no set of users with min_user_events = {options.min_user_events:,} "
            f"and items with min_item_events = {options.min_item_events:,} each exists: lower them."
        )
    (users,) = _one_row(database, "SELECT count(DISTINCT user_id) FROM kept")
    dropped = {"repeats_dropped": read - distinct, "rare_dropped": distinct - interactions}
    return {"users": users, "interactions": interactions, **dropped}


def _find_core(database: duckdb.DuckDBPyConnection, options: Options) -> None:
    """Make the tables `core_users` and `core_items`: the largest sets with enough events among themselves."""
    sizes: tuple[int, ...] = ()
    among_core = ""
    while True:
        for side, other, at_least in (
            ("user", "item", options.min_user_events),
            ("item", "user", options.min_item_events),
        ):
            among = among_core if side == "user" else f"WHERE {other}_id IN (FROM core_{other}s)"
            _rows(
                database,
                f"CREATE OR REPLACE TABLE core_{side}s AS SELECT {side}_id FROM events {among} "
                f"GROUP BY {side}_id HAVING count(*) >= {at_least}",
            )
        among_core = "WHERE item_id IN (FROM core_items)"
        before, sizes = sizes, _one_row(database, "SELECT (SELECT count(*) FROM core_users), count(*) FROM core_items")
        if sizes == before:
            return


def _check_periods(database: duckdb.DuckDBPyConnection, options: Options) -> None:
    if options.split != "time":
        return
    first, last = _one_row(database, "SELECT min(timestamp), max(timestamp) FROM kept")
    for split, (start, stop) in {"train": (0, options.periods["valid"][0]), **options.periods}.items():
        inside = f"timestamp >= {start} AND timestamp < {stop}"
        if not _one_row(database, f"SELECT count(*) FROM kept WHERE {inside}")[0]:
            raise DataError(
                f"No event is in the {split} period: the events run from {_utc(first)} to {_utc(last)}, but valid_from "
                f"is {_utc(options.valid_from)} and test_from {_utc(options.test_from)}: move them."
            )


# The catalogue and the users


def _write_sides(database: duckdb.DuckDBPyConnection, options: Options, writer: DatasetWriter) -> dict[str, int]:
    """Write items/ and, where given, users/, in the order of their ids."""
    if options.items is None:
        _rows(database, "CREATE TABLE items AS SELECT DISTINCT item_id FROM kept")
    else:
        _load_side(database, options, "items", options.item, "item")
    if options.users is not None:
        _load_side(database, options, "users", options.user, "user")
    for side, key in (("items", "item_id"), ("users", "user_id")):
        if side == "items" or options.users is not None:
            for batch in _batches(database, f"SELECT * FROM {side} ORDER BY {key}", options):
                writer.write(side, pa.Table.from_batches([batch]))
    return {"items": _one_row(database, "SELECT count(*) FROM items")[0]}


def _load_side(database: duckdb.DuckDBPyConnection, options: Options, side: str, column: str, role: str) -> None:
    """Make the table `items` or `users`; DataError where ids are null, stand twice, or are not all there."""
    files, key = Files.find(database, options, side), f"{role}_id"
    where = f"{side} = {files.path}"
    expression = files.id(column, role)
    others = [name for name in files.types if name != column]
    taken = [name for name in others if name.casefold() == key]
    if taken:
        raise DataError(f"{where}: {column!r} is to become {key!r}, but there is a column {taken[0]!r} too: rename it.")
    features = "".join(f", {files.feature(name, role)} AS {_name(name)}" for name in others)
    with _explained(where, options):
        _rows(database, f"CREATE TABLE {side} AS SELECT {expression} AS {key}{features} FROM {files.relation}")

    kind, wanted = (
        _one_row(database, f"SELECT column_type FROM (DESCRIBE {table}) WHERE column_name = '{key}'")[0]
        for table in (side, "events")
    )
    if kind != wanted:
        raise DataError(
            f"{where}: {column!r} is {files.types[column]}, but the events hold {wanted}: write both with one type."
        )
    (nulls,) = _one_row(database, f"SELECT count(*) FROM {side} WHERE {key} IS NULL")
    if nulls:
        raise files.refuse(database, column, f"{expression} IS NULL", nulls, "remove these rows")
    twice = f"SELECT {key} FROM {side} GROUP BY {key} HAVING count(*) > 1"
    missing = f"SELECT {key} FROM (SELECT DISTINCT {key} FROM kept) ANTI JOIN {side} USING ({key})"
    for ids, what, mend in (
        (twice, f"ids of {column!r} stand in more than one row", "keep one row an id"),
        (missing, f"{side} of the events are not there", f"write a row for each {role}, or remove their events"),
    ):
        count, first = _one_row(database, f"SELECT count(*), min({key}) FROM ({ids})")
        if count:
            raise DataError(f"{where}: {count:,} {what}, the first of them {first!r}: {mend}.")


# The splits


@dataclass(frozen=True, eq=False)
class Piece:
    """The events of whole users, sorted by user, second and item.

    For made-up events of users a and b:
    user  a a a a b      first  0 0 0 0 4   where the user's events begin
    time  5 7 7 8 6      now    0 1 1 3 4   where the events of the same user and second begin
    so that the past of event e is the rows first[e] .. now[e] - 1.
    """

    table: pa.Table

    @cached_property
    def item(self) -> pa.Array:
        return self.table["item_id"].combine_chunks()

    @cached_property
    def row(self) -> np.ndarray:
        return np.arange(len(self.table))

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each user, and one past the last row of all."""
        return np.append(np.flatnonzero(_is_new(self.table["user_id"])), len(self.table))

    @cached_property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def first(self) -> np.ndarray:
        return self.starts[self.owner]

    @cached_property
    def now(self) -> np.ndarray:
        begins = _is_new(self.table["timestamp"])
        begins[self.starts[:-1]] = True
        return np.maximum.accumulate(np.where(begins, self.row, 0))

    @cached_property
    def earliest(self) -> np.ndarray:
        """The row of the first event of the same user and item."""
        code = pc.dictionary_encode(self.item)
        pair = self.owner * len(code.dictionary) + code.indices.to_numpy()
        _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
        return first[inverse]

    def ids(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.ListArray:
        """Lists of item ids: element r holds those of the events rows[starts[r] : stops[r]]."""
        lists = list_column(rows, starts, stops)
        return pa.ListArray.from_arrays(lists.offsets, self.item.take(lists.values))


class Splits:
    """Turns pieces into the rows of train, valid and test; a kind of split is one method."""

    def __init__(self, options: Options, writer: DatasetWriter) -> None:
        self.options = options
        self.writer = writer
        self.rows: Counter[str] = Counter()
        self.repeats_kept = 0
        self.repeats_held_out = 0

    def leave_last_out(self, piece: Piece) -> None:
        starts, ends = piece.starts[:-1], piece.starts[1:]
        is_tested = ends - starts >= MIN_EVENTS
        self._write_train(piece, piece.row < (ends - 2 * is_tested)[piece.owner])
        for split, back in (("valid", 2), ("test", 1)):
            row = (ends - back)[is_tested]
            asked = piece.table.select(["user_id", "timestamp", *self.options.context]).take(row)
            self._write_held_out(split, piece, asked, piece.row, row, row + 1, piece.first[row], piece.now[row])
            self.repeats_held_out += int((piece.earliest[row] < piece.now[row]).sum())

    def time(self, piece: Piece) -> None:
        second = piece.table["timestamp"].to_numpy()
        self._write_train(piece, second < self.options.periods["valid"][0])
        is_first = piece.earliest == piece.row
        for split, (start, stop) in self.options.periods.items():
            positive = np.flatnonzero(is_first & (second >= start) & (second < stop))
            count = np.bincount(piece.owner[positive], minlength=len(piece.starts) - 1)
            user, offsets = np.flatnonzero(count), offsets_of(count)
            past = np.bincount(piece.owner[second < start], minlength=len(count))
            first = piece.starts[user]
            asked = pa.table({"user_id": piece.table["user_id"].take(first), "timestamp": np.full(len(user), start)})
            self._write_held_out(
                split, piece, asked, positive, offsets[user], offsets[user + 1], first, first + past[user]
            )

    def _write_train(self, piece: Piece, is_train: np.ndarray) -> None:
        row = np.flatnonzero(is_train & (piece.now - piece.first >= self.options.min_history))
        oldest = np.maximum(piece.first[row], piece.now[row] - self.options.max_history)
        for part in _parts(piece.now[row] - oldest):
            history = piece.ids(piece.row, oldest[part], piece.now[row[part]])
            self._write("train", piece.table.take(row[part]).append_column("history", history))
        self.repeats_kept += int((piece.earliest < piece.row).sum())

    def _write_held_out(
        self,
        split: str,
        piece: Piece,
        asked: pa.Table,
        positive: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        past_starts: np.ndarray,
        past_stops: np.ndarray,
    ) -> None:
        """Row r is asked[r], with the items of positive[starts[r] : stops[r]] to find, and its past."""
        for part in _parts(past_stops - past_starts + stops - starts):
            positives = piece.ids(positive, starts[part], stops[part])
            history = piece.ids(piece.row, past_starts[part], past_stops[part])
            rows = asked.slice(part.start, part.stop - part.start)
            self._write(split, rows.add_column(1, "positives", positives).append_column("history", history))

    def _write(self, split: str, table: pa.Table) -> None:
        self.rows[split] += len(table)
        self.writer.write(split, table)


def _write_splits(database: duckdb.DuckDBPyConnection, options: Options, writer: DatasetWriter) -> dict[str, int]:
    splits = Splits(options, writer)
    order = ["user_id", "timestamp", "item_id", *options.kept[1:]]  # all of them: no file's order shows
    query = f"SELECT user_id, item_id, {', '.join(map(_name, options.kept))} FROM kept ORDER BY "
    split: Callable[[Piece], None] = splits.time if options.split == "time" else splits.leave_last_out
    for table in _whole_users(_batches(database, query + ", ".join(map(_name, order)), options)):
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


def _whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows, in tables that no user's rows are parted by."""
    waiting: list[pa.Table] = []
    for batch in batches:
        table = pa.Table.from_batches([batch])
        cut = int(np.flatnonzero(_is_new(table["user_id"]))[-1])
        if cut or (waiting and waiting[0]["user_id"][0] != table["user_id"][0]):
            yield pa.concat_tables([*waiting, table.slice(0, cut)]).combine_chunks()
            waiting = []
        waiting.append(table.slice(cut))
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _is_new(column: pa.ChunkedArray) -> np.ndarray:
    """Which values (bool) differ from the one before; the first does."""
    values = column.combine_chunks()
    later = pc.not_equal(values.slice(1), values.slice(0, max(len(values) - 1, 0)))
    return np.append(True, later.to_numpy(zero_copy_only=False))


def _parts(lengths: np.ndarray) -> Iterator[slice]:
    """Runs of rows whose lists together hold about `_VALUES_PER_PIECE` values."""
    cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // _VALUES_PER_PIECE)) + 1
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(lengths)]):
        if stop > start:
            yield slice(start, stop)


# DuckDB


def _batches(database: duckdb.DuckDBPyConnection, query: str, options: Options) -> Iterator[pa.RecordBatch]:
    with _explained("the sorted rows", options):
        reader = _do(database, lambda: database.sql(query).to_arrow_reader(_ROWS_PER_BATCH))
    while True:
        with _explained("the sorted rows", options):
            batch = _do(database, lambda: next(reader, None))
        if batch is None:
            return
        if len(batch):
            yield batch


@contextmanager
def _explained(what: str, options: Options) -> Iterator[None]:
    """What DuckDB raises, as a ConfigError or DataError in its words."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        words = "; ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
        if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in words:
            raise ConfigError(f"memory_gb = {options.memory_gb:g} is too little here: raise it. ({words})") from None
        raise DataError(f"{what}: DuckDB gave up: {words}") from None


def _do(database: duckdb.DuckDBPyConnection, action: Callable[[], Any]) -> Any:
    """What `action` returns. It has a thread of its own: in the main one Ctrl-C would wait for the end of a scan."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(action)
        try:
            return answer.result()
        except KeyboardInterrupt:
            database.interrupt()
            raise


def _rows(database: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    """All of them: a result that is left unread keeps the connection from its next query."""
    return _do(database, lambda: database.execute(query).fetchall())


def _one_row(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    (row,) = _rows(database, query)
    return row


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _utc(second: int | None) -> str:
    assert second is not None
    return f"{datetime.datetime.fromtimestamp(second, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
