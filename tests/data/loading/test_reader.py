"""Threads, cache, URLs and windows change how rows are read, never what comes or when."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pytest

from tests.kinds import build_loss
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.losses import NegativesConfig
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading import order, reader
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.loading.order import Interleaving, Window, windows_of
from trec_twotower.data.split import RowGroup, Split
from trec_twotower.errors import DataError

ITEM = TableSpec(buckets=64, dim=4)
USERS = (
    build_feature(name="history", kind="bag", table="item", max_length=4),
    build_feature(name="country", kind="category", buckets=9, dim=4),
    build_feature(name="words", kind="bag", buckets=50, dim=4, weights="shares"),
    build_feature(name="age", kind="number"),
)
ITEMS = (build_feature(name="item_id", kind="id", table="item"), build_feature(name="price", kind="number"))
SCHEMA = Schema.build({"item": ITEM}, USERS, ITEMS)
NUM_ITEMS = 40


def rows_of(random: np.random.Generator, count: int) -> pa.Table:
    lists = [random.choice(NUM_ITEMS, random.integers(0, 7), replace=False) * 3 for _ in range(count)]
    words = [[f"w{number}" for number in random.integers(0, 30, random.integers(0, 4))] for _ in range(count)]
    return pa.table(
        {
            "user_id": random.integers(0, 2**62, count),
            "item_id": random.integers(0, NUM_ITEMS, count) * 3,
            "positives": pa.array([[*row.tolist(), 3 * (len(row) % NUM_ITEMS)] for row in lists], pa.list_(pa.int64())),
            "history": pa.array([row.tolist() for row in lists], pa.list_(pa.int64())),
            "country": pa.array(random.choice(["NO", "SE", "FI", None], count)),
            "words": pa.array(words, pa.list_(pa.string())),
            "shares": pa.array([[0.5 + place for place in range(len(row))] for row in words], pa.list_(pa.float64())),
            "age": pa.array(random.normal(40, 9, count), mask=random.random(count) < 0.2),
            "weight": random.random(count) + 0.5,
        }
    )


@pytest.fixture
def folder(tmp_path, rng, write_dataset):
    """Three files of 130 rows in row groups of 16, one of them without a row."""
    items = pa.table({"item_id": np.arange(NUM_ITEMS) * 3, "price": rng.random(NUM_ITEMS)})
    train = [rows_of(rng, 70), rows_of(rng, 0), rows_of(rng, 60)]
    return write_dataset(tmp_path / "d", row_group_size=16, items=items, train=train)


def batches_of(folder, share=(0, 1), **data) -> TrainBatches:
    settings = {"rows": "event", "batch_size": 11, "shuffle_rows": 30} | data
    config = DataConfig(dataset=folder, **settings)
    sources = FeatureDataset(Dataset(config.dataset), SCHEMA, config.rows)
    loss = build_loss(negatives=NegativesConfig(sampled=5))
    return TrainBatches(sources, config, loss, sources.item_counts(), share)


def contents(batches: TrainBatches, first: int = 0, steps: int = 30) -> list[list]:
    """Every tensor of every batch, as plain lists."""
    found = []
    for batch in batches.iter_from(first, first + steps):
        tensors = batch.named_tensors().values()
        jagged = (batch.sparse.values(), batch.sparse.lengths(), batch.sparse.weights())
        found.append([batch.item_sizes, *(tensor.tolist() for tensor in (*tensors, *jagged))])
    assert len(found) == steps
    return found


BOTH = pytest.mark.parametrize("rows", ["event", "user"])


@BOTH
@pytest.mark.parametrize("threads", [0, 2, 4])
@pytest.mark.parametrize("share", [(0, 1), (1, 3)], ids=["one rank", "second of three"])
def test_batches_do_not_depend_on_the_number_of_threads(folder, rows, threads, share):
    """Through two epochs and into a third, with batches ahead or without."""
    wanted = contents(batches_of(folder, share, rows=rows, threads=1))
    assert contents(batches_of(folder, share, rows=rows, threads=threads, prefetch=1 + threads)) == wanted


@BOTH
@pytest.mark.parametrize("share", [(0, 1), (0, 2)], ids=["one rank", "first of two"])
def test_the_cache_gives_what_parquet_gave(folder, tmp_path, rows, share):
    """While it is filled, when it is full, and where a part of it is missing or cut."""
    wanted = contents(batches_of(folder, share, rows=rows))
    cached = {"rows": rows, "cache": tmp_path / "cache"}
    assert contents(batches_of(folder, share, **cached)) == wanted
    files = sorted((tmp_path / "cache").glob("*/*.arrow"))
    assert len(files) <= 9  # row groups of 16: 70 rows are 5, 60 are 4; a rank keeps those it reads
    assert len(files) == 9 or share[1] > 1
    written = [path.stat().st_mtime_ns for path in files]
    assert contents(batches_of(folder, share, **cached)) == wanted
    assert [path.stat().st_mtime_ns for path in files] == written
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:100])
    assert contents(batches_of(folder, share, **cached)) == wanted


def test_a_full_cache_is_not_parquet_read_again(folder, tmp_path, monkeypatch):
    cached = {"cache": tmp_path / "cache"}
    wanted = contents(batches_of(folder, **cached))
    again = batches_of(folder, **cached)

    bare = batches_of(folder)

    def unread(*_, **__):
        raise AssertionError("read from Parquet")

    for way in ("read", "blocks"):
        monkeypatch.setattr(Split, way, unread)
    assert contents(again) == wanted
    with pytest.raises(AssertionError, match="read from Parquet"):
        contents(bare)


def test_a_cache_belongs_to_its_data_and_its_way_of_reading(folder, tmp_path, rng):
    """Another config, and files that changed, get a cache of their own."""
    cache = tmp_path / "cache"
    contents(batches_of(folder, cache=cache))
    contents(batches_of(folder, cache=cache, rows="user"))
    assert len(list(cache.iterdir())) == 2
    contents(batches_of(folder, cache=cache, seed=5, batch_size=7))  # the order is no part of it
    assert len(list(cache.iterdir())) == 2
    for number, part in enumerate(("train", "items"), 3):  # the catalogue's rows are what the cache holds as positives
        os.utime(sorted((folder / part).glob("*.parquet"))[0], (1, 1))
        contents(batches_of(folder, cache=cache))
        assert len(list(cache.iterdir())) == number


def test_the_cache_keeps_to_its_size(folder, tmp_path):
    """What does not fit is read from Parquet; of other ways of reading, the longest unused go first."""
    cache = tmp_path / "cache"
    wanted = contents(batches_of(folder))
    contents(batches_of(folder, cache=cache, rows="user"))
    [old] = cache.iterdir()
    os.utime(old, (1, 1))
    size = sum(path.stat().st_size for path in old.iterdir())
    assert contents(batches_of(folder, cache=cache, cache_gb=size * 0.6 / 1e9)) == wanted
    [new] = cache.iterdir()
    assert new != old
    files = list(new.iterdir())
    assert 0 < len(files) < 9
    # A file is a little larger than the arrays the limit counts: its schema and padding.
    assert sum(path.stat().st_size for path in files) < size


def test_ranks_that_fill_one_cache_at_once_do_not_meet(folder, tmp_path, forked):
    """Two processes that begin at the same moment, and read the same row groups."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    code, said = forked(2, "tests.ranks.filled", folder, cache, out)
    assert code == 0, said
    for rank in range(2):
        wanted = [contents(batches_of(folder, (rank, 2), rows=rows)) for rows in ("event", "user")]
        assert json.loads((out / f"found-{rank}.json").read_text()) == json.loads(json.dumps(wanted))
    assert len(list(cache.glob("*/*.arrow"))) == 2 * 9
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_a_dataset_behind_a_url_reads_as_one_here(folder):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/elsewhere", recursive=True)
    try:
        assert contents(batches_of("memory://elsewhere")) == contents(batches_of(folder))
    finally:
        memory.rm("/elsewhere", recursive=True)


