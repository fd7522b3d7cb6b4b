"""Files of tensors in the safetensors format: a JSON header, then plain bytes. Reading one executes nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trec_twotower.storage.atomic import MAX_JSON_BYTES, naming
from trec_twotower.storage.manifest import Digest

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes: of the header, and so of the first tensor
_LENGTH_BYTES = 8  # of the number in front of the header


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], after_each: Callable[[], None] = lambda: None
) -> tuple[dict[str, int], Digest]:
    """Write tensors of the CPU; returns at which byte each begins, and the digest of what was meant to be written.

    Those of larger numbers come first, so that each is aligned to its numbers. `after_each` is called after each.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // _ALIGNMENT) * _ALIGNMENT)
    header = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    sha256 = hashlib.sha256(header)
    with naming(path), path.open("wb") as file:
        file.write(header)
        for name in order:
            content = _bytes_of(tensors[name])
            sha256.update(content)
            write_bytes(file, content)
            after_each()
    begins = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    return begins, {"bytes": len(header) + end, "sha256": sha256.hexdigest()}


def write_bytes(file: BinaryIO, content: memoryview) -> None:
    """Write one tensor's bytes. Tests put disks in its place that are full, or alter what they get."""
    file.write(content)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory. Raises ValueError if the file does not hold them completely."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(num_bytes - _LENGTH_BYTES, MAX_JSON_BYTES):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    first = _LENGTH_BYTES + length
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=num_bytes)
    return {name: _tensor(storage, name, entry, first) for name, entry in header.items() if name != "__metadata__"}


def _tensor(storage: torch.UntypedStorage, name: str, entry: Any, first: int) -> Tensor:
    if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES or not is_size(entry.get("shape")):
        raise ValueError(f"it does not describe {name!r}")
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    place: Any = entry.get("data_offsets")
    if not is_size(place) or len(place) != 2:
        raise ValueError(f"it does not say where {name!r} is")
    begin, end = first + place[0], first + place[1]
    if end - begin != math.prod(shape) * dtype.itemsize or end > storage.nbytes() or begin % dtype.itemsize:
        raise ValueError(f"{name!r} is not whole inside it")
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, begin // dtype.itemsize, shape, strides)


def is_size(value: Any) -> bool:
    """Return whether a JSON value is a valid tensor size."""
    return isinstance(value, list) and all(type(length) is int and 0 <= length < 1 << 62 for length in value)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
