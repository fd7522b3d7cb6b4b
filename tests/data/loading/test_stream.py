"""A folder that grows: every row once, in an order that the files' coming decides and a restart does not change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trec_twotower.config.base import validate
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.loading import streaming
from trec_twotower.data.loading.order import Interleaving, windows_of
from trec_twotower.data.loading.streaming import Stream
from trec_twotower.data.split import RowGroup
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.training.run_dir import Run

ALONE = Ranks(0, 1, torch.device("cpu"))
ITEMS = [f"i{number:02d}" for number in range(12)]
BATCH, WINDOW = 7, 16


def rows(first: int, count: int, items: list[str] = ITEMS, **columns: pa.Array) -> pa.Table:
    """Rows numbered first, first + 1 and so on, which take the items in turn."""
    number = np.arange(first, first + count)
    given = {
        "user_id": number % 5,
        "item_id": [items[n * n % len(items)] for n in number.tolist()],
        "row": number,
        "age": number / 8.0,
    }
    return pa.table(given | columns)


def items(*names: str) -> pa.Table:
    return pa.table({"item_id": list(names), "price": [float(len(name)) for name in names]})


def publish(folder: Path, name: str, table: pa.Table) -> Path:
    """Put a file into its place the way a writer should: whole, by a rename."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    pq.write_table(table, temporary, row_group_size=4)
    return temporary.rename(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A dataset of 23 rows in two files."""
    folder = tmp_path / "d"
    publish(folder, "items/part-0.parquet", items(*ITEMS))
    publish(folder, "train/a.parquet", rows(0, 10))
    publish(folder, "train/b.parquet", rows(10, 13))
    return folder


def config_of(folder: Path, **data: Any) -> RunConfig:
    """A run beside the dataset that reads what is there and ends."""
    values = {
        "data": {
            "dataset": folder,
            "batch_size": BATCH,
            "shuffle_rows": WINDOW,
            "follow": {"idle_s": 0},
            **data,
        },
        # So large that a bucket is the id itself: a batch can be read back.
        "tables": {"row": {"buckets": 1 << 12, "dim": 4, "hashing": "modulo"}, "item": {"buckets": 64, "dim": 4}},
        "user": [
            {"name": "row", "kind": "id", "table": "row"},
            {"name": "age", "kind": "number", "normalize": "zscore"},
        ],
        "item": [{"name": "item_id", "kind": "id", "table": "item"}, {"name": "price", "kind": "number"}],
        "model": {"dim": 4},
        "run_dir": folder.parent / "run",
    }
    return validate(RunConfig, values, "a test's config")


def stream_of(folder: Path, **data: Any) -> Stream:
    """What a process sees that goes on with the run, or begins it."""
    return stream_by(config_of(folder, **data))


def stream_by(config: RunConfig) -> Stream:
    run = Run(config.run_dir, config)
    sources = run.initialize(ALONE) or run.open_dataset(ALONE)
    return Stream(run.generations(ALONE), sources, config.data, config.loss, run.folder, ALONE)


def rows_in(batch: Any) -> list[int]:
    return batch.sparse["user:row"].values().tolist()


def taken(stream: Stream, step: int = 0) -> list[list[int]]:
    """The rows of each step from this one on, sorted: where a row stands in its batch is of no account."""
    return [sorted(rows_in(batch)) for batch in stream.iter_from(step)]


def expected(folder: Path, generation: int, *names: str, drop_last: bool = False) -> list[list[int]]:
    """The same of one generation, row by row: as an epoch of its number over its files."""
    groups, numbers = [], []
    for name in names:
        file = pq.ParquetFile(folder / f"train/{name}.parquet")
        for number in range(file.num_row_groups):
            found = file.read_row_group(number)["row"].to_pylist()
            groups.append(RowGroup(folder / f"train/{name}.parquet", number, len(numbers), len(found)))
            numbers += found
    order = []
    for window in windows_of(groups, WINDOW, 0, generation):
        of_unit = [[numbers[g.first_row + n] for g in unit.groups for n in range(g.num_rows)] for unit in window.units]
        nexts = [iter(unit.order(0)) for unit in window.units]
        order += [of_unit[unit][next(nexts[unit])] for unit in Interleaving.of(window, 0).unit_at]
    steps = [order[low : low + BATCH] for low in range(0, len(order), BATCH)]
    return [sorted(step) for step in steps if len(step) == BATCH or not drop_last]


def while_reading(stream: Stream, **at: Callable[[], Any]) -> list[list[int]]:
    """What is taken while files come: step3=f calls f when the batch of the third step is there."""
    found = []
    for number, batch in enumerate(stream.iter_from(0), 1):
        found.append(sorted(rows_in(batch)))
        at.pop(f"step{number}", lambda: None)()
    assert not at, f"never came to {at}"
    return found


class Clock:
    """The time of a stream that waits; `at` calls something during the n-th sleep."""

    def __init__(self, **at: Callable[[], Any]) -> None:
        self.now = 1000.0
        self.at = at
        self.sleeps = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 1, "deaf for longer than it should be"
        self.now += seconds
        self.sleeps += 1
        self.at.pop(f"sleep{self.sleeps}", lambda: None)()


def grown(folder: Path) -> list[list[int]]:
    """Three generations: a and b; c and d, which come apart; and e."""
    add = partial(publish, folder)
    return while_reading(
        stream_of(folder),
        step1=lambda: add("train/d.parquet", rows(23, 9)),
        step3=lambda: add("train/c.parquet", rows(32, 11)),
        step5=lambda: add("train/e.parquet", rows(43, 15)),
    )


GROWN = (("a", "b"), ("c", "d"), ("e",))


# What comes, and when


def test_files_that_come_are_read_once_each_as_the_next_generation(folder):
    found = grown(folder)
    assert sorted(row for step in found for row in step) == list(range(58))
    assert found == [step for number, names in enumerate(GROWN) for step in expected(folder, number, *names)]
    assert [len(step) for step in found] == [7, 7, 7, 2, 7, 7, 6, 7, 7, 1]


def test_the_files_of_a_generation_are_written_down_before_its_first_row_is_read(folder, monkeypatch):
    written = []
    real = streaming.TrainBatches.iter_from

    def iter_from(batches: Any, step: int, end: int, *more: Any) -> Iterator[Any]:
        saved = json.loads((folder.parent / "run/stream.json").read_text())["generations"]
        written.append([(sorted(one["files"]["train"]), one["num_rows"]) for one in saved])
        return real(batches, step, end, *more)

    monkeypatch.setattr(streaming.TrainBatches, "iter_from", iter_from)
    grown(folder)
    first, second, third = ([f"{name}.parquet" for name in names] for names in GROWN)
    assert written == [[(first, 23)], [(first, 23), (second, 20)], [(first, 23), (second, 20), (third, 15)]]


@pytest.mark.parametrize("threads", [0, 3])
def test_a_resumed_stream_takes_the_same_rows_in_the_same_steps(folder, threads):
    """From every step on, whatever has come meanwhile; that comes behind."""
    whole = grown(folder)
    publish(folder, "train/0.parquet", rows(58, 3))
    for counts in (folder.parent / "run").glob("item_counts-*.npy"):
        counts.unlink()
    for step in range(len(whole) + 1):
        assert taken(stream_of(folder, threads=threads), step) == whole[step:] + expected(folder, 3, "0")


def test_two_runs_to_which_the_same_files_come_at_other_steps_take_the_same(folder, tmp_path):
    first = grown(folder)
    for name in "cde":
        (folder / f"train/{name}.parquet").rename(tmp_path / f"{name}.kept")
    (tmp_path / "run").rename(tmp_path / "earlier")

    def bring(*names: str) -> None:
        for name in names:
            (tmp_path / f"{name}.kept").rename(folder / f"train/{name}.parquet")

    again = while_reading(stream_of(folder), step4=lambda: bring("d", "c"), step7=lambda: bring("e"))
    assert again == first


def test_what_is_not_whole_or_has_another_name_is_left_alone_until_it_is(folder, capsys):
    whole = publish(folder, "elsewhere/c.parquet", rows(23, 9)).read_bytes()
    train = folder / "train"
    for name in (".c.parquet", "_c.parquet", "c.parquet.tmp", "c.csv"):
        (train / name).write_bytes(whole)
    (train / "c.parquet").write_bytes(whole[:-1])
    (train / "empty.parquet").write_bytes(b"")
    first = taken(stream_of(folder))
    assert sorted(row for step in first for row in step) == list(range(23))
    said = capsys.readouterr().out
    for name in ("c", "empty"):
        assert said.count(f"train/{name}.parquet has no readable footer (yet)") == 1
    (train / "c.parquet").write_bytes(whole)
    assert taken(stream_of(folder), len(first)) == expected(folder, 1, "c")


def test_a_stream_waits_for_files_and_ends_when_none_came_for_idle_s(folder, monkeypatch):
    """The wait begins anew with each file; two seconds lie between looks, so a file is seen within two seconds."""
    clock = Clock(
        sleep3=lambda: publish(folder, "train/c.parquet", rows(23, 9)),
        sleep9=lambda: publish(folder, "train/d.parquet", rows(32, 9)),
    )
    monkeypatch.setattr(streaming, "time", clock)
    found = taken(stream_of(folder, follow={"poll_s": 2, "idle_s": 7}))
    assert sorted(row for step in found for row in step) == list(range(41))
    assert clock.now == 1000 + 4 + 6 + 7
    assert found[4:6] == expected(folder, 1, "c")


def test_a_stream_without_idle_s_waits_until_it_is_stopped(folder, monkeypatch):
    stopped: list[bool] = []
    clock = Clock(sleep5000=lambda: stopped.append(True))
    monkeypatch.setattr(streaming, "time", clock)
    stream = stream_of(folder, follow={})
    assert len([*stream.iter_from(0, is_stopped=lambda: bool(stopped))]) == 4
    assert clock.sleeps == 5000


def test_counts_ask_for_no_more_memory_than_their_file_has_bytes(tmp_path):
    path = tmp_path / "counts.npy"
    streaming.write_counts(path, np.arange(5))
    assert streaming.read_counts(path).tolist() == [0, 1, 2, 3, 4]
    whole = path.read_bytes()
    for altered in (b"(50000000000,), }", b"(5,             {"):
        path.write_bytes(whole.replace(b"(5,), }          ", altered))
        with pytest.raises(DataError, match=r"counts\.npy cannot be read"):
            streaming.read_counts(path)


def test_files_without_rows_are_waited_with(folder):
    """They make no step by themselves; beside others they are taken with them."""
    assert len(taken(stream_of(folder))) == 4
    publish(folder, "train/c.parquet", rows(23, 0))
    assert taken(stream_of(folder), 4) == []
    publish(folder, "train/d.parquet", rows(23, 2))
    assert taken(stream_of(folder), 4) == [[23, 24]]
    saved = json.loads((folder.parent / "run/stream.json").read_text())["generations"]
    assert [list(one["files"]["train"]) for one in saved][1:] == [["c.parquet", "d.parquet"]]


def test_with_drop_last_every_step_is_whole_and_few_rows_are_waited_with(folder):
    found = taken(stream_of(folder, drop_last=True))
    assert found == expected(folder, 0, "a", "b", drop_last=True) and len(found) == 3
    publish(folder, "train/c.parquet", rows(23, BATCH - 1))
    assert taken(stream_of(folder, drop_last=True), 3) == []
    publish(folder, "train/d.parquet", rows(40, 2))
    assert taken(stream_of(folder, drop_last=True), 3) == expected(folder, 1, "c", "d", drop_last=True)


def test_steps_rows_and_generations_are_counted(folder):
    grown(folder)
    for drop_last, sizes in ((False, [[7, 7, 7, 2], [7, 7, 6], [7, 7, 1]]), (True, [[7, 7, 7], [7, 7], [7, 7]])):
        stream = stream_of(folder, drop_last=drop_last)
        flat = [size for generation in sizes for size in generation]
        ends = np.cumsum([len(generation) for generation in sizes]).tolist()
        assert stream.num_steps == len(flat)
        assert [stream.rows_before(step) for step in range(len(flat) + 1)] == [
            sum(flat[:n]) for n in range(len(flat) + 1)
        ]
        assert [step for step in range(len(flat) + 1) if stream.is_end(step)] == ends
        places = [stream.place(step) for step in range(1, len(flat) + 1)]
        assert places == [f"generation {number}" for number, one in enumerate(sizes) for _ in one]


def test_a_row_per_user_is_followed_too(folder, tmp_path):
    def users(first: int, count: int) -> pa.Table:
        table = rows(first, count).drop_columns(["item_id"])
        lists = [ITEMS[n % 5 : n % 5 + 4] for n in range(first, first + count)]
        return table.append_column("positives", pa.array(lists, pa.list_(pa.string())))

    for name, first, count in (("a", 0, 10), ("b", 10, 13)):
        publish(folder, f"train/{name}.parquet", users(first, count))
    stream = stream_of(folder, rows="user")
    found = while_reading(stream, step2=lambda: publish(folder, "train/c.parquet", users(23, 9)))
    assert found == expected(folder, 0, "a", "b") + expected(folder, 1, "c")
    assert taken(stream_of(folder, rows="user"), 1) == found[1:]


# Items and users that come


def counted(folder: Path, *names: str) -> Counter[str]:
    tables = [pq.read_table(folder / f"train/{name}.parquet") for name in names]
    return Counter(item for table in tables for item in table["item_id"].to_pylist())


def test_items_that_come_are_known_from_the_next_generation_on(folder):
    """Under a name before the others', too: they stand behind those that were there, whose rows stay."""
    stream = stream_of(folder)
    seen = []

    def come() -> None:
        seen.append(stream.sources.catalogue.ids.to_pylist())
        publish(folder, "items/a.parquet", items("new", "newer"))
        publish(folder, "train/c.parquet", rows(23, 9, ["new", "i03", "i04"]))

    while_reading(stream, step2=come, step5=lambda: seen.append(stream.sources.catalogue.ids.to_pylist()))
    assert seen == [ITEMS, [*ITEMS, "new", "newer"]]
    config = config_of(folder)
    run = Run(config.run_dir, config)
    of_all = run.initialize(ALONE) or run.open_dataset(ALONE)
    assert of_all.catalogue.ids.to_pylist() == [*ITEMS, "new", "newer"]
    assert of_all.dataset.train.num_rows == 32
    wanted = counted(folder, "a", "b", "c")
    assert wanted["new"] > 0
    assert run.item_counts(of_all.catalogue.keys).tolist() == [wanted[name] for name in [*ITEMS, "new", "newer"]]


def test_a_mapped_catalogue_knows_in_which_order_its_files_came(folder, monkeypatch):
    """Another run on the same files, which takes them by name, has other rows, though the cache folder is one."""
    monkeypatch.setattr("trec_twotower.data.item_table.MAPPED_CELLS", 0)
    cache = {"cache": folder.parent / "cache"}
    stream = stream_of(folder, **cache)
    while_reading(
        stream,
        step1=lambda: publish(folder, "items/a.parquet", items("new")),
        step2=lambda: publish(folder, "train/c.parquet", rows(23, 9)),
    )
    assert stream.sources.catalogue.ids.to_pylist() == [*ITEMS, "new"]
    config = config_of(folder, **cache, follow=None)
    other = Run(folder.parent / "other", config).initialize(ALONE)
    assert other.catalogue.ids.to_pylist() == ["new", *ITEMS]
    assert stream_of(folder, **cache).sources.catalogue.ids.to_pylist() == [*ITEMS, "new"]


def test_log_q_is_that_of_all_rows_so_far(folder):
    """The chance of item i to be a step's candidate, 1 - exp(-7 n_i / n), from counts by hand."""
    stream = stream_of(folder)
    made = []
    real = stream._batches
    stream._batches = lambda number: made.append(real(number)) or made[-1]

    def come() -> None:
        publish(folder, "items/b.parquet", items("new"))
        publish(folder, "train/c.parquet", rows(23, 9, ["new", "i03"]))

    while_reading(stream, step2=come, step5=lambda: publish(folder, "train/d.parquet", rows(32, 5, ["i03"])))
    for batches, files in zip(made, ("ab", "abc", "abcd"), strict=True):
        count = counted(folder, *files)
        names = batches.sources.catalogue.ids.to_pylist()
        rate = np.array([max(count[name], 1) * BATCH / count.total() for name in names])
        np.testing.assert_allclose(batches.log_q_I, np.log(1 - np.exp(-rate)), rtol=1e-5)
    assert [len(batches.log_q_I) for batches in made] == [12, 13, 13]
    # Another process counts for itself, where files of counts are gone or not.
    for kept in (True, False):
        for path in (folder.parent / "run").glob("item_counts-*.npy"):
            assert kept or path.unlink() is None
        for number, step in enumerate((0, 4, 6)):
            again = stream_of(folder)
            batches = again._batches(number)
            assert batches.first_step == step
            np.testing.assert_array_equal(batches.log_q_I, made[number].log_q_I)


def test_a_run_keeps_item_counts_of_few_generations(folder):
    stream = stream_of(folder)
    come = {
        f"step{4 + number}": partial(publish, folder, f"train/c{number}.parquet", rows(23 + number, 1))
        for number in range(6)
    }
    assert len(while_reading(stream, **come)) == 10
    files = sorted(path.name for path in (folder.parent / "run").glob("item_counts*"))
    assert files == ["item_counts-00000005.npy", "item_counts-00000006.npy", "item_counts.npy"]


def test_statistics_stay_those_of_the_first_generation(folder):
    """Ages of 0 to 22 eighths: the z-score of a row that comes is by their mean and deviation."""
    stream = stream_of(folder)
    assert len(taken(stream)) == 4
    publish(folder, "train/c.parquet", rows(100, 5))
    [batch] = stream_of(folder).iter_from(4)
    ages = np.arange(23) / 8
    wanted = (np.array(sorted(rows_in(batch))) / 8 - ages.mean()) / ages.std()
    np.testing.assert_allclose(np.sort(batch.user_number_BN[:, 0].numpy()), wanted, rtol=1e-5)


def test_statistics_that_are_learned_again_are_of_the_first_generation_and_the_rows_of_all(folder):
    """Whoever removes a broken statistics.json goes on as if it had never been broken."""
    assert len(taken(stream_of(folder))) == 4
    publish(folder, "train/c.parquet", rows(100, 5))
    wanted = taken(stream_of(folder), 4)
    path = folder.parent / "run" / "statistics.json"
    before = path.read_bytes()
    path.unlink()
    stream = stream_of(folder)
    assert path.read_bytes() == before
    assert stream.sources.dataset.train.num_rows == 23 + 5
    assert taken(stream_of(folder), 4) == wanted


def test_users_that_come_are_known_from_the_next_generation_on(folder):
    publish(folder, "users/part-0.parquet", pa.table({"user_id": [0, 1, 2, 3, 4], "height": [1.5, 2, 1, 1, 1]}))
    config = config_of(folder)
    config = config.model_copy(
        update={"user": (*config.user, config.user[1].model_copy(update={"name": "height", "normalize": "none"}))}
    )

    def come() -> None:
        publish(folder, "users/a.parquet", pa.table({"user_id": [77], "height": [9.0]}))
        publish(folder, "train/c.parquet", rows(23, 2, user_id=pa.array([77, 0])))

    assert len(while_reading(stream_by(config), step1=come)) == 5
    [batch] = stream_by(config).iter_from(4)
    assert sorted(batch.user_number_BN[:, 2].tolist()) == [1.5, 9.0]


# What goes wrong


def test_an_item_nobody_knows_stops_the_run_before_its_file_is_taken(folder):
    """So the item can be written, and the same command goes on."""
    publish(folder, "train/c.parquet", rows(23, 2, ["i01", "unheard"]))
    (folder / "train/c.parquet").rename(folder / "c")
    stream = stream_of(folder)
    with pytest.raises(DataError, match=r"c\.parquet, .*item 'unheard' is not in the catalogue"):
        while_reading(stream, step4=lambda: (folder / "c").rename(folder / "train/c.parquet"))
    publish(folder, "items/b.parquet", items("unheard"))
    assert taken(stream_of(folder), 4) == [[23, 24]]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("row", pa.array([23, 24], pa.uint64()), "column 'row' is uint64, but int64"),
        ("age", pa.array(["1", "2"]), "column 'age' is string, but double"),
        ("item_id", pa.array([1, 2]), "column 'item_id' is int64, but string"),
    ],
)
def test_a_file_of_another_type_stops_the_run_before_it_is_taken(folder, column, values, said):
    table = rows(23, 2)
    publish(folder, "train/c.parquet", table.set_column(table.column_names.index(column), column, values))
    (folder / "train/c.parquet").rename(folder / "c")
    stream = stream_of(folder)
    with pytest.raises(DataError, match=rf"c\.parquet: {said}"):
        while_reading(stream, step2=lambda: (folder / "c").rename(folder / "train/c.parquet"))
    publish(folder, "train/c.parquet", rows(23, 2))
    assert taken(stream_of(folder), 4) == [[23, 24]]