# The order


def groups_of(sizes: list[int], tmp_path) -> list[RowGroup]:
    first = np.concatenate([[0], np.cumsum(sizes)])
    return [RowGroup(tmp_path / "f", number, int(first[number]), size) for number, size in enumerate(sizes)]


def rows_in_order(window: Window, seed: int) -> list[int]:
    """A window's rows, counted through its units, place by place and row by row."""
    first = np.concatenate([[0], np.cumsum([unit.num_rows for unit in window.units])])
    orders = [iter(first[number] + unit.order(seed)) for number, unit in enumerate(window.units)]
    return [int(next(orders[unit])) for unit in Interleaving.of(window, seed).unit_at]


@pytest.mark.parametrize("sizes", [[1], [100], [7, 7], [50, 1, 1, 50, 3], [10] * 40], ids=str)
def test_windows_take_every_row_group_once(sizes, tmp_path):
    groups = groups_of(sizes, tmp_path)
    windows = windows_of(groups, 32, seed=3, epoch=1)
    assert sorted(group.number for window in windows for group in window.groups) == list(range(len(sizes)))
    assert [window.first for window in windows] == [sum(w.num_rows for w in windows[:n]) for n in range(len(windows))]
    assert all(window.num_rows >= 32 for window in windows[:-1])
    for window in windows:
        assert sorted(rows_in_order(window, 3)) == list(range(window.num_rows))


