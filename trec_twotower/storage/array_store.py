"""Named arrays that are written in parts, to memory or to files that all processes of a host map.

A folder of mapped arrays is written under a temporary name, flushed and renamed. Its manifest has the type, size and
XXH3-64 of each array. Files that differ from it are not used. A mapped file is never written.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from trec_twotower.storage.artifacts import new_folder
from trec_twotower.storage.atomic import read_json, write_json
from trec_twotower.storage.cache_dir import CacheFolder
from trec_twotower.storage.manifest import MANIFEST, canonical_json

FORMAT = 1
BLOCK_BYTES = 1 << 22  # bytes per read
VERIFIED_BYTES = 1 << 30  # in a larger file, evenly spaced blocks of this total size are verified


class ArrayWriter(ABC):
    """Stores arrays: arrays of known length are filled in place, the others are appended in parts."""

    @abstractmethod
    def reserve(self, name: str, dtype: type[np.generic], length: int) -> np.ndarray:
        """Return a new array of zeros."""

    @abstractmethod
    def append(self, name: str, part: np.ndarray) -> None:
        """Append `part` to the array `name`; all parts have one type."""


class InMemory(ArrayWriter):
    """Arrays in the memory of this process."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def reserve(self, name: str, dtype: type[np.generic], length: int) -> np.ndarray:
        array = np.zeros(length, dtype)
        self._parts[name] = [array]
        return array

    def append(self, name: str, part: np.ndarray) -> None:
        self._parts.setdefault(name, []).append(part)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in self._parts.items()}


class OnDisk(ArrayWriter):
    """Arrays in files of a folder; raises OSError when the disk, or `limit_bytes`, is full."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._num_bytes = 0
        self._dtypes: dict[str, np.dtype] = {}
        self._files: dict[str, BinaryIO] = {}

    def reserve(self, name: str, dtype: type[np.generic], length: int) -> np.ndarray:
        num_bytes = length * np.dtype(dtype).itemsize
        self._grow(num_bytes)
        with self._path(name, np.dtype(dtype)).open("w+b") as file:
            # Allocate the disk space first: on a full disk, writing a mapped page would kill the process.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype)

    def append(self, name: str, part: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = self._path(name, part.dtype).open("wb")
        assert part.dtype == self._dtypes[name], f"{name}: {part.dtype} after {self._dtypes[name]}"
        self._grow(part.nbytes)
        self._files[name].write(np.ascontiguousarray(part).data)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def finish(self) -> None:
        """Write the manifest; files without one are ignored."""
        self.close()
        arrays = {}
        for name, dtype in self._dtypes.items():
            path = self._path(name, dtype)
            arrays[name] = {"file": path.name, "dtype": dtype.str, "bytes": path.stat().st_size, "xxh3": _digest(path)}
        write_json(self.folder / MANIFEST, {"arrays": arrays, "xxh3": _digest_of_list(arrays)})

    def _path(self, name: str, dtype: np.dtype) -> Path:
        """Return the path of an array: a number, because feature names may contain any character."""
        self._dtypes.setdefault(name, dtype)
        return self.folder / f"{list(self._dtypes).index(name):04d}.bin"

    def _grow(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self.limit_bytes:
            raise OSError(errno.EFBIG, f"it would hold more than {self.limit_bytes / 1e9:g} GB (data.cache_gb)")


def mapped_arrays(
    cache: CacheFolder, facts: Mapping[str, Any], fill: Callable[[ArrayWriter], None]
) -> dict[str, np.ndarray]:
    """Return the mapped arrays that `fill` writes for these facts; one process writes them while the others wait.

    Raises OSError if the cache folder cannot hold them.
    """
    folder = cache.place(facts)
    arrays = open_arrays(folder)
    if arrays is None:
        with cache.alone():
            arrays = open_arrays(folder) or _create(cache, folder, fill)
    cache.use(folder)
    return arrays


def _create(cache: CacheFolder, folder: Path, fill: Callable[[ArrayWriter], None]) -> dict[str, np.ndarray]:
    with new_folder(folder) as temporary:
        writer = OnDisk(temporary, cache.limit_bytes)
        try:
            fill(writer)
            writer.finish()
        finally:
            writer.close()
    arrays = open_arrays(folder)
    if arrays is None:
        raise OSError(errno.EIO, f"{folder} cannot be read back")
    return arrays


def open_arrays(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the mapped, read-only arrays of a folder that OnDisk wrote; None if it is missing or damaged."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["xxh3"] != _digest_of_list(manifest["arrays"]):
            return None
        return {name: _map(folder, entry) for name, entry in manifest["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(folder: Path, entry: dict[str, Any]) -> np.ndarray:
    """Return the mapped content of a file; raises ValueError if it differs from the manifest."""
    path = folder / entry["file"]
    with path.open("rb") as file:
        # Check the length first: reading a mapped page past the end of the file kills the process.
        if os.fstat(file.fileno()).st_size != entry["bytes"] or _digest(path) != entry["xxh3"]:
            raise ValueError(f"{path} differs from its manifest")
        if not entry["bytes"]:
            return np.empty(0, entry["dtype"])
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), entry["dtype"])


def _digest(path: Path) -> str:
    """Return the XXH3-64 of a file, or of blocks of it (see VERIFIED_BYTES), without mapping: a bad disk must raise."""
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        num_blocks = -(-os.fstat(file.fileno()).st_size // BLOCK_BYTES)
        num_read = min(num_blocks, VERIFIED_BYTES // BLOCK_BYTES)
        for number in range(num_read):
            if num_read < num_blocks:
                file.seek(number * (num_blocks - 1) // (num_read - 1) * BLOCK_BYTES)
            digest.update(block[: file.readinto(block)])
    return digest.hexdigest()


def _digest_of_list(arrays: dict[str, Any]) -> str:
    """Return the XXH3-64 of the manifest's list of arrays and of the format."""
    return xxhash.xxh3_64_hexdigest(canonical_json([FORMAT, arrays]))