def test_wider_numbers_are_refused_and_narrower_ones_taken(folder):
    """By the types of the files that the run began with: here 32 bits."""
    narrow = {"row": pa.array(np.arange(23, dtype=np.int32)), "age": pa.array(np.arange(23, dtype=np.float32))}
    publish(folder, "train/a.parquet", rows(0, 23, **narrow))
    (folder / "train/b.parquet").unlink()
    assert len(taken(stream_of(folder))) == 4
    for column, kinds in (("row", "int64, but int32"), ("age", "double, but float")):
        given = {"row": pa.array([23], pa.int32()), "age": pa.array([2], pa.float32())}
        given.pop(column)
        path = publish(folder, "train/c.parquet", rows(23, 1, **given))
        with pytest.raises(DataError, match=rf"c\.parquet: column '{column}' is {kinds} in the files .* began with"):
            taken(stream_of(folder), 4)
        path.unlink()
    lesser = {
        "row": pa.array([23], pa.int16()),
        "age": pa.array([2], pa.float16()),
        "item_id": pa.array(["i01"], pa.large_string()),
    }
    publish(folder, "train/c.parquet", rows(23, 1, **lesser))
    assert taken(stream_of(folder), 4) == [[23]]


def test_a_column_that_was_null_throughout_may_hold_anything_later(folder):
    """It had no type that a feature could have read."""
    publish(folder, "train/b.parquet", rows(10, 13, note=pa.nulls(13), notes=pa.array([[]] * 13, pa.list_(pa.null()))))
    publish(folder, "train/a.parquet", rows(0, 10, note=pa.nulls(10), notes=pa.array([[]] * 10, pa.list_(pa.null()))))
    assert len(taken(stream_of(folder))) == 4
    publish(folder, "train/c.parquet", rows(23, 2, note=pa.array([1.5, 2]), notes=pa.array([["x"], []])))
    assert taken(stream_of(folder), 4) == [[23, 24]]


