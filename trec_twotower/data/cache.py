"""Hashed rows on disk, as memory-mapped Arrow files: what the second epoch reads in place of Parquet.

A folder's name is the fingerprint of everything that its content depends on: the data, and how the config reads them. A
row group is one file, written whole under another name and then renamed, so that any number of ranks may write at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from trec_twotower.config import DataConfig
from trec_twotower.data.dataset import RowGroup
from trec_twotower.data.examples import Examples
from trec_twotower.data.features import Sources
from trec_twotower.data.lists import Lists
from trec_twotower.data.transforms import Columns

FORMAT = 1


class Cache:
    """The hashed row groups of one way of reading one dataset."""

    def __init__(self, folder: Path, limit_bytes: int, groups: list[RowGroup]) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._number = {(group.path, group.number): number for number, group in enumerate(groups)}

    @classmethod
    def open(cls, data: DataConfig, sources: Sources, masks_history: bool) -> Cache:
        """The cache's folder, marked as used; of other fingerprints, the longest unused go until all fit `cache_gb`."""
        assert data.cache is not None
        groups = sources.dataset.train.row_groups
        facts = {
            "format": FORMAT,
            "dataset": sources.dataset.fingerprint,
            # The rows of the catalogue and of users/ are in there, too.
            "changed": [(str(path), _changed(path)) for path in sorted(sources.dataset.folder.rglob("*.parquet"))],
            "rows": data.rows,
            "masks_history": masks_history,
            "features": [feature.model_dump() for feature in sources.schema.user],
            "tables": {name: (spec.buckets, spec.hashing, spec.seed) for name, spec in sources.schema.tables.items()},
            "statistics": {name: asdict(values) for name, values in sources.statistics.items()},
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = Path(data.cache) / digest
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        limit_bytes = int(data.cache_gb * 1e9)
        _sweep(Path(data.cache), folder, limit_bytes)
        return cls(folder, limit_bytes, groups)

    def path(self, group: RowGroup) -> Path:
        return self.folder / f"{self._number[group.path, group.number]:08d}.arrow"

    def get(self, group: RowGroup) -> Examples | None:
        """The row group's rows, mapped and not read; None where they are not cached (or the file is damaged)."""
        path = self.path(group)
        if not path.is_file():
            return None
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batch = reader.get_batch(0)
        except (pa.ArrowException, OSError, IndexError):
            path.unlink(missing_ok=True)
            return None
        return _from_arrow(batch)

    def put(self, group: RowGroup, examples: Examples) -> None:
        """Keep a row group's rows, unless the cache is full or the disk is."""
        path = self.path(group)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{id(examples)}")
        batch = _to_arrow(examples)
        if _size(self.folder) + batch.nbytes > self.limit_bytes:
            return
        try:
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)


def _to_arrow(examples: Examples) -> pa.RecordBatch:
    """One column a feature: single values plain, bags as lists, numbers as pairs."""
    arrays: dict[str, pa.Array] = {}
    for name, lists in examples.user.sparse.items():
        arrays[f"sparse:{name}"] = _list_array(lists)
        if lists.weights is not None:
            arrays[f"weights:{name}"] = _list_array(Lists(lists.offsets, lists.weights))
    for name, number in examples.user.numbers.items():
        arrays[f"number:{name}"] = pa.FixedSizeListArray.from_arrays(pa.array(number.reshape(-1)), 2)
    arrays["positives"] = _list_array(examples.positives)
    if examples.history is not None:
        arrays["history"] = _list_array(examples.history)
    if examples.weight is not None:
        arrays["weight"] = pa.array(examples.weight)
    return pa.record_batch(list(arrays.values()), names=list(arrays))


def _list_array(lists: Lists) -> pa.Array:
    if lists.is_single:
        return pa.array(lists.values)
    return pa.LargeListArray.from_arrays(pa.array(lists.offsets), pa.array(lists.values))


def _from_arrow(batch: pa.RecordBatch) -> Examples:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    sparse, numbers = {}, {}
    for name, array in columns.items():
        kind, _, feature = name.partition(":")
        if kind == "sparse":
            sparse[feature] = _lists(array, columns.get(f"weights:{feature}"))
        elif kind == "number":
            numbers[feature] = array.flatten().to_numpy().reshape(-1, 2)
    history, weight = columns.get("history"), columns.get("weight")
    return Examples(
        Columns(batch.num_rows, sparse, numbers),
        _lists(columns["positives"]),
        None,
        None if history is None else _lists(history),
        None if weight is None else weight.to_numpy(),
    )


def _lists(array: pa.Array, weights: pa.Array | None = None) -> Lists:
    if not pa.types.is_large_list(array.type):
        return Lists.singles(array.to_numpy())
    weight = None if weights is None else weights.values.to_numpy()
    return Lists(array.offsets.to_numpy(), array.values.to_numpy(), weight)


def _changed(path: Path) -> int:
    return int(path.stat().st_mtime * 1e6)


def _size(folder: Path) -> int:
    """Bytes of a folder's files; another rank may rename or sweep one between its listing and its look."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


def _sweep(root: Path, keep: Path, limit_bytes: int) -> None:
    others = [path for path in root.iterdir() if path.is_dir() and path != keep]
    others.sort(key=lambda path: path.stat().st_mtime)
    total = sum(_size(path) for path in (*others, keep))
    for path in others:
        if total <= limit_bytes:
            return
        total -= _size(path)
        shutil.rmtree(path, ignore_errors=True)
