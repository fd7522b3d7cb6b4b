"""A catalogue in memory, mapped, shared or remade says the same of every row: what its Parquet files say."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trec_twotower.config.features import build_feature
from trec_twotower.config.loading import load_config
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data import item_table as catalogue_module
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import transform
from trec_twotower.data.item_table import Catalogue
from trec_twotower.data.split import Split
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.ops.hashing import mix
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.storage import array_store as arrays_module
from trec_twotower.storage.array_store import InMemory, OnDisk, open_arrays
from trec_twotower.storage.cache_dir import CacheFolder, size_of
from trec_twotower.training.run_dir import Run

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "item": TableSpec(buckets=1000, dim=4),
    "colour": TableSpec(buckets=50, dim=4, seed=3),
    "tags": TableSpec(buckets=3_000_000_000, dim=4),  # needs int64
    "near": TableSpec(buckets=70, dim=4, hashing="modulo"),
}
FEATURES = [
    build_feature(name="item_id", kind="id", table="item"),
    build_feature(name="colour", kind="category", table="colour"),
    build_feature(name="tags/values:near", kind="bag", column="tags", table="tags", max_length=3),
    build_feature(name="near", kind="bag", table="near", weights="near_weight"),
    build_feature(name="price", kind="number", normalize="zscore"),
]
STATISTICS = {"price": Statistics(3.0, 2.0)}
NUM_ITEMS = 60
TEXT = pa.string()
KINDS = [TEXT, pa.dictionary(pa.int32(), TEXT), pa.int64(), pa.uint64(), pa.int16()]


def items_of(rng: np.random.Generator, kind: pa.DataType = TEXT) -> pa.Table:
    """Items with everything odd: nulls, empty lists, lists cut to their newest elements."""
    numbers = rng.permutation(900)[:NUM_ITEMS].tolist()
    ids = numbers if pa.types.is_integer(kind) else [f"item/{n}·" * (n % 3 + 1) for n in numbers]
    near = [[int(m) for m in rng.integers(0, 900, n % 4)] for n in numbers]
    return pa.table(
        {
            "item_id": pa.array(ids, kind),
            "colour": [None if n % 5 == 0 else ("red", "green", "blue")[n % 3] for n in numbers],
            "tags": pa.array([None if n % 7 == 0 else [f"t{n % k}" for k in range(1, n % 6 + 1)] for n in numbers],
                             pa.list_(pa.string())),
            "near": pa.array(near, pa.list_(pa.int64())),
            "near_weight": pa.array([[0.5 + m % 3 for m in row] for row in near], pa.list_(pa.float32())),
            "price": [None if n % 4 == 0 else n / 7 for n in numbers],
        }
    )  # fmt: skip


@pytest.fixture
def items(tmp_path, write_dataset, rng) -> Path:
    """A dataset folder whose items stand in three files, one of them empty, and row groups of 7."""
    whole = items_of(rng)
    return write_dataset(tmp_path / "d", row_group_size=7, items=[whole[:25], whole[25:25], whole[25:]])


@pytest.fixture
def cache(tmp_path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", 10**9)


@pytest.fixture
def all_mapped(monkeypatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAPPED_CELLS", 0)


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Where catalogues were hashed while the test ran, one entry each."""
    found = []
    write = catalogue_module._Hashing.write

    def count(self, arrays):
        found.append("memory" if isinstance(arrays, InMemory) else "disk")
        write(self, arrays)

    monkeypatch.setattr(catalogue_module._Hashing, "write", count)
    return found


def opened(folder: Path, cache: CacheFolder | None = None, **changes) -> Catalogue:
    given = {"features": FEATURES, "tables": TABLES, "statistics": STATISTICS, **changes}
    return Catalogue(
        Split(folder / "items", "items"), "item_id", given["features"], given["tables"], given["statistics"], cache
    )


