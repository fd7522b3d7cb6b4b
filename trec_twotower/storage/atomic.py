"""Files that are complete or absent: written under a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trec_twotower.errors import DataError

MAX_JSON_BYTES = 64 << 20  # longer files are not written by this package and are not read


def write_file(path: Path, content: str | bytes) -> None:
    """Replace the content of `path` in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # the user does not know the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; its file replaces `path` at the end of the block.

    Where the block raises, the temporary file is removed and `path` is unchanged. An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None  # the user does not know the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file name to an OSError that lacks it, such as one raised by a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` by a value as JSON."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, fix: str = "make it again.", origin: Path | None = None) -> Any:
    """Return the value of a JSON file.

    Raises DataError, which names the file (or `origin`) and ends with `fix`, if it is missing, invalid or too long.
    """
    origin = origin or path
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{origin} is missing: {fix}") from None
    return parse_json(content, origin, fix)


def parse_json(content: bytes, origin: Path, fix: str) -> Any:
    """Return the value of JSON text, which may be cut at MAX_JSON_BYTES + 1; raises DataError naming `origin`."""
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"{origin} is damaged (more than {MAX_JSON_BYTES:,} bytes): {fix}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is damaged ({error}): {fix}") from None


@contextmanager
def naming_a_full_disk(path: Path, temporary: Path) -> Iterator[None]:
    """Add the name of the artifact, the bytes written and the bytes free to the error of a full disk.

    Arrow and FAISS report neither. The previous content of `path` is unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) != errno.ENOSPC and text not in str(error):
            raise
        written = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        free = free_bytes(temporary)
        state = f"{written:,} bytes of it were written and {free:,} are free; make room and run the same command"
        raise OSError(errno.ENOSPC, f"{text} ({state})", str(path)) from error


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free


def sync(path: Path) -> None:
    """Flush a file, or the list of names of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
