"""Digests of files and JSON, and the manifest of a folder: the size and SHA-256 of each file, and its own digest.

A mapping that is stored with a digest of its own content is called signed. The digest, under the key "sha256", is the
SHA-256 of the rest of the mapping as JSON with sorted keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trec_twotower.errors import DataError
from trec_twotower.storage.atomic import read_json, write_json

FORMAT = 1  # version of manifests
MANIFEST = "manifest.json"
Digest = dict[str, Any]  # {"bytes": size of a file, "sha256": digest of its content}


def canonical_json(value: Any) -> bytes:
    """Return the JSON of a value with sorted keys: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True).encode()


def own_sha256(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a mapping without its key "sha256"."""
    content = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def is_signed(value: Any) -> bool:
    """Return whether a value is a mapping that contains its own digest."""
    return isinstance(value, dict) and value.get("sha256") == own_sha256(value)


def write_signed(path: Path, facts: dict[str, Any]) -> None:
    """Write a mapping as a signed JSON file."""
    write_json(path, {**facts, "sha256": own_sha256(facts)})


def read_signed(path: Path, fix: str) -> dict[str, Any]:
    """Return the mapping of a signed JSON file; raises DataError, which ends with `fix`, if a value has changed."""
    facts = read_json(path, fix)
    if not is_signed(facts):
        raise DataError(f"{path} is damaged (its own sha256 differs): {fix}")
    return facts


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path) -> Digest:
    """Return the size and the SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def seal(folder: Path, facts: dict[str, Any], digests: dict[str, Digest] | None = None) -> None:
    """Write the manifest of a folder: `facts`, the size and SHA-256 of each file, and its own digest.

    `digests` holds the digests that the writers of the files computed; the others are computed here.
    """
    known = digests or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: known.get(name) or digest_of(folder / name) for name in names if Path(name).name != MANIFEST}
    write_signed(folder / MANIFEST, {"format": FORMAT, **facts, "files": files})
