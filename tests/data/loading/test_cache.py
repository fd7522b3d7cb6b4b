"""A cached row group comes back as it was written, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.loading.test_reader import BOTH, batches_of, contents, folder  # noqa: F401 - a fixture
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.loading import row_cache as caching
from trec_twotower.data.loading.examples import Examples
from trec_twotower.data.loading.row_cache import Cache
from trec_twotower.data.split import RowGroup
from trec_twotower.ops.ragged import Ragged

GROUP = RowGroup(Path("train/part.parquet"), 0, 0, 3)


def examples() -> Examples:
    """Three rows with a column of every kind."""
    sparse = {
        "country": Ragged.singles(np.array([5, 0, 7], np.int32)),
        "words": Ragged(np.array([0, 2, 2, 3]), np.array([4, 1, 9], np.int32), np.array([0.5, 2, 1], np.float32)),
    }
    numbers = {"age": np.array([[0.25, 0], [0, 1], [-1.5, 0]], np.float32)}
    history = Ragged(np.array([0, 1, 3, 3]), np.array([11, 2**31, 13], np.uint32))
    weight = np.array([1, 0.5, 2], np.float32)
    return Examples(Columns(3, sparse, numbers), Ragged.singles(np.array([8, 2, 8])), None, history, weight)


def plain(found: Examples) -> list:
    """All arrays, as lists."""
    lists = [*found.user.sparse.values(), found.positives, found.history]
    numbers = [number.tolist() for number in found.user.numbers.values()]
    flat = [(one.offsets.tolist(), one.values.tolist(), None if one.weights is None else one.weights.tolist())
            for one in lists]  # fmt: skip
    return [list(found.user.sparse), list(found.user.numbers), flat, numbers, found.weight.tolist()]


def cache_in(folder: Path) -> Cache:  # noqa: F811
    """The cache as a process sees it that has just begun."""
    return Cache(folder, 1 << 30, [GROUP])


@pytest.fixture
def written(tmp_path) -> Path:
    """The one file of a cache."""
    cache = cache_in(tmp_path)
    cache.put(GROUP, examples())
    return cache.path(GROUP)


def test_rows_come_back_as_they_were_put(written):
    assert plain(cache_in(written.parent).get(GROUP)) == plain(examples())


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(written):
    """One bit of every byte in turn, padding and checksum among them; the file is taken away, so that it is remade."""
    whole = written.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        written.write_bytes(damaged)
        assert cache_in(written.parent).get(GROUP) is None, f"byte {place} of {len(whole)}"
        assert not written.exists()
    written.write_bytes(whole)
    assert plain(cache_in(written.parent).get(GROUP)) == plain(examples())


def test_a_file_cut_anywhere_or_grown_is_noticed(written):
    whole = written.read_bytes()
    for damaged in (*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + whole):
        written.write_bytes(damaged)
        assert cache_in(written.parent).get(GROUP) is None, f"{len(damaged)} bytes of {len(whole)}"
        assert not written.exists()


def test_a_file_is_verified_when_a_process_first_opens_it_and_when_it_was_replaced(written, monkeypatch):
    digested = []
    digest = caching.xxhash.xxh3_64_digest
    monkeypatch.setattr(caching.xxhash, "xxh3_64_digest", lambda data: digested.append(len(data)) or digest(data))
    cache = cache_in(written.parent)
    for _ in range(3):
        assert cache.get(GROUP) is not None
    assert digested == [written.stat().st_size - caching.DIGEST_BYTES]

    other = shutil.copy(written, written.with_name("other"))
    damaged = bytearray(written.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    other.write_bytes(damaged)
    other.replace(written)  # another file under the name of one that was whole
    assert cache.get(GROUP) is None
    assert len(digested) == 2


@BOTH
@pytest.mark.parametrize("share", [(0, 1), (1, 2)], ids=["one rank", "second of two"])
def test_damaged_files_are_read_again_from_parquet(folder, tmp_path, rows, share):  # noqa: F811
    """Each in another place: the batches are those of the data, and the cache is whole again."""
    wanted = contents(batches_of(folder, share, rows=rows))
    cached = {"rows": rows, "cache": tmp_path / "cache"}
    assert contents(batches_of(folder, share, **cached)) == wanted
    files = sorted((tmp_path / "cache").glob("*/*.arrow"))
    whole = [path.read_bytes() for path in files]
    for number, path in enumerate(files):
        damaged = bytearray(whole[number])
        damaged[len(damaged) * (number + 1) // (len(files) + 1)] ^= 64
        path.write_bytes(damaged)
    assert contents(batches_of(folder, share, **cached)) == wanted
    assert [path.read_bytes() for path in files] == whole
