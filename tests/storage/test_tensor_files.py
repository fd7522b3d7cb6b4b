"""Files of tensors: the safetensors package reads what we write, and nothing in one is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trec_twotower.training.checkpoints.tensor_files import read_tensors, write_tensors

TENSORS = {
    "odd": torch.tensor([True, False, True]),
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(2, 2).half(),
    "narrow": torch.randn(3).bfloat16(),
    "wide@0,4": torch.randn(4, 2, dtype=torch.float64),
    "ids": torch.arange(5),
    "small": torch.arange(3, dtype=torch.int32),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "number": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
}


def assert_equal(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_tensors_come_back_and_the_safetensors_package_reads_them(tmp_path):
    """Also those that do not lie in order, such as a transposed one; and the digest is that of the file."""
    import hashlib

    path = tmp_path / "tensors"
    begins, digest = write_tensors(path, TENSORS)
    assert_equal(read_tensors(path))
    assert_equal(load_file(path))
    content = path.read_bytes()
    assert digest == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    first = begins["matrix"]
    assert content[first : first + 48] == TENSORS["matrix"].numpy().tobytes()
    write_tensors(path, {"turned": TENSORS["matrix"].T})
    assert torch.equal(read_tensors(path)["turned"], TENSORS["matrix"].T)


def test_files_of_the_safetensors_package_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "tensors", metadata={"made": "elsewhere"})
    assert_equal(read_tensors(tmp_path / "tensors"))


def forged(path: Path, entry: Any, content: bytes = bytes(16)) -> Path:
    header = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


X = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 10000,
        [1],
        {"x": 1},
        {"x": {**X, "dtype": "OBJECT"}},
        {"x": {**X, "shape": "2"}},
        {"x": {**X, "shape": [2, -2]}},
        {"x": {**X, "shape": [10**9, 10**9]}},
        {"x": {**X, "shape": [True, 2]}},
        {"x": {**X, "data_offsets": [0, 17]}},
        {"x": {**X, "data_offsets": [4, 20]}},
        {"x": {**X, "data_offsets": [2, 18]}},
        {"x": {**X, "data_offsets": [0]}},
        {"x": {**X, "data_offsets": None}},
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(entry, tmp_path):
    with pytest.raises((ValueError, RecursionError)):
        read_tensors(forged(tmp_path / "tensors", entry))
    assert torch.equal(read_tensors(forged(tmp_path / "tensors", {"x": X}))["x"], torch.zeros(2, 2))


@pytest.mark.parametrize("content", [b"", b"\x01", (1 << 62).to_bytes(8, "little"), b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_kind_is_refused_before_it_is_read(content, tmp_path):
    (tmp_path / "tensors").write_bytes(content)
    with pytest.raises(ValueError):
        read_tensors(tmp_path / "tensors")
