"""Files that are whole or not there: written next to their place, flushed, then renamed. And folders' manifests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trec_twotower.errors import DataError

FORMAT = 1  # of manifests and what they seal
MAX_JSON_BYTES = 64 << 20  # a longer one is none of ours, and is not read into memory


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # nobody knows the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it befell: one that comes while an open file is written does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, mend: str = "make it again.", origin: Path | None = None) -> Any:
    """The value of a JSON file; raises DataError, which names it (or `origin`), when it is missing, broken or huge."""
    origin = origin or path
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{origin} is missing: {mend}") from None
    return parse_json(content, origin, mend)


def parse_json(content: bytes, origin: Path, mend: str) -> Any:
    """The value of JSON that was read up to MAX_JSON_BYTES + 1; raises DataError naming its `origin`."""
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"{origin} is damaged (more than {MAX_JSON_BYTES:,} bytes): {mend}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is damaged ({error}): {mend}") from None


def write_signed(path: Path, facts: dict[str, Any]) -> None:
    """A JSON file with a digest of what it says."""
    write_json(path, {**facts, "sha256": _own_sha256(facts)})


def read_signed(path: Path, mend: str) -> dict[str, Any]:
    """What `write_signed` has written; raises DataError when a value has changed."""
    facts = read_json(path, mend)
    if not is_signed(facts):
        raise DataError(f"{path} is damaged (its own sha256 differs): {mend}")
    return facts


@contextmanager
def naming_a_full_disk(path: Path, temporary: Path) -> Iterator[None]:
    """Let the error of a full disk name the artefact, how much was written and how much is free.

    Arrow and FAISS report neither. What was at `path` before is unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) != errno.ENOSPC and text not in str(error):
            raise
        written = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        free = free_bytes(temporary)
        far = f"{written:,} bytes of it were written and {free:,} are free; make room and run the same command"
        raise OSError(errno.ENOSPC, f"{text} ({far})", str(path)) from error


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on, or would be on."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MANIFEST = "manifest.json"
Digest = dict[str, Any]  # {"bytes": how many, "sha256": of all of them}


def digest_of(path: Path) -> Digest:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def seal(folder: Path, facts: dict[str, Any], digests: dict[str, Digest] | None = None) -> None:
    """Write the folder's manifest: `facts`, the size and SHA-256 of every file in it, and its own.

    `digests` has those that whoever wrote the files took while writing; of other files they are taken here.
    """
    known = digests or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: known.get(name) or digest_of(folder / name) for name in names if Path(name).name != MANIFEST}
    write_signed(folder / MANIFEST, {"format": FORMAT, **facts, "files": files})


def is_signed(value: Any) -> bool:
    """Whether a value is what `write_signed` has written: a mapping that agrees with its own digest."""
    return isinstance(value, dict) and value.get("sha256") == _own_sha256(value)


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
