"""Files that are whole or not there: written beside their place, flushed, then renamed."""

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
        with naming(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
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


def read_json(path: Path, mend: str = "make it again.") -> Any:
    """The value of a JSON file; raises DataError when it is missing, broken or larger than any of ours."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {mend}") from None
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"{path} is damaged (more than {MAX_JSON_BYTES:,} bytes): {mend}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): {mend}") from None


def write_signed(path: Path, facts: dict[str, Any]) -> None:
    """A JSON file with a digest of what it says."""
    write_json(path, {**facts, "sha256": _own_sha256(facts)})


def read_signed(path: Path, mend: str) -> dict[str, Any]:
    """What `write_signed` has written; raises DataError when a value has changed."""
    facts = read_json(path, mend)
    if not isinstance(facts, dict) or facts.get("sha256") != _own_sha256(facts):
        raise DataError(f"{path} is damaged (its own sha256 differs): {mend}")
    return facts


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path`, in place of an older one, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming_a_full_disk(path, temporary):
            yield temporary
            publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming_a_full_disk(path: Path, temporary: Path) -> Iterator[None]:
    """Let the error of a full disk say what was being written where, and how far it came.

    Arrow and FAISS name neither; what stood at `path` before is untouched.
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
    """On the disk where `path` lies, or would."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free


def publish_folder(temporary: Path, path: Path) -> None:
    """Rename a complete folder to its place; an older one there is taken away only then."""
    for inside in (*temporary.rglob("*"), temporary):
        sync(inside)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


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


def open_sealed(folder: Path, mend: str) -> dict[str, Any]:
    """The manifest of a folder that is just as `seal` left it; else DataError, naming the file and the `mend`."""
    manifest = read_manifest(folder, mend)
    for name in manifest["files"]:
        verify_sealed(folder, manifest, name, mend)
    return manifest


def read_manifest(folder: Path, mend: str, format: int = FORMAT) -> dict[str, Any]:
    """The manifest of a sealed folder, itself unaltered, whose files lie in that folder; they are not read yet."""
    path = folder / MANIFEST
    manifest = read_signed(path, mend)
    if manifest.get("format") != format:
        raise DataError(f"{path} is of format {manifest.get('format')}, but this version reads {format}: {mend}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_digest, files.values())):
        raise DataError(f"{path} does not list its files with their bytes and sha256: {mend}")
    for name in files:
        if not _stays_inside(folder, name):
            raise DataError(f"{path} lists {name!r}, which is not in its folder: do not trust it; {mend}")
    return manifest


def verify_sealed(folder: Path, manifest: dict[str, Any], name: str, mend: str) -> None:
    """Raises DataError unless the file `name` is as the manifest of its folder says."""
    path, expected = folder / name, manifest["files"][name]
    if not path.is_file():
        raise DataError(f"{path} is missing, though the manifest lists it: {mend}")
    num_bytes = path.stat().st_size
    if num_bytes != expected["bytes"]:
        raise DataError(f"{path} has {num_bytes:,} bytes, {expected['bytes']:,} were written: {mend}")
    if (digest := sha256_of(path)) != expected["sha256"]:
        raise DataError(f"{path} is damaged (sha256 {digest[:12]}, was {expected['sha256'][:12]}): {mend}")


def _is_digest(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def _stays_inside(folder: Path, name: str) -> bool:
    """Whether folder / name is a place inside, also where a part of it is a link."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