@pytest.mark.parametrize(("unit_rows", "units"), [(1000, 4), (1500, 2), (order.UNIT_ROWS, 1)])
def test_neighbours_in_a_file_land_a_third_of_a_window_apart(tmp_path, monkeypatch, unit_rows, units):
    """As two places drawn independently do: mean (n + 1) / 3 of n, with a standard error of 0.24 n / root of pairs."""
    monkeypatch.setattr(order, "UNIT_ROWS", unit_rows)
    groups = groups_of([1000] * 16, tmp_path)
    assert {len(window.units) for window in windows_of(groups, 4000, seed=0, epoch=0)} == {units}
    apart = []
    for window in windows_of(groups, 4000, seed=0, epoch=0):
        place = np.empty(window.num_rows, np.int64)
        place[rows_in_order(window, 0)] = np.arange(window.num_rows)
        apart += np.abs(np.diff(place)).tolist()
    assert max(apart) < 4000
    assert np.mean(apart) == pytest.approx(4001 / 3, rel=5 * 0.71 / np.sqrt(len(apart)))


def test_row_groups_of_a_file_spread_over_the_epoch(tmp_path):
    """Over many epochs each row group comes first about as often as any other (chi-square, p = 0.001)."""
    groups = groups_of([10] * 8, tmp_path)
    first = np.bincount([windows_of(groups, 10, 0, epoch)[0].groups[0].number for epoch in range(800)], minlength=8)
    assert ((first - 100) ** 2 / 100).sum() < 24.3


# Files that differ


def test_narrow_files_are_widened_and_read_as_if_written_wide(tmp_path, rng, write_dataset):
    items = pa.table({"item_id": np.arange(NUM_ITEMS) * 3, "price": rng.random(NUM_ITEMS)})
    wide = rows_of(rng, 40).set_column(7, "age", pa.array(np.arange(40) / 2.0))
    narrow = wide.set_column(1, "item_id", wide["item_id"].cast(pa.int32()))
    narrow = narrow.set_column(3, "history", wide["history"].cast(pa.list_(pa.int16())))
    narrow = narrow.set_column(7, "age", wide["age"].cast(pa.float32()))  # halves: exact in both
    folders = [
        write_dataset(tmp_path / name, row_group_size=16, items=items, train=files)
        for name, files in (("wide", [wide, wide]), ("mixed", [narrow, wide]), ("mixed-too", [wide, narrow]))
    ]
    first, *others = [contents(batches_of(folder), steps=8) for folder in folders]
    assert others == [first, first]


