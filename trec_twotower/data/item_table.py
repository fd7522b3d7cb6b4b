"""Items (or users) with their features, hashed once and looked up by row."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import IdFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import bucket_names
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.datetime_parts import check_time
from trec_twotower.data.features.lists import check_actions, check_times, check_weights, key_lists
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import check_kind, transform
from trec_twotower.data.split import RowGroup, Split
from trec_twotower.data.value_digests import mixed, value_digests
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import bucket_type, id_keys, is_text
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.array_store import ArrayWriter, InMemory, mapped_arrays
from trec_twotower.storage.arrow_values import exact_array, python_rows, python_value
from trec_twotower.storage.cache_dir import CacheFolder, changed

FORMAT = 2  # format version of the arrays; another number rebuilds them
MAPPED_CELLS = 1 << 20  # bytes of ids and features; a larger catalogue is memory-mapped
MAX_THREADS = 4  # threads that hash a catalogue

T = TypeVar("T")
S = TypeVar("S")


class Catalogue:
    """A table of items (or users): ids, and features as Columns, one row each.

    `row` is the position in the files' order: the `item_row` of export and index. The first
    process hashes a large catalogue into files of the cache folder; the others map these files, so that the ranks of
    a host share one copy. Without a cache folder, or if it is full, the catalogue is in memory. Raises DataError for
    an id that is null or not unique.
    """

    def __init__(
        self,
        split: Split,
        id_column: str,
        features: list[FeatureSpec],
        tables: Mapping[str, TableSpec],
        statistics: Mapping[str, Statistics],
        cache: CacheFolder | None = None,
    ) -> None:
        self.split = split
        self.id_column = id_column
        source = _Hashing(split, id_column, features, tables, statistics)
        arrays = None
        if cache is not None and source.is_large:
            try:
                arrays = mapped_arrays(cache, source.facts(), source.write)
            except OSError as error:
                warnings.warn(
                    f"The cache folder cannot hold {split.folder} hashed ({error}), so every rank has it in memory: "
                    "set data.cache to a folder with enough space.",
                    stacklevel=2,
                )
        if arrays is None:
            in_memory = InMemory()
            source.write(in_memory)
            arrays = in_memory.arrays()
        self.keys = arrays["keys"]
        self.digests = arrays["digests"]  # uint32 per row: digest of the columns that features read
        self.digested = source.digested
        self._source = source
        self.ids = source.ids(arrays)
        self.columns = source.columns(arrays)
        self._table = KeyTable(self.keys, arrays["slots"])

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of_keys(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each 64-bit key, -1 if there is none."""
        return self._table.find(keys)

    def rows_of(self, ids: pa.Array, where: str) -> np.ndarray:
        """Return the row of each id, -1 if there is none."""
        return self.rows_of_keys(id_keys(ids, where))

    def rows_of_lists(self, lists: pa.Array, where: str) -> Ragged:
        """Return the rows of lists of ids, -1 if there is none."""
        keys = key_lists(lists, where)
        return Ragged(keys.offsets, self.rows_of_keys(keys.values))

    @property
    def total(self) -> int:
        """Return the sum modulo 2^64 of the digests of all rows, each mixed with its key, for any order of rows."""
        return int(mixed(self.keys, self.digests.astype(np.uint64)).sum(dtype=np.uint64))

    def column_sums(self, is_meant: np.ndarray) -> dict[str, int]:
        """Return, for each digested column, the sum of the digests of these rows (bool), each mixed with its key.

        The sum does not depend on the order of the rows. Reads the columns again.
        """
        sums = dict.fromkeys(self.digested, 0)
        for group in self.split.row_groups:
            rows = slice(group.first_row, group.first_row + group.num_rows)
            for name, digests in self._source.column_digests(group).items():
                keyed = mixed(self.keys[rows], digests)[is_meant[rows]]
                sums[name] = (sums[name] + int(keyed.sum(dtype=np.uint64))) % (1 << 64)
        return sums

    def row(self, row: int, columns: list[str]) -> pa.Table:
        """Return the values of one row in these columns."""
        group = next(each for each in self.split.row_groups if row < each.first_row + each.num_rows)
        return self.split.read(group, columns).slice(row - group.first_row, 1)

    def words(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return all columns of these rows for display."""
        wanted = np.asarray(rows)
        found: dict[int, dict[str, Any]] = {}
        for group in self.split.row_groups:
            inside = wanted[(wanted >= group.first_row) & (wanted < group.first_row + group.num_rows)]
            if inside.size:
                table = self.split.read(group, list(self.split.columns))
                taken = python_rows(table.take(pa.array(inside - group.first_row)))
                found.update(zip(inside.tolist(), taken, strict=True))
        return [found[row] for row in wanted.tolist()]


class _Hashing:
    """Builds the arrays of a catalogue from the files of a split.

    keys               the 64-bit key of every row's id, and `slots`, the table that finds them
    digests            32 bits of a digest of every row's values
    ids                the ids if they are not the keys: integers, or text with `id_offsets`
    counting           0 .. rows, the offsets of all features with one value per row
    values:FEATURE     buckets; for lists with offsets:FEATURE and, if there are any, weights:FEATURE
    number:FEATURE     tower inputs of features without a table, such as a value and whether it is missing
    """

    def __init__(
        self,
        split: Split,
        id_column: str,
        features: list[FeatureSpec],
        tables: Mapping[str, TableSpec],
        statistics: Mapping[str, Statistics],
    ) -> None:
        self.split = split
        self.id_column = id_column
        self.features = features
        self.tables = tables
        self.statistics = statistics
        self.id_kind = split.columns[id_column]
        # Features that read the id reuse the hashed ids, since hashing text is expensive.
        self.reuses_keys = all(
            isinstance(feature, IdFeature) for feature in features if id_column in feature.source_columns
        )
        reads = {column for feature in features for column in feature.source_columns}
        self.reads = sorted(reads - ({id_column} if self.reuses_keys else set()))
        self.digested = sorted(reads - {id_column})
        num_cells = sum(1 + max(feature.num_numbers - 2, 0) for feature in features)
        self.is_large = split.num_rows * (1 + num_cells) > MAPPED_CELLS

    def facts(self) -> dict[str, Any]:
        """Return all that the arrays depend on."""
        paths = dict.fromkeys(group.path for group in self.split.row_groups)  # in the order of the rows
        sparse = [feature for feature in self.features if feature.looks_up_table]
        tables = {feature.table_name: self.tables[feature.table_name] for feature in sparse}
        read = [path for feature in self.features for path in feature.external_files if path.is_file()]
        return {
            "format": FORMAT,
            "files": [(str(path.absolute()), path.stat().st_size, changed(path)) for path in paths],
            "id": self.id_column,
            "features": [feature.model_dump() for feature in self.features],
            "tables": {name: (spec.buckets, spec.hashing, spec.seed, spec.hashes) for name, spec in tables.items()},
            "external_files": [(str(path.absolute()), path.stat().st_size, changed(path)) for path in read],
            "statistics": {name: asdict(values) for name, values in self.statistics.items()},
        }

    def write(self, arrays: ArrayWriter) -> None:
        """Yield the arrays per row group, hashed ahead by threads."""
        num_rows = self.split.num_rows
        keys = arrays.reserve("keys", np.int64, num_rows)
        table = KeyTable(keys, arrays.reserve("slots", np.int32, KeyTable.num_slots(num_rows)))
        has_singles = any(feature.looks_up_table and not feature.is_ragged for feature in self.features)
        counting = arrays.reserve("counting", np.int64, num_rows + 1) if has_singles else None
        ends: dict[str, int] = {}
        doubles = []
        groups = self.split.row_groups
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if self.is_large else 1
        for group, parts in zip(groups, _ahead(self._hashed, groups, threads), strict=True):
            stop = group.first_row + group.num_rows
            keys[group.first_row : stop] = parts.pop("keys")
            doubles.append(table.insert(group.first_row, stop))
            if counting is not None:
                counting[group.first_row : stop + 1] = np.arange(group.first_row, stop + 1)
            for name, part in parts.items():
                if name.startswith(("offsets:", "id_offsets")):
                    part = part + ends.get(name, 0)
                    arrays.append(name, part if name not in ends else part[1:])
                    ends[name] = int(part[-1])
                else:
                    arrays.append(name, part)
        self._refuse(np.concatenate(doubles))

    def _refuse(self, doubles: np.ndarray) -> None:
        if not len(doubles):
            return
        first, second = doubles[0].tolist()
        [group] = [group for group in self.split.row_groups if 0 <= first - group.first_row < group.num_rows]
        name = python_value(self.split.read(group, [self.id_column])[self.id_column], first - group.first_row)
        raise DataError(
            f"{self.split.folder}: {self.id_column} {name!r} is in rows {first:,} and {second:,} "
            f"({len(doubles):,} such pairs): keep one row per id."
        )

    def _hashed(self, group: RowGroup) -> dict[str, np.ndarray]:
        """Return the arrays of one row group."""
        where = str(group)
        ids = one_chunk(self.split.read(group, [self.id_column])[self.id_column])
        keys = id_keys(ids, f"{where}, column {self.id_column!r}")
        found = {"keys": keys}
        if is_text(self.id_kind):
            text = ids.cast(pa.large_string())
            assert not text.offset, "columns are read whole"
            _, offsets, data = text.buffers()
            found["id_offsets"] = np.frombuffer(offsets, np.int64)[: len(text) + 1]
            found["ids"] = np.frombuffer(data or b"", np.uint8)[: found["id_offsets"][-1]]
        elif self.id_kind.bit_width < 64:
            found["ids"] = ids.cast(self.id_kind).to_numpy()
        given = {self.id_column: Ragged.singles(keys)} if self.reuses_keys else None
        table = self.split.read(group, self.reads, dictionaries=True) if self.reads else pa.table({})
        digest = np.zeros(len(ids), np.uint64)
        for each in self._digests(table, group).values():
            digest = mixed(digest, each)
        found["digests"] = digest.astype(np.uint32)
        columns = transform(self.features, self.tables, self.statistics, table, where, given)
        for feature in self.features:
            if feature.num_numbers:
                found[f"number:{feature.name}"] = columns.numbers[feature.name].reshape(-1)
                continue
            kind = np.int32 if feature.has_tokens else bucket_type(self.tables[feature.table_name].buckets)
            for name in self._parts(feature):
                lists = columns.sparse[name]
                found[f"values:{name}"] = lists.values.astype(kind, copy=False)
                if feature.is_ragged:
                    found[f"offsets:{name}"] = lists.offsets
                    if lists.weights is not None:
                        found[f"weights:{name}"] = lists.weights
        return found

    def column_digests(self, group: RowGroup) -> dict[str, np.ndarray]:
        """Return the digest (uint64) of each value of a row group, by column that features read."""
        if not self.digested:
            return {}
        return self._digests(self.split.read(group, self.digested, dictionaries=True), group)

    def _digests(self, table: pa.Table, group: RowGroup) -> dict[str, np.ndarray]:
        return {name: value_digests(one_chunk(table[name]), f"{group}, column {name!r}") for name in self.digested}

    def _parts(self, feature: FeatureSpec) -> list[str]:
        """Return the names of the list features."""
        return [feature.name] if feature.has_tokens else bucket_names(feature.name, self.tables[feature.table_name])

    def ids(self, arrays: Mapping[str, np.ndarray]) -> pa.Array:
        """Return the ids: integers of the files' type, or large strings."""
        if is_text(self.id_kind):
            buffers = [None, pa.py_buffer(arrays["id_offsets"]), pa.py_buffer(arrays["ids"])]
            return pa.Array.from_buffers(pa.large_string(), len(arrays["keys"]), buffers)
        if "ids" in arrays:
            return pa.array(arrays["ids"])
        return pa.array(arrays["keys"].view(self.id_kind.to_pandas_dtype()))

    def columns(self, arrays: Mapping[str, np.ndarray]) -> Columns:
        sparse, numbers = {}, {}
        for feature in self.features:
            if feature.num_numbers:
                numbers[feature.name] = arrays[f"number:{feature.name}"].reshape(-1, feature.num_numbers)
                continue
            for name in self._parts(feature):
                if feature.is_ragged:
                    weights = arrays.get(f"weights:{name}")
                    sparse[name] = Ragged(arrays[f"offsets:{name}"], arrays[f"values:{name}"], weights)
                else:
                    sparse[name] = Ragged(arrays["counting"], arrays[f"values:{name}"], None, True)
        return Columns(self.split.num_rows, sparse, numbers)


def _ahead(work: Callable[[S], T], things: Iterable[S], threads: int) -> Iterator[T]:
    """Yield work(thing) for each thing in order, computed by threads a few things ahead."""
    if threads == 1:
        yield from map(work, things)
        return
    with ThreadPoolExecutor(threads, "catalogue") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for thing in things:
                waiting.append(pool.submit(work, thing))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def check_side(features: list[FeatureSpec], split: Split) -> None:
    """Raise ConfigError or DataError if a feature's column is missing from `split` or has the wrong type."""
    checks = {"weights": check_weights, "times": check_times, "actions": check_actions}
    for feature in features:
        for name in feature.value_columns:
            check_kind(feature, split.require(name, f"feature {feature.name!r} reads"), str(split.folder), name)
        for role, name in feature.side_columns.items():
            kind = split.require(name, f"feature {feature.name!r} reads as {role}")
            if role == "until":
                check_time(feature, name, kind, str(split.folder))
            else:
                checks[role](name, kind, f"{split.folder}, column {feature.source_column!r}")


def find_id(ids: pa.Array, text: str) -> int | None:
    """Return the row of an id from the command line, or None. Bytes that are not UTF-8 are surrogate escapes in it."""
    try:
        value = exact_array([text]).cast(ids.type)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    row = pc.index(ids, value).as_py()
    return None if row < 0 else row