def test_a_missing_column_stops_the_run_and_a_further_one_does_not(folder):
    assert len(taken(stream_of(folder))) == 4
    path = publish(folder, "train/c.parquet", rows(23, 1).drop_columns(["age"]))
    with pytest.raises(DataError, match=r"c\.parquet has no column 'age'"):
        taken(stream_of(folder), 4)
    path.unlink()
    publish(folder, "train/c.parquet", rows(23, 1, weight=pa.array([3.0])))
    [batch] = stream_of(folder).iter_from(4)
    assert rows_in(batch) == [23]
    assert batch.targets.positive.weight_P.tolist() == [1]  # no file had weights when the run began


@pytest.mark.parametrize("part", ["train/a", "train/c", "items/part-0"])
@pytest.mark.parametrize("change", ["gone", "another size"])
def test_a_file_that_changed_after_it_was_taken_is_named(folder, part, change):
    publish(folder, "train/c.parquet", rows(23, 5))
    (folder / "train/c.parquet").rename(folder / "c")
    while_reading(stream_of(folder), step1=lambda: (folder / "c").rename(folder / "train/c.parquet"))
    path = folder / f"{part}.parquet"
    size = path.stat().st_size
    if change == "gone":
        path.unlink()
        said = "is gone"
    else:
        publish(folder, f"{part}.parquet", rows(0, 50) if "train" in part else items(*ITEMS, "one", "more"))
        said = f"has {path.stat().st_size:,} bytes"
    with pytest.raises(DataError, match=rf"{part}\.parquet {said}, but had {size:,} when this run read it"):
        taken(stream_of(folder))


