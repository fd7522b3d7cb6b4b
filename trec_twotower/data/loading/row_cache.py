"""A cache of hashed rows in memory-mapped Arrow files, which replaces Parquet from the second epoch on.

The name of a cache folder is the fingerprint of everything that its content depends on: the data, and how the config
reads it. Each row group is one file. It is written under a temporary name and then renamed, so that several ranks may
write at the same time. Its last eight bytes are the XXH3-64 checksum of the rest.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from trec_twotower.config.data import DataConfig
from trec_twotower.data.dataset import PARTS_OF_ROWS
from trec_twotower.data.feature_dataset import FeatureDataset, open_cache
from trec_twotower.data.loading.examples import Examples
from trec_twotower.data.loading.step_buckets import WEIGHTS, Layout, assembled, parts_of
from trec_twotower.data.split import RowGroup
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.cache_dir import changed, size_of

FORMAT = 4
DIGEST_BYTES = 8


class Cache:
    """The cached row groups of one dataset, as one config reads it."""

    def __init__(self, folder: Path, limit_bytes: int, groups: list[RowGroup]) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._number = {(group.path, group.number): number for number, group in enumerate(groups)}
        self._verified: set[tuple[int, int]] = set()  # files whose checksum matched: inode and modification time

    @classmethod
    def open(cls, data: DataConfig, sources: FeatureDataset, settings: Mapping[str, object]) -> Cache:
        """Open the cache's folder; delete the least recently used others until all fit `cache_gb`.

        `settings` are the further settings that decide which columns are cached, and how.
        """
        cache_dir = sources.cache or open_cache(data)
        groups = sources.dataset.train.row_groups
        dependencies = {
            "format": FORMAT,
            "dataset": sources.dataset.fingerprint,
            # Cached rows contain rows of the catalogue and of users/.
            "changed": [
                (str(path), path.stat().st_size, changed(path))
                for part in (*PARTS_OF_ROWS, "items", "users")
                for path in sources.dataset.paths(part)
            ],
            "rows": data.rows,
            **settings,
            "features": [feature.model_dump() for feature in sources.schema.user],
            "tables": {
                name: (spec.buckets, spec.hashing, spec.seed, spec.hashes)
                for name, spec in sources.schema.tables.items()
            },
            "statistics": {name: asdict(values) for name, values in sources.statistics.items()},
        }
        folder = cache_dir.place(dependencies)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, cache_dir.use(folder), groups)

    def path(self, group: RowGroup) -> Path:
        """Return the path of a row group's file."""
        return self.folder / f"{self._number[group.path, group.number]:08d}.arrow"

    def get(self, group: RowGroup) -> Examples | None:
        """Return the row group's rows from the mapped file; None if it is not cached.

        The first time that this process opens a file, it verifies the checksum and deletes a damaged file.
        """
        path = self.path(group)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # an empty file cannot be mapped
            path.unlink(missing_ok=True)
            return None
        content = pa.py_buffer(mapped).slice(0, max(len(mapped) - DIGEST_BYTES, 0))
        version = (status.st_ino, status.st_mtime_ns)
        if version not in self._verified:
            if xxhash.xxh3_64_digest(content) != mapped[len(content) :]:
                path.unlink(missing_ok=True)
                return None
            self._verified.add(version)
        return _from_arrow(pa.ipc.open_file(pa.BufferReader(content)).get_batch(0))

    def put(self, group: RowGroup, rows: Examples) -> None:
        """Cache a row group's rows, unless the cache or the disk is full."""
        path = self.path(group)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{id(rows)}")
        batch = _to_arrow(rows)
        if size_of(self.folder) + batch.nbytes > self.limit_bytes:
            return
        try:
            with _DigestedFile(io.FileIO(temporary, "w")) as file:
                with pa.ipc.new_file(file, batch.schema) as writer:
                    writer.write_batch(batch)
                file.write(file.digest.digest())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)


class _DigestedFile(io.BufferedWriter):
    """A file that computes the checksum of its content while writing."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.digest = xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)


def _to_arrow(rows: Examples) -> pa.RecordBatch:
    """Return a record batch with one column per field; the schema's metadata holds the layout."""
    layout, columns = Layout.of(rows), {}
    for field, (name, part) in zip(layout.fields, parts_of(rows), strict=True):
        values = pa.array((part.values if isinstance(part, Ragged) else part).reshape(-1))
        if not field.count:
            if part.weights is not None:
                values = pa.StructArray.from_arrays([values, pa.array(part.weights)], ["value", "weight"])
            values = pa.LargeListArray.from_arrays(pa.array(part.offsets), values)
        elif field.count > 1:
            values = pa.FixedSizeListArray.from_arrays(values, field.count)
        columns[name] = values
    schema = pa.schema([(name, values.type) for name, values in columns.items()], {"layout": layout.to_json()})
    return pa.record_batch(list(columns.values()), schema=schema)


def _from_arrow(batch: pa.RecordBatch) -> Examples:
    layout = Layout.from_json(batch.schema.metadata[b"layout"].decode())
    values, offsets = {}, []
    for field, column in zip(layout.fields, batch.columns, strict=True):
        if not field.count:
            offsets.append(column.offsets.to_numpy())
        flat = column if field.count == 1 else column.values
        if field.weight is not None:
            values[field.name + WEIGHTS] = flat.field("weight").to_numpy()
            flat = flat.field("value")
        values[field.name] = flat.to_numpy()
    return assembled(layout, batch.num_rows, values, offsets)
