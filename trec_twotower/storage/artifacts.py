"""Sealed folders: published atomically, verified when opened, and still readable after they are replaced.

An artifact (export, index, encoder, checkpoint) is a folder with a manifest. It is written under a temporary name next
to its final path, flushed, and renamed. A reader opens all files of a folder before it verifies any. It therefore reads
the content that it verified, even after another process has published a newer folder under the same name.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import resource
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.storage.atomic import MAX_JSON_BYTES, naming_a_full_disk, parse_json, sync
from trec_twotower.storage.fault_point import fault_point
from trec_twotower.storage.lock import FolderLock
from trec_twotower.storage.manifest import FORMAT, MANIFEST, is_signed

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of renameat2(2)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_SPARE_FILES = 256  # file descriptors kept free for other uses
_RETRIES = 50  # attempts of a reader that finds a folder being replaced
_RETRY_S = 0.02  # seconds between attempts


# ------------------------------------------------------------ writing


class NewFolder:
    """A folder that is written under a temporary name and becomes `path` atomically, replacing an older one.

    No other process can write `path` between `begin` and `end`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = sole_writer(path)
        self._temporary: Path | None = None

    def begin(self) -> Path:
        """Return the empty temporary folder; raises ConfigError if `path` is a file or another process writes it."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, but a folder is to be written there: move it away.")
        self._writer.__enter__()
        self._temporary = temporary = _temporary_path(self.path, "tmp")
        _active_folders.add(temporary)
        temporary.mkdir()
        return temporary

    def publish(self) -> None:
        """Rename the folder to its path. An older folder stays complete until then and is removed afterwards."""
        assert self._temporary is not None
        publish_folder(self._temporary, self.path)

    def end(self) -> None:
        """Remove the temporary folder if it was not published, and release the lock."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            _active_folders.discard(self._temporary)
            self._temporary = None
            self._writer.__exit__(None, None, None)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `path`, replacing an older one, when the block ends without an error."""
    folder = NewFolder(path)
    try:
        temporary = folder.begin()
        with naming_a_full_disk(path, temporary):
            yield temporary
            folder.publish()
    finally:
        folder.end()


_active_folders: set[Path] = set()  # temporary folders that this process is writing
_writers: dict[Path, tuple[FolderLock, int]] = {}  # locks of this process, and the number of blocks that use them
_guard = threading.Lock()


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path` during the block; raises ConfigError naming the one that does.

    It first cleans up after a killed process: an older folder that was renamed gets its name back, and temporary
    folders are removed. Blocks of one process may be nested.
    """
    path = path.absolute()
    with _guard:
        if path not in _writers:
            name = path.with_name(f".{path.name}.lock")
            lock = FolderLock(name, f"{path} is being written", "wait for it or end it, and try again.")
            lock.acquire()
            try:
                recover(path)
            except BaseException:
                lock.release()
                raise
            _writers[path] = lock, 0
        lock, blocks = _writers[path]
        _writers[path] = lock, blocks + 1
    try:
        yield
    finally:
        with _guard:
            lock, blocks = _writers.pop(path)
            if blocks > 1:
                _writers[path] = lock, blocks - 1
            else:
                lock.release()


def recover(path: Path) -> None:
    """Clean up after a killed writer of `path`; the caller holds its lock."""
    old_folders = sorted(_leftovers(path, "old"), key=lambda each: each.lstat().st_mtime)
    if old_folders and not path.exists():
        os.replace(old_folders.pop(), path)
        sync(path.parent)
    for leftover in (*old_folders, *_leftovers(path, "tmp")):
        if leftover not in _active_folders:
            with suppress(OSError):  # the next writer tries again
                remove_folder(leftover)


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush a complete folder and rename it to `path`; an older folder there is removed only afterwards."""
    for inside in (*temporary.rglob("*"), temporary):
        sync(inside)
    fault_point("publish:written")
    old = temporary
    if not path.exists():
        os.replace(temporary, path)
    elif path.is_symlink() or not _exchange(temporary, path):  # the target of a link is not moved
        old = _temporary_path(path, "old")
        os.replace(path, old)
        fault_point("publish:aside")
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old, path)
            raise
    sync(path.parent)
    fault_point("publish:named")
    with suppress(OSError):  # `recover` tries again
        remove_folder(old)


def remove_folder(path: Path) -> None:
    """Remove a folder; of a link, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; returns False if the kernel or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _temporary_path(path: Path, what: str) -> Path:
    """Return a new name next to `path`; the time distinguishes processes of two containers with the same pid."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}-{time.time_ns()}")


def _leftovers(path: Path, what: str) -> list[Path]:
    """Return the existing paths with names of `_temporary_path`."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{what}-*"))