def test_a_file_that_is_replaced_while_it_is_read_is_named(folder):
    def replace() -> None:
        for name in "ab":
            publish(folder, f"train/{name}.parquet", rows(0, 50))

    with pytest.raises(DataError, match=r"train/[ab]\.parquet has .* bytes, but had"):
        while_reading(stream_of(folder, threads=0, prefetch=1, batch_size=2, shuffle_rows=4), step1=replace)


def test_a_folder_with_nothing_to_begin_with_is_an_error(folder):
    for name in "ab":
        (folder / f"train/{name}.parquet").unlink()
    with pytest.raises(DataError, match="train has no whole Parquet files with a row yet"):
        stream_of(folder)
    publish(folder, "train/a.parquet", rows(0, 5))
    with pytest.raises(DataError, match=r"train has no whole Parquet files with 7 rows .* yet"):
        stream_of(folder, drop_last=True)
    assert not (folder.parent / "run").exists()
    assert [len(step) for step in taken(stream_of(folder))] == [5]  # fewer than a batch: one small step


def test_a_lost_or_broken_list_of_files_is_an_error(folder):
    assert len(taken(stream_of(folder))) == 4
    path = folder.parent / "run/stream.json"
    path.write_text('{"generations": [{"files": {}}]}')
    with pytest.raises(DataError, match=r"stream\.json is damaged"):
        stream_of(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"stream\.json is missing"):
        stream_of(folder)


def test_a_schedule_that_needs_the_last_step_is_refused(folder):
    values = config_of(folder).model_dump(mode="json")
    values["train"]["optimizer"]["schedule"] = "linear"
    with pytest.raises(ConfigError, match=r"train\.optimizer\.schedule is 'linear', which depends on the last step"):
        validate(RunConfig, values, "a test's config")
