"""Files that are whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

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


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, mend: str = "make it again.") -> Any:
    """The value of a JSON file; raises DataError when it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {mend}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {mend}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path`, in place of an older one, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the folder's manifest: `facts`, the size and SHA-256 of every file in it, and its own."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {"format": FORMAT, **facts, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _own_sha256(manifest)})


def open_sealed(folder: Path, mend: str) -> dict[str, Any]:
    """The manifest of a folder that is just as `seal` left it; else DataError, naming the file and the `mend`."""
    path = folder / MANIFEST
    manifest = read_json(path, mend)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _own_sha256(manifest):
        raise DataError(f"{path} is damaged (its own sha256 differs): {mend}")
    if manifest["format"] != FORMAT:
        raise DataError(f"{path} is of format {manifest['format']}, but this version reads {FORMAT}: {mend}")
    for name, expected in manifest["files"].items():
        _verify(folder / name, expected, mend)
    return manifest


def _verify(path: Path, expected: dict[str, Any], mend: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing, though the manifest lists it: {mend}")
    num_bytes = path.stat().st_size
    if num_bytes != expected["bytes"]:
        raise DataError(f"{path} has {num_bytes:,} bytes, {expected['bytes']:,} were written: {mend}")
    if (digest := sha256_of(path)) != expected["sha256"]:
        raise DataError(f"{path} is damaged (sha256 {digest[:12]}, was {expected['sha256'][:12]}): {mend}")


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
