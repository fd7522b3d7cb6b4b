"""Which rows a step takes depends on the data and the seed alone: at any number of ranks, threads and row groups."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tests.kinds import build_loss
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.loader import TrainBatches

ROWS, BATCH, STEPS = 61, 8, 12  # a step of 5 rows ends the epoch of 8 steps; then half of the next
ROW = TableSpec(buckets=1000, dim=4, hashing="modulo")  # a row's user_id is its own bucket
SCHEMA = Schema.build(
    {"user": ROW},
    (build_feature(name="user_id", kind="id", table="user"), build_feature(name="words", kind="bag", buckets=9, dim=4)),
    (build_feature(name="item_id", kind="id", buckets=50, dim=4),),
)


@pytest.fixture(scope="module", params=[0, 1, 2, 7])
def folder(request, tmp_path_factory, write_dataset):
    """So many row groups in the second of three files, of 61 rows in all; without any, that file has no rows."""
    random = np.random.default_rng(1)
    words = [["w"] * int(length) for length in random.integers(0, 4, ROWS)]
    rows = pa.table({
        "user_id": np.arange(ROWS), "item_id": random.integers(0, 20, ROWS),
        "words": pa.array(words, pa.list_(pa.string())),
    })  # fmt: skip
    in_second = 7 * request.param
    files = [rows.slice(0, 6), rows.slice(6, in_second), rows.slice(6 + in_second)]
    items = pa.table({"item_id": np.arange(20)})
    place = tmp_path_factory.mktemp("groups")
    return write_dataset(place / "d", row_group_size=7, items=items, train=files)


def steps_of(folder, rank: int, num_ranks: int, threads: int) -> list[list[int]]:
    """The rows of this rank, step by step, in their order."""
    dataset = Dataset(folder)
    sources = FeatureDataset(dataset, SCHEMA, "event")
    data = DataConfig(dataset=str(folder), batch_size=BATCH, shuffle_rows=20, threads=threads, seed=3)
    counts = np.ones(len(sources.catalogue), np.int64)
    batches = TrainBatches(sources, data, build_loss(), counts, (rank, num_ranks))
    found = []
    for batch in batches.iter_from(0, STEPS):
        users = batch.sparse["user:user_id"]
        found.append(users.values().tolist())
        assert users.lengths().sum() == len(found[-1]) == batch.user_divisor_BF.shape[0]
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_rank_and_thread_count_takes_the_same_rows_in_the_same_steps(folder, num_ranks):
    wanted = steps_of(folder, 0, 1, threads=0)
    assert sorted(row for step in wanted[:8] for row in step) == list(range(ROWS))
    assert [len(step) for step in wanted] == [8] * 7 + [5] + [8] * 4
    for threads in range(5):
        ranks = [steps_of(folder, rank, num_ranks, threads) for rank in range(num_ranks)]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            place = {row: number for number, row in enumerate(wanted[step])}
            assert sorted(row for part in parts for row in part) == sorted(place), (threads, step)
            for part in parts:  # each rank's own in the order in which one rank takes them all
                assert part == sorted(part, key=place.__getitem__), (threads, step)