# ------------------------------------------------------------ reading


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest and the digest of its bytes."""

    facts: dict[str, Any]
    sha256: str


class SealedFolder:
    """A sealed folder with all its files open: they stay readable after the folder is replaced or removed."""

    def __init__(self, folder: Path, manifest: Manifest, files: Mapping[str, int], fix: str) -> None:
        self.folder = folder
        self.manifest = manifest.facts
        self.sha256 = manifest.sha256  # digest of the manifest's bytes, which identifies the content
        self.fix = fix
        self._files = files  # file descriptors by name
        self.close = weakref.finalize(self, _close, list(files.values()))

    @classmethod
    def open(cls, folder: Path, fix: str, *, format: int = FORMAT, verified: bool = True) -> Self:
        """Open a folder that `seal` wrote, and verify every byte if `verified`.

        Raises FileNotFoundError if the folder or its manifest is missing, and DataError, which ends with `fix`, if a
        file is missing, damaged or outside the folder.
        """
        sealed = cls._open_unverified(folder, fix, format)
        if verified:
            for name in sealed.names:
                sealed.verify(name)
        return sealed

    @classmethod
    def _open_unverified(cls, folder: Path, fix: str, format: int) -> Self:
        for _ in range(_RETRIES):
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if not _leftovers(folder, "old"):
                    raise
                _recover_if_abandoned(folder)
                time.sleep(_RETRY_S)
                continue
            try:
                manifest, files = _open_files(folder, handle, fix, format)
                return cls(folder, manifest, files, fix)
            except (DataError, FileNotFoundError):
                if _is_same_folder(folder, handle):
                    raise
                time.sleep(_RETRY_S)  # the folder was replaced while it was being opened
            finally:
                os.close(handle)
        raise DataError(f"{folder} was replaced {_RETRIES} times while it was opened: {fix}")

    @property
    def names(self) -> list[str]:
        """Return the names of the files that the manifest lists."""
        return sorted(self._files)

    def path(self, name: str) -> Path:
        """Return a path to the opened file, even if another file has its name now."""
        return Path(f"/proc/self/fd/{self.descriptor(name)}")

    def descriptor(self, name: str) -> int:
        """Return the open file descriptor of a file."""
        if name not in self._files:
            raise DataError(f"{self.folder / MANIFEST} does not list {name!r}: {self.fix}")
        return self._files[name]

    def num_bytes(self, name: str) -> int:
        """Return the size of a file."""
        return os.fstat(self.descriptor(name)).st_size

    def verify(self, name: str) -> None:
        """Raise DataError if the size or the SHA-256 of a file differs from the manifest."""
        path, expected = self.folder / name, self.manifest["files"][name]
        self.verify_size(name)
        with open(self.path(name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected["sha256"]:
            raise DataError(f"{path} is damaged (sha256 {digest[:12]}, was {expected['sha256'][:12]}): {self.fix}")

    def verify_size(self, name: str) -> None:
        """Raise DataError if the size of a file differs from the manifest."""
        expected = self.manifest["files"][name]["bytes"]
        if (found := self.num_bytes(name)) != expected:
            raise DataError(f"{self.folder / name} has {found:,} bytes, {expected:,} were written: {self.fix}")


def open_sealed(folder: Path, fix: str) -> SealedFolder:
    """Return a sealed folder, every byte verified; raises DataError if it is missing or damaged."""
    try:
        return SealedFolder.open(folder, fix)
    except FileNotFoundError:
        raise DataError(f"{folder / MANIFEST} is missing: {fix}") from None


def read_manifest(folder: Path, fix: str, format: int = FORMAT) -> dict[str, Any]:
    """Return the verified manifest of a sealed folder; the files are not opened."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise DataError(f"{folder / MANIFEST} is missing: {fix}") from None
    try:
        return _manifest_in(folder, handle, fix, format).facts
    except FileNotFoundError:
        raise DataError(f"{folder / MANIFEST} is missing: {fix}") from None
    finally:
        os.close(handle)


def _open_files(folder: Path, handle: int, fix: str, format: int) -> tuple[Manifest, dict[str, int]]:
    """Return the manifest of the folder with the descriptor `handle`, and a descriptor of each of its files."""
    manifest = _manifest_in(folder, handle, fix, format)
    _allow_files(len(manifest.facts["files"]))
    files: dict[str, int] = {}
    try:
        for name in manifest.facts["files"]:
            try:
                files[name] = os.open(name, os.O_RDONLY, dir_fd=handle)
            except FileNotFoundError:
                raise DataError(f"{folder / name} is missing, though the manifest lists it: {fix}") from None
    except BaseException:
        _close(list(files.values()))
        raise
    return manifest, files


def _manifest_in(folder: Path, handle: int, fix: str, format: int) -> Manifest:
    path = folder / MANIFEST
    with open(os.open(MANIFEST, os.O_RDONLY, dir_fd=handle), "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    manifest = parse_json(content, path, fix)
    if not is_signed(manifest):
        raise DataError(f"{path} is damaged (its own sha256 differs): {fix}")
    if manifest.get("format") != format:
        raise DataError(
            f"{path} is of format {manifest.get('format')}, but this version reads {format}: use the version that "
            f"wrote it, or {fix}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_digest, files.values())):
        raise DataError(f"{path} does not list its files with their bytes and sha256: {fix}")
    for name in files:
        if not _stays_inside(folder, name):
            raise DataError(f"{path} lists {name!r}, which is not in its folder: do not trust it; {fix}")
    return Manifest(manifest, hashlib.sha256(content).hexdigest())


def _recover_if_abandoned(path: Path) -> None:
    """Restore the name of a folder whose writer was killed between two renames."""
    with suppress(ConfigError, OSError), sole_writer(path):  # a live writer, or a read-only folder
        pass


def _is_same_folder(folder: Path, handle: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(handle))
    return False


def _allow_files(count: int) -> None:
    """Increase this process's limit of open files if `count` more would exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + _SPARE_FILES
    if needed > soft != resource.RLIM_INFINITY:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _is_digest(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def _stays_inside(folder: Path, name: str) -> bool:
    """Return whether folder / name is inside the folder, even after links are resolved."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())
