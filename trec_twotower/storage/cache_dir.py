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
    """A cache in `root`, or in the user's cache folder if `root` is None; created at the first use."""

    def __init__(self, root: Path | None, limit_bytes: int) -> None:
        self._configured_root = root
        self.limit_bytes = limit_bytes
        self._in_use: set[Path] = set()

    @cached_property
    def root(self) -> Path:
        """Return the root; raises OSError if it cannot be created, ConfigError if it is configured but not a folder."""
        root = self._configured_root or _user_cache()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            if self._configured_root is None:
                raise
            raise self._unusable(str(error.strerror)) from None
        return root

    def check(self) -> None:
        """Raise ConfigError if the configured folder is unusable; creates nothing."""
        if self._configured_root is not None:
            existing = next(
                place for place in (self._configured_root, *self._configured_root.absolute().parents) if place.exists()
            )
            if not existing.is_dir():
                raise self._unusable(f"{existing} is a file")

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"data.cache is {self._configured_root}, which is not a folder and cannot be created ({why}). "
            "Give another folder, or remove the setting."
        )

    def place(self, facts: Mapping[str, Any]) -> Path:
        """Return the folder for content that depends only on these facts."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return self.root / digest[:16]

    def use(self, folder: Path) -> int:
        """Mark a folder as used, and return its limit in bytes after those that this process uses already.

        Folders that this process does not use are deleted, least recently used first, until all fit the limit.
        """
        self._in_use.add(folder)
        with contextlib.suppress(OSError):  # another user's folder, which is still readable
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
        """Hold the cache's lock, if the file system has locks; the lock of a dead process is released."""
        with (self.root / ".lock").open("a") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def changed(path: Path) -> int:
    """Return a file's modification time in microseconds."""
    return int(path.stat().st_mtime * 1e6)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, without files that another process is removing."""
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
    """Return a folder in $XDG_CACHE_HOME or ~/.cache, or a temporary one if neither is writable."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if home.is_absolute():  # without a home folder, ~ is not expanded
        folder = home / "trec_twotower"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"trec_twotower-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