def contents(items: Catalogue) -> dict[str, list]:
    """All that a catalogue knows, to compare; each list of a bag by itself."""
    found = {"ids": items.ids.to_pylist(), "keys": items.keys.tolist()}
    for name, lists in items.columns.sparse.items():
        found[name] = [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]
        if lists.weights is not None:
            found[f"{name}, weights"] = lists.weights.tolist()
    for name, number in items.columns.numbers.items():
        found[name] = number.tolist()
    found["found"] = items.rows_of_keys(np.concatenate([items.keys[::-1], [mix(1) >> 1, 5]])).tolist()
    return found


def expected(folder: Path) -> dict[str, list]:
    """The same by transforming the whole table at once, and by a dictionary of the ids."""
    split = Split(folder / "items", "items")
    table = split.table(list(split.columns))
    columns = transform(FEATURES, TABLES, STATISTICS, table, "here")
    ids = table["item_id"].to_pylist()
    found = {"ids": ids}
    for name, lists in columns.sparse.items():
        found[name] = [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]
        if lists.weights is not None:
            found[f"{name}, weights"] = lists.weights.tolist()
    found["price"] = columns.numbers["price"].tolist()
    found["found"] = [*reversed(range(len(ids))), -1, -1]
    return found


# One answer, however it is held


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_catalogue_says_what_its_files_say(tmp_path, write_dataset, rng, cache, monkeypatch, written, where, kind):
    if where == "disk":
        monkeypatch.setattr(catalogue_module, "MAPPED_CELLS", 0)
    whole = items_of(rng, kind)
    folder = write_dataset(tmp_path / "d", row_group_size=7, items=[whole[:25], whole[25:25], whole[25:]])
    items = opened(folder, cache)
    found = contents(items)
    assert {name: found[name] for name in found if name != "keys"} == expected(folder)
    assert written == [where]
    assert items.columns.sparse["tags/values:near"].values.dtype == np.int64
    assert items.columns.sparse["item_id"].values.dtype == np.int32
    assert items.ids.type == (kind if pa.types.is_integer(kind) else pa.large_string())
    rows = rng.integers(0, NUM_ITEMS, 40)
    taken = items.columns.take(rows)
    for name in ("item_id", "near"):
        lists = taken.sparse[name]
        assert [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)] == [
            found[name][row] for row in rows
        ]


def test_ids_that_are_categories_too_keep_the_place_of_null(tmp_path, write_dataset, rng):
    """The hashed ids serve features of kind id alone: a category's buckets begin at 1."""
    folder = write_dataset(tmp_path / "d", items=items_of(rng, pa.int64()))
    both = [FEATURES[0], FEATURES[0].model_copy(update={"name": "again", "column": "item_id", "kind": "category"})]
    items = opened(folder, features=both)
    table = Split(folder / "items", "items").table(["item_id"])
    wanted = transform(both, TABLES, {}, table, "here")
    for name in ("item_id", "again"):
        assert items.columns.sparse[name].values.tolist() == wanted.sparse[name].values.tolist()
    assert items.columns.sparse["again"].values.min() > 0


def test_a_catalogue_without_features_still_finds_its_ids(items, cache, all_mapped):
    assert opened(items, cache, features=[]).rows_of(pa.array(["nothing"]), "here").tolist() == [-1]


def test_datasets_behind_urls_are_mapped_as_well(items, write_dataset, cache, all_mapped, written):
    fsspec = pytest.importorskip("fsspec")
    write_dataset(items, train=pa.table({"user_id": [1], "item_id": ["x"]}))
    memory = fsspec.filesystem("memory")
    memory.put(str(items), "/mapped-elsewhere", recursive=True)
    try:
        for _ in range(2):
            split = Dataset("memory://mapped-elsewhere").items
            there = Catalogue(split, "item_id", FEATURES, TABLES, STATISTICS, cache)
            assert contents(there) == contents(opened(items))
    finally:
        memory.rm("/mapped-elsewhere", recursive=True)
    assert written == ["disk", "memory", "memory"]