@pytest.mark.parametrize("unit_rows", [1, 25, 1000])
def test_any_places_of_a_window_are_slices_of_its_units(unit_rows, tmp_path, monkeypatch):
    """The slices hold just the rows that come there."""
    monkeypatch.setattr(order, "UNIT_ROWS", unit_rows)
    [window] = windows_of(groups_of([10, 20, 5, 30], tmp_path), 65, seed=1, epoch=2)
    assert len(window.units) == {1: 4, 25: 2, 1000: 1}[unit_rows] or unit_rows == 25
    whole = rows_in_order(window, 1)
    interleaving = Interleaving.of(window, 1)
    first = np.concatenate([[0], np.cumsum([unit.num_rows for unit in window.units])])
    for start, stop in [(0, 7), (7, 7), (7, 40), (3, 4), (40, 65), (0, 65)]:
        rows = [
            first[number] + row
            for number, (low, high) in enumerate(interleaving.before([start, stop]).T)
            for row in window.units[number].order(1)[low:high]
        ]
        assert sorted(rows) == sorted(whole[start:stop])


@BOTH
@pytest.mark.parametrize("share", [(0, 1), (1, 2)], ids=["one rank", "second of two"])
def test_how_many_rows_are_decoded_at_a_time_changes_nothing(folder, tmp_path, rows, share, monkeypatch):
    """Three of 16, with and without cache."""
    wanted = contents(batches_of(folder, share, rows=rows))
    monkeypatch.setattr(reader, "BLOCK_ROWS", 3)
    assert contents(batches_of(folder, share, rows=rows)) == wanted
    for _ in range(2):
        assert contents(batches_of(folder, share, rows=rows, cache=tmp_path / "cache")) == wanted


@pytest.mark.parametrize("decoded", [3, 15, 99])
def test_an_error_counts_rows_from_the_row_group_on_however_it_was_read(
    tmp_path, rng, write_dataset, monkeypatch, decoded
):
    monkeypatch.setattr(reader, "BLOCK_ROWS", decoded)
    age = np.arange(40) / 2.0
    age[29] = np.nan
    train = rows_of(rng, 40).set_column(7, "age", pa.array(age, from_pandas=False))
    items = pa.table({"item_id": np.arange(NUM_ITEMS) * 3, "price": rng.random(NUM_ITEMS)})
    folder = write_dataset(tmp_path / "d", row_group_size=16, items=items, train=[train])
    statistics = FeatureDataset(
        Dataset(write_dataset(tmp_path / "good", items=items, train=[rows_of(rng, 9)])), SCHEMA, "event"
    )
    sources = FeatureDataset(Dataset(folder), SCHEMA, "event", statistics.statistics)
    data = DataConfig(dataset=folder, batch_size=11, threads=2)
    batches = TrainBatches(sources, data, build_loss(), sources.item_counts(), (0, 1))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 1, column 'age': 1 of 16 .* in row 13: "):
        list(batches.iter_from(0, 4))


@BOTH
def test_a_rank_decodes_only_the_row_groups_its_rows_lie_in(folder, rows, monkeypatch):
    """Of 9 row groups in one window, two ranks read the features of 5 each at most; of the rest the positives alone."""
    monkeypatch.setattr(order, "UNIT_ROWS", 1)  # each row group by itself
    wanted = contents(batches_of(folder, rows=rows, shuffle_rows=1000), steps=12)
    target = {"positives"} if rows == "user" else {"item_id"}
    whole: list[set[int]] = []
    for rank in range(2):
        batches = batches_of(folder, (rank, 2), rows=rows, shuffle_rows=1000)
        next(batches.iter_from(0, 1))  # takes what it has to of the first epoch, and the columns' kinds
        read: dict[tuple, set[str]] = {}
        split = batches.sources.dataset.train
        real = type(split).blocks

        def recorded(self, group, columns, *more, read=read, real=real, **named):
            read.setdefault((group.path, group.number), set()).update(columns)
            return real(self, group, columns, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(type(split), "blocks", recorded)
            found = contents(batches, steps=12)
        assert len(read) == 9 and len(found) == len(wanted)
        whole.append({name for name, columns in read.items() if columns != target})
    assert max(map(len, whole)) <= 5 and len(whole[0] | whole[1]) == 9
