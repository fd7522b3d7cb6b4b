"""The cache of derived data: folders named by fingerprint, shared by processes, limited in size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from trec_twotower.errors import ConfigError


class CacheFolder:
    """A cache in `root`, or in the user's cache folder where `root` is None; created at the first use."""

    def __init__(self, root: Path | None, limit_bytes: int) -> None:
        self._given = root
        self.limit_bytes = limit_bytes
        self._in_use: set[Path] = set()

    @cached_property
    def root(self) -> Path:
        """The root; raises OSError where it cannot be created, ConfigError where the given one is not a folder."""
        root = self._given or _user_cache()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            if self._given is None:
                raise
            raise self._no_folder(str(error.strerror)) from None
        return root

    def check(self) -> None:
        """Raise ConfigError where the given folder cannot be used; creates nothing."""
        if self._given is not None:
            there = next(place for place in (self._given, *self._given.absolute().parents) if place.exists())
            if not there.is_dir():
                raise self._no_folder(f"{there} is a file")

    def _no_folder(self, why: str) -> ConfigError:
        return ConfigError(
            f"data.cache is {self._given}, which is not a folder and cannot be created ({why}). "
            "Give another folder, or remove the setting."
        )

    def place(self, facts: Mapping[str, Any]) -> Path:
        """Return the folder for content that depends on these facts alone."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return self.root / digest[:16]

    def use(self, folder: Path) -> int:
        """Mark a folder as used, and return its limit in bytes, given the other folders in use by this process.

        Folders that this process does not use are deleted, least recently used first, until all fit the limit.
        """
        self._in_use.add(folder)
        with contextlib.suppress(OSError):  # another user's folder, which can be read all the same
            os.utime(folder)
        others = [path for path in self.root.iterdir() if path.is_dir() and path not in self._in_use]
        others.sort(key=_last_used)
        in_use_bytes = sum(size_of(path) for path in self._in_use - {folder})
        total = sum(map(size_of, others)) + in_use_bytes + size_of(folder)
        for path in others:
            if total <= self.limit_bytes:
                break
            total -= size_of(path)
            shutil.rmtree(path, ignore_errors=True)
        return self.limit_bytes - in_use_bytes

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the cache's lock, where the file system has locks; the lock of a dead process is released."""
        with (self.root / ".lock").open("a") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def changed(path: Path) -> int:
    """Return a file's modification time in microseconds."""
    return int(path.stat().st_mtime * 1e6)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, without those that another process removes meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _user_cache() -> Path:
    """Return a folder in $XDG_CACHE_HOME or ~/.cache, or a temporary one where neither is writable."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if home.is_absolute():  # without a home, ~ stays as it is
        found = home / "trec_twotower"
        with contextlib.suppress(OSError):
            found.mkdir(parents=True, exist_ok=True)
            if os.access(found, os.W_OK):
                return found
    found = Path(tempfile.gettempdir()) / f"trec_twotower-{os.getuid()}"
    found.mkdir(mode=0o700, exist_ok=True)
    if found.stat().st_uid != os.getuid():
        raise PermissionError(f"{found} belongs to another user")
    return found