# Hashed once, mapped by all


def test_a_mapped_catalogue_is_not_read_from_parquet_again(items, cache, all_mapped, monkeypatch):
    wanted = contents(opened(items, cache))

    def unread(*_, **__):
        raise AssertionError("read from Parquet")

    monkeypatch.setattr(Split, "read", unread)
    assert contents(opened(items, cache)) == wanted


def test_every_large_array_is_a_mapped_file_that_nobody_can_write(items, cache, all_mapped):
    """What is mapped from one file is one set of pages for all processes."""
    catalogue = opened(items, cache)
    held = [catalogue.keys, catalogue._table._slots, *catalogue.columns.numbers.values()]
    for lists in catalogue.columns.sparse.values():
        held += [lists.offsets, lists.values, *([] if lists.weights is None else [lists.weights])]
    for array in held:
        while isinstance(array, np.ndarray):
            assert not array.flags.writeable
            array = array.base
        assert isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)
    assert all(not buffer.is_mutable for buffer in catalogue.ids.buffers() if buffer is not None)


def test_small_catalogues_and_those_without_a_cache_stay_in_memory(items, cache, written, monkeypatch):
    cells = NUM_ITEMS * (1 + len(FEATURES))
    monkeypatch.setattr(catalogue_module, "MAPPED_CELLS", cells)
    opened(items, cache)
    monkeypatch.setattr(catalogue_module, "MAPPED_CELLS", cells - 1)
    opened(items)
    assert written == ["memory"] * 2
    assert not Path(items.parent / "cache").exists()
    opened(items, cache)
    assert written[2:] == ["disk"]


def _other_statistics():
    return {"statistics": {"price": Statistics(3.0, 2.5)}}


def _other_feature():
    return {"features": [*FEATURES[:2], FEATURES[2].model_copy(update={"max_length": 2}), *FEATURES[3:]]}


def _other_table():
    return {"tables": {**TABLES, "colour": TABLES["colour"].model_copy(update={"seed": 4})}}


@pytest.mark.parametrize("change", [_other_statistics, _other_feature, _other_table])
def test_other_ways_of_reading_make_other_catalogues(items, cache, all_mapped, written, change):
    opened(items, cache)
    found = opened(items, cache, **change())
    assert written == ["disk"] * 2
    assert contents(found) == contents(opened(items, **change())) != contents(opened(items))


def test_a_table_that_no_feature_reads_and_a_width_are_no_part_of_a_catalogue(items, cache, all_mapped, written):
    opened(items, cache)
    wider = {name: spec.model_copy(update={"dim": 64, "sharding": "row_wise"}) for name, spec in TABLES.items()}
    opened(items, cache, tables={**wider, "user": TableSpec(buckets=5, dim=2)})
    assert written == ["disk"]


def test_files_that_changed_are_hashed_again(items, cache, all_mapped, written):
    opened(items, cache)
    path = items / "items/part-0.parquet"
    os.utime(path, (1, 1))
    opened(items, cache)
    assert written == ["disk"] * 2
    shutil.copy(path, items / "items/part-7.parquet")
    with pytest.raises(DataError, match="such pairs"):
        opened(items, cache)
    assert written == ["disk"] * 3


@pytest.mark.parametrize("cells", [0, 1 << 40], ids=["mapped", "in memory"])
def test_errors_are_the_same_and_leave_nothing(items, tmp_path, write_dataset, rng, cache, monkeypatch, cells):
    monkeypatch.setattr(catalogue_module, "MAPPED_CELLS", cells)
    whole = items_of(rng)
    twice = write_dataset(tmp_path / "twice", row_group_size=7, items=[whole, whole[50:], whole[9:11]])
    first = whole["item_id"][50].as_py()
    with pytest.raises(DataError, match=rf"item_id '{first}' is in rows 50 and 60 \(12 such pairs\)"):
        opened(twice, cache)
    null = whole.set_column(0, "item_id", pa.array([*whole["item_id"].to_pylist()[:-1], None]))
    empty = write_dataset(tmp_path / "null", row_group_size=7, items=null)
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 8, column 'item_id': 1 of 4 ids .* in row 3"):
        opened(empty, cache)
    assert [path.name for path in (tmp_path / "cache").glob("*") if path.name != ".lock"] == []


