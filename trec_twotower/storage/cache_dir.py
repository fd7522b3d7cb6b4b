"""Folders of what is made once from the data and kept: named by fingerprint, for many processes, of limited size."""

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
    """The folder `data.cache`, or the user's own cache folder where none is set; it is made when it is first needed."""

    def __init__(self, root: Path | None, limit_bytes: int) -> None:
        self._given = root
        self.limit_bytes = limit_bytes
        self._in_use: set[Path] = set()

    @cached_property
    def root(self) -> Path:
        """The folder itself; raises OSError where none can be made, ConfigError where the one given is none."""
        root = self._given or _user_cache()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            if self._given is None:
                raise
            raise self._no_folder(str(error.strerror)) from None
        return root

    def check(self) -> None:
        """Raises ConfigError where the folder given is none and cannot be made one; makes none."""
        if self._given is not None:
            there = next(place for place in (self._given, *self._given.absolute().parents) if place.exists())
            if not there.is_dir():
                raise self._no_folder(f"{there} is a file")

    def _no_folder(self, why: str) -> ConfigError:
        return ConfigError(
            f"data.cache is {self._given}, which is no folder and cannot be made one ({why}): name another, or leave "
            "it out."
        )

    def place(self, facts: Mapping[str, Any]) -> Path:
        """The folder of what is made from these facts: everything that its content depends on."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return self.root / digest[:16]

    def use(self, folder: Path) -> int:
        """Mark a folder as used, and return how many bytes it may have beside the others in use here.

        Of the folders that are not in use here, the longest unused go until all fit the limit.
        """
        self._in_use.add(folder)
        with contextlib.suppress(OSError):  # made by somebody else, and good to read all the same
            os.utime(folder)
        others = [path for path in self.root.iterdir() if path.is_dir() and path not in self._in_use]
        others.sort(key=_last_used)
        beside = sum(size_of(path) for path in self._in_use - {folder})
        total = sum(map(size_of, others)) + beside + size_of(folder)
        for path in others:
            if total <= self.limit_bytes:
                break
            total -= size_of(path)
            shutil.rmtree(path, ignore_errors=True)
        return self.limit_bytes - beside

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process (or thread) at a time makes things here, where the disk knows locks; a dead one holds none."""
        with (self.root / ".lock").open("a") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def changed(path: Path) -> int:
    """When a file was last changed, in microseconds."""
    return int(path.stat().st_mtime * 1e6)


def size_of(folder: Path) -> int:
    """Bytes of a folder's files; another process may rename or sweep one between its listing and its look."""
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
    """A folder in $XDG_CACHE_HOME or ~/.cache; where that cannot be written to, one among the temporary files."""
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
