"""With data.drop_last every step is a whole batch, over any number of ranks, and the rest of an epoch is left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.loading.test_reader import ITEM, NUM_ITEMS, rows_of
from tests.kinds import build_loss
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.errors import ConfigError

NUM_ROWS, BATCH = 58, 11  # five batches and a rest of 3
# So large a table that a bucket is the id itself: a batch can be read back.
USER = (build_feature(name="row", kind="id", table="row"),)
ITEMS = (build_feature(name="item_id", kind="id", table="item"),)
SCHEMA = Schema.build({"row": TableSpec(buckets=1 << 20, dim=4, hashing="modulo"), "item": ITEM}, USER, ITEMS)


@pytest.fixture
def folder(tmp_path, rng, write_dataset) -> Path:
    train = rows_of(rng, NUM_ROWS).append_column("row", pa.array(np.arange(NUM_ROWS)))
    items = pa.table({"item_id": np.arange(NUM_ITEMS) * 3})
    return write_dataset(tmp_path / "d", row_group_size=9, items=items, train=[train[:20], train[20:]])


def batches_of(folder: Path, share: tuple[int, int] = (0, 1), **data: Any) -> TrainBatches:
    settings = {"batch_size": BATCH, "shuffle_rows": 20, "drop_last": True} | data
    config = DataConfig(dataset=folder, **settings)
    sources = FeatureDataset(Dataset(config.dataset), SCHEMA, config.rows)
    return TrainBatches(sources, config, build_loss(), sources.item_counts(), share)


def rows_in(batch: Any) -> list[int]:
    return batch.sparse["user:row"].values().tolist()


@pytest.mark.parametrize("rows", ["event", "user"])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_step_is_a_whole_batch_over_all_ranks(folder, num_ranks, threads, rows):
    """For three epochs: no row twice in one, the tail's three never, and the same steps as with the tail but for it."""
    of_ranks = [batches_of(folder, (rank, num_ranks), threads=threads, rows=rows) for rank in range(num_ranks)]
    assert {(one.steps_per_epoch, one.rows_per_epoch) for one in of_ranks} == {(5, 55)}
    with_tail = batches_of(folder, rows=rows, drop_last=False)
    assert with_tail.steps_per_epoch == 6
    whole = [sorted(rows_in(batch)) for batch in with_tail.iter_from(0, 18)]
    steps = list(zip(*(one.iter_from(0, 15) for one in of_ranks), strict=True))
    found = [sorted(row for batch in step for row in rows_in(batch)) for step in steps]
    assert found == [step for number, step in enumerate(whole) if number % 6 != 5]
    assert {batch.num_rows_of_all_ranks for step in steps for batch in step} == {BATCH}
    for epoch in range(3):
        taken = Counter(row for step in found[5 * epoch : 5 * epoch + 5] for row in step)
        assert len(taken) == 55 and set(taken.values()) == {1}


@pytest.mark.parametrize("drop_last", [True, False])
def test_where_the_rows_of_a_step_stand_is_told(folder, drop_last):
    """Each row of a step once, counted within its row group; in the second epoch, too."""
    batches = batches_of(folder, drop_last=drop_last)
    first_row = {(str(group.path), group.number): group.first_row for group in batches.sources.dataset.train.row_groups}
    for step, batch in enumerate(batches.iter_from(0, 2 * batches.steps_per_epoch)):
        places = batches.rows_of(step)
        for place in places:
            assert place.rows == sorted(place.rows)
        told = [first_row[place.path, place.row_group] + row for place in places for row in place.rows]
        assert sorted(told) == sorted(rows_in(batch))


def test_what_is_left_out_changes_from_epoch_to_epoch(folder):
    found = [rows_in(batch) for batch in batches_of(folder).iter_from(0, 50)]
    left = [set(range(NUM_ROWS)) - {row for step in found[low : low + 5] for row in step} for low in range(0, 50, 5)]
    assert all(len(rows) == 3 for rows in left)
    assert len(set.union(*left)) > 10


@pytest.mark.parametrize("first", range(11))
def test_a_run_resumes_at_any_step(folder, first):
    whole = [rows_in(batch) for batch in batches_of(folder).iter_from(0, 11)]
    assert [rows_in(batch) for batch in batches_of(folder).iter_from(first, 11)] == whole[first:]


def test_rows_that_fill_their_batches_are_all_taken(folder):
    """58 rows are 2 batches of 29, with drop_last or without."""
    found = [rows_in(batch) for batch in batches_of(folder, batch_size=29).iter_from(0, 4)]
    assert sorted(found[0] + found[1]) == sorted(found[2] + found[3]) == list(range(NUM_ROWS))


def test_row_groups_of_the_tail_alone_are_not_read(folder, monkeypatch):
    """Windows are row groups of at most 9 rows here, and 18 of 58 rows stand behind the one batch of 40."""
    batches = batches_of(folder, batch_size=40, shuffle_rows=1)
    read = []
    real = batches.reader.read
    monkeypatch.setattr(batches.reader, "read", lambda unit, cuts: read.append(unit.epoch) or real(unit, cuts))
    assert [len(rows_in(batch)) for batch in batches.iter_from(0, 3)] == [40, 40, 40]
    wanted = [sum(window.first < 40 for window in batches.windows(epoch)) for epoch in range(3)]
    assert [read.count(epoch) for epoch in range(3)] == wanted
    assert all(count < 8 for count in wanted)


def test_fewer_rows_than_a_batch_are_an_error(folder):
    with pytest.raises(ConfigError, match=r"data\.batch_size is 59, but .*train has only 58 rows"):
        batches_of(folder, batch_size=59)
    assert batches_of(folder, batch_size=58).steps_per_epoch == 1