def test_an_id_three_times_is_two_pairs(tmp_path, write_dataset):
    folder = write_dataset(tmp_path / "d", row_group_size=2, items=pa.table({"item_id": [8, 5, 6, 5, 7, 5]}))
    with pytest.raises(DataError, match=r"item_id 5 is in rows 1 and 3 \(2 such pairs\)"):
        opened(folder, features=[])


# Damage


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _emptied, _longer, _flipped, Path.unlink])
@pytest.mark.parametrize("name", ["keys", "slots", "ids", "offsets:near", "price", "manifest.json"])
def test_a_damaged_catalogue_is_made_again(items, cache, all_mapped, written, damage, name):
    wanted = contents(opened(items, cache))
    [folder] = [path for path in cache.root.iterdir() if path.is_dir()]
    listed = json.loads((folder / "manifest.json").read_bytes())["arrays"]
    file = next((about["file"] for array, about in listed.items() if array.endswith(name)), name)
    damage(folder / file)
    assert contents(opened(items, cache)) == wanted
    assert written == ["disk"] * 2
    assert contents(opened(items, cache)) == wanted
    assert written == ["disk"] * 2


@pytest.mark.parametrize("name, value", [("bytes", 480 * 2), ("dtype", ">i8")])
def test_a_manifest_that_says_what_was_not_written_is_not_believed(items, cache, all_mapped, written, name, value):
    """Where a mapped file is read beyond its end, the process is killed."""
    wanted = contents(opened(items, cache))
    [folder] = [path for path in cache.root.iterdir() if path.is_dir()]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["arrays"]["keys"]["bytes"] == 480 and manifest["arrays"]["keys"]["dtype"] == "<i8"
    manifest["arrays"]["keys"][name] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_arrays(folder) is None
    assert contents(opened(items, cache)) == wanted and len(written) == 2


def test_a_catalogue_in_use_outlives_its_files(items, cache, all_mapped):
    """Another process may sweep the folder or make it again."""
    catalogue = opened(items, cache)
    wanted = contents(catalogue)
    shutil.rmtree(cache.root)
    assert contents(catalogue) == wanted


def test_large_files_are_verified_by_blocks_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(arrays_module, "VERIFIED_BYTES", 256)
    writer = OnDisk(tmp_path, 10**6)
    array = np.arange(1000, dtype=np.int32)
    writer.append("a", array)
    writer.finish()
    for place in (0, 60, 3999, 63 * 21):  # blocks 0, 20.7 (rounded down), 41.3, 62 of 63 are looked at
        content = bytearray(array.tobytes())
        content[place] ^= 1
        (tmp_path / "0000.bin").write_bytes(content)
        assert open_arrays(tmp_path) is None
    (tmp_path / "0000.bin").write_bytes(array.tobytes())
    found = open_arrays(tmp_path)
    assert found is not None and found["a"].tolist() == array.tolist()


def test_an_array_without_values_comes_back(tmp_path):
    writer = OnDisk(tmp_path, 10**6)
    writer.append("none", np.empty(0, np.float32))
    writer.finish()
    found = open_arrays(tmp_path)
    assert found is not None and found["none"].shape == (0,) and found["none"].dtype == np.float32


# Several at once

TOGETHER = """
import sys, threading
from pathlib import Path
from trec_twotower.data import item_table as module
from trec_twotower.storage.cache_dir import CacheFolder
from trec_twotower.data.split import Split
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec

module.MAPPED_CELLS = 0
write, times = module._Hashing.write, []
module._Hashing.write = lambda self, arrays: (times.append(type(arrays).__name__), write(self, arrays))
print("ready", flush=True)
sys.stdin.readline()
items = module.Catalogue(
    Split(Path(sys.argv[1]) / "items", "items"), "item_id",
    [build_feature(name="item_id", kind="id", table="item")], {"item": TableSpec(buckets=1000, dim=2)}, {},
    CacheFolder(Path(sys.argv[2]), 10**9),
)
print(times, items.columns.sparse["item_id"].values.sum(), flush=True)
"""


def test_of_processes_that_start_at_once_one_hashes_and_all_have_it(items, tmp_path):
    words = [sys.executable, "-c", TOGETHER, str(items), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    total = opened(items, features=FEATURES[:1]).columns.sparse["item_id"].values.sum()
    assert sorted(said) == sorted([f"['OnDisk'] {total}", *[f"[] {total}"] * 3])
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != ".lock"]) == 1


def test_who_comes_while_another_hashes_waits_for_it(items, tmp_path, all_mapped, written, monkeypatch):
    """And what it then finds it maps, though there was nothing when it asked."""
    write = catalogue_module._Hashing.write
    is_writing, may_write = threading.Event(), threading.Event()

    def slowly(self, arrays):
        is_writing.set()
        assert may_write.wait(60)
        write(self, arrays)

    monkeypatch.setattr(catalogue_module._Hashing, "write", slowly)
    found: list[dict] = []

    def open_once() -> None:
        found.append(contents(opened(items, CacheFolder(tmp_path / "cache", 10**9))))

    first = threading.Thread(target=open_once)
    first.start()
    assert is_writing.wait(60)
    second = threading.Thread(target=open_once)
    second.start()
    second.join(0.2)  # long enough to begin, if nothing held it
    assert not found and written == []
    may_write.set()
    first.join(60)
    second.join(60)
    assert found == [contents(opened(items))] * 2 and written == ["disk", "memory"]


def test_what_a_killed_process_left_is_taken_away(items, cache, all_mapped):
    opened(items, cache)
    [folder] = [path for path in cache.root.iterdir() if path.is_dir()]
    left = cache.root / f".{folder.name}.tmp-999999999"
    folder.rename(left)
    (left / "manifest.json").unlink()
    opened(items, cache)
    assert not left.exists() and open_arrays(folder) is not None


# Where there is no room


def _limited(tmp_path, monkeypatch):
    return CacheFolder(tmp_path / "cache", 500), "more than 5e-07 GB"


def _full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    return CacheFolder(tmp_path / "cache", 10**9), "No space left"


@pytest.mark.parametrize("trouble", [_limited, _full])
def test_a_catalogue_that_cannot_be_kept_is_in_memory_and_says_so(
    items, tmp_path, all_mapped, written, monkeypatch, trouble
):
    cache, why = trouble(tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=rf"cannot hold .*/d/items hashed \(.*{why}.* data\.cache"):
        found = opened(items, cache)
    assert contents(found) == contents(opened(items))
    assert not [path for path in (tmp_path / "cache").glob("*") if path.name != ".lock"]


def test_a_cache_folder_that_is_none_is_a_mistake_in_the_config(tmp_path):
    (tmp_path / "cache").touch()
    cache = CacheFolder(tmp_path / "cache/inside", 10**9)
    for asked in (cache.check, lambda: cache.root):
        with pytest.raises(ConfigError, match=r"data\.cache is .*cache/inside, which is not a folder .* Give another"):
            asked()
    CacheFolder(tmp_path / "new/inside", 10**9).check()
    assert not (tmp_path / "new").exists()


def test_a_cache_folder_that_cannot_be_written_serves_what_is_in_it(items, cache, all_mapped, written, monkeypatch):
    """Such as one that was filled when an image was built."""
    wanted = contents(opened(items, cache))

    def forbidden(*_, **__):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", forbidden)
    monkeypatch.setattr(CacheFolder, "alone", forbidden)
    assert contents(opened(items, CacheFolder(cache.root, 10**9))) == wanted
    assert written == ["disk"]


# The cache folder


def folder_of(cache: CacheFolder, name: str, size: int, used: int) -> Path:
    folder = cache.root / name
    folder.mkdir()
    (folder / "file").write_bytes(bytes(size))
    os.utime(folder, (used, used))
    return folder


def test_the_longest_unused_go_until_all_fit(cache):
    cache.limit_bytes = 100
    old, older = folder_of(cache, "old", 40, 20), folder_of(cache, "older", 30, 10)
    mine = folder_of(cache, "mine", 31, 5)
    assert cache.use(mine) == 100
    assert mine.stat().st_mtime > 10**9
    assert not older.exists() and old.exists() and mine.exists()  # 101 with it, 71 without
    also_mine = folder_of(cache, "also", 20, 1)
    assert cache.use(also_mine) == 69
    assert old.exists()
    (mine / "more").write_bytes(bytes(30))
    assert cache.use(mine) == 80  # what it holds itself does not count
    assert not old.exists() and mine.exists() and also_mine.exists()
    assert size_of(mine) == 61
    cache.limit_bytes = 10
    cache.use(mine)
    assert mine.exists() and also_mine.exists()


def test_without_a_setting_the_users_own_cache_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert CacheFolder(None, 1).root == tmp_path / "home/.cache/trec_twotower"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache = CacheFolder(None, 1)
    assert not (tmp_path / "xdg").exists()  # until it is needed
    assert cache.root == tmp_path / "xdg/trec_twotower" and cache.root.is_dir()
    assert CacheFolder(tmp_path / "given", 1).root == tmp_path / "given"


def test_without_a_home_to_write_to_it_is_a_temporary_folder_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = CacheFolder(None, 1).root
    assert root == tmp_path / f"trec_twotower-{os.getuid()}" and root.stat().st_mode & 0o777 == 0o700
    assert CacheFolder(None, 1).root == root
    other = os.getuid() + 1
    (tmp_path / f"trec_twotower-{other}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match="belongs to another user"):
        _ = CacheFolder(None, 1).root


# Sources


def test_users_are_mapped_beside_the_items(tmp_path, write_dataset, rng, cache, all_mapped, written):
    items = items_of(rng, pa.int64())
    users = pa.table({"user_id": [5, 6, 7], "age": [20.0, None, 40.0]})
    train = pa.table({"user_id": [7, 6, 5], "item_id": items["item_id"].take([2, 0, 41])})
    folder = write_dataset(tmp_path / "d", items=items, users=users, train=train)
    user = (build_feature(name="user_id", kind="id", table="item"), build_feature(name="age", kind="number"))
    schema = Schema.build(TABLES, user, tuple(FEATURES))
    for _ in range(2):
        sources = FeatureDataset(Dataset(folder), schema, "event", cache=CacheFolder(cache.root, 10**9))
        assert sources.item_rows(train["item_id"].combine_chunks(), "here").tolist() == [2, 0, 41]
        assert sources.user_features(train, "here").numbers["age"].tolist() == [[1, 0], [0, 1], [-1, 0]]
    assert written == ["disk", "disk"]


CONFIG = """
data: {dataset: %s, batch_size: 2, cache: %s}
tables: {item: {buckets: 100, dim: 4}}
user: [{name: user_id, kind: id, table: item}]
item: [{name: item_id, kind: id, table: item}, {name: price, kind: number}]
model: {dim: 4}
"""


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_hashes_its_catalogue_once_and_later_commands_map_it(
    tmp_path, write_dataset, rng, monkeypatch, written, where
):
    if where == "disk":
        monkeypatch.setattr(catalogue_module, "MAPPED_CELLS", 0)
    items = items_of(rng, pa.int64())
    folder = write_dataset(tmp_path / "d", items=items, train=pa.table({"user_id": [1, 2], "item_id": items[0][:2]}))
    (tmp_path / "small.yaml").write_text(CONFIG % (folder, tmp_path / "cache"))
    ranks = Ranks(0, 1, torch.device("cpu"))
    run = Run.create_or_open(load_config(tmp_path / "small.yaml", [f"run_dir={tmp_path / 'run'}"]), ranks)
    first = run.initialize(ranks)
    assert written == [where]
    again = Run.open(run.folder).open_dataset(ranks)
    assert written == ([where] if where == "disk" else [where] * 2)
    assert again.catalogue.columns.numbers["price"].tolist() == first.catalogue.columns.numbers["price"].tolist()
    assert (tmp_path / "cache").exists() == (where == "disk")


def test_the_commands_do_the_same_with_a_mapped_catalogue(shop, tmp_path, cli, all_mapped, written, monkeypatch):
    """Another run with the same features, too, maps what the first one has hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = tmp_path / "run"
    for words in (
        ("train", shop.config, f"run_dir={run}"),
        ("export", run),
        ("index", run),
        ("evaluate", run, "--index"),
        ("recommend", run, "--user", "user-3", "--k", "3"),
    ):
        said = cli(*words)
        assert said.code == 0, said.err
    for name in ("items-00000-of-00001.parquet", "users-00000-of-00001.parquet"):
        assert pq.read_table(run / "export" / name).equals(pq.read_table(shop.run / "export" / name))
    assert said.out == cli("recommend", shop.run, "--user", "user-3", "--k", "3").out
    assert written == ["disk"] * 2  # items and users


# The table of keys


def naive(keys: list[int]) -> tuple[dict[int, int], int]:
    """First positions, and how many keys stand again."""
    first: dict[int, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return first, len(keys) - len(first)


@pytest.mark.parametrize("span", [40, 10**6, 2**62])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_keys_are_found_and_doubles_named(rng, span, piece):
    keys = rng.integers(-span, span, 300)
    table = KeyTable(keys, np.zeros(KeyTable.num_slots(len(keys)), np.int32))
    doubles = np.concatenate(
        [table.insert(start, min(start + piece, len(keys))) for start in range(0, len(keys), piece)]
    )
    first, again = naive(keys.tolist())
    assert len(doubles) == again
    assert (doubles[:, 0] != doubles[:, 1]).all() and (keys[doubles[:, 0]] == keys[doubles[:, 1]]).all()
    # Of each key one position is in, all others are named once.
    named = set(doubles[:, 1].tolist())
    assert len(named) == again
    asked = np.concatenate([keys, rng.integers(-span, span, 300)])
    for key, place in zip(asked.tolist(), table.find(asked).tolist(), strict=True):
        assert (place == -1) == (key not in first)
        assert place == -1 or (keys[place] == key and place not in named)


def test_keys_of_one_slot_are_found_also_round_the_end():
    """Seven keys want the last of 16 slots: six of them stand at the front."""
    wanted = [key for key in range(400) if mix(key) >> 60 == 15][:9]
    keys = np.array(wanted[:7])
    slots = np.zeros(KeyTable.num_slots(7), np.int32)
    table = KeyTable(keys, slots)
    assert not len(table.insert(0, 7))
    assert slots.tolist() == [2, 3, 4, 5, 6, 7, *[0] * 9, 1]
    assert table.find(np.array(wanted)).tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1]


@pytest.mark.parametrize("num_keys", [1, 7, 8, 1000, 1 << 16])
def test_a_table_is_at_most_half_full(num_keys):
    slots = KeyTable.num_slots(num_keys)
    assert num_keys * 2 <= slots and slots & (slots - 1) == 0
