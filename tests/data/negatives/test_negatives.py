"""Every source of negatives brings what it says, and each candidate is there as often as its log q says."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.kinds import build_loss
from tests.ranks.worlds import event_config
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.loading import parse_yaml
from trec_twotower.config.losses import LossConfig, TopKConfig
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.negatives.samplers import (
    PopularitySampler,
    RefreshedNegatives,
    SameCategorySampler,
    UniformSampler,
    count_items,
    sampled_from,
)
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.ops.hashing import fingerprints
from trec_twotower.ops.ragged import Ragged

NUM_ITEMS, NUM_USERS, NUM_ROWS = 60, 90, 900
ITEMS = [1000 + 7 * n for n in np.random.default_rng(5).permutation(NUM_ITEMS).tolist()]
NOTHING = np.empty(0, np.int64)
ID = TableSpec(buckets=1 << 20, dim=4, hashing="modulo")  # so large that a bucket is the id itself
ROW = build_feature(name="row", kind="id", table="id")
ITEM = build_feature(name="item_id", kind="id", table="id")
SHELF = build_feature(name="shelf", kind="category", table="id")
SCHEMA = Schema.build({"id": ID}, (ROW,), (ITEM, SHELF))


# Samplers by themselves


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic is from its mean."""
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_even_draws_are_even_and_anew_each_step():
    draws = np.stack([UniformSampler(50, 200, seed=0).draw(step, NOTHING) for step in range(2_000)])
    assert draws.min() >= 0 and draws.max() < 200
    counts = np.bincount(draws.reshape(-1), minlength=200)
    assert abs(chi_square(counts, np.full(200, draws.size / 200))) < 5
    # Two steps share a place's draw as often as chance has it.
    same = (draws[1:] == draws[:-1]).mean()
    assert abs(same - 1 / 200) < 5 * math.sqrt(1 / 200 / draws[1:].size)


TAKEN = np.array([0, 1, 1, 2, 5, 9, 30, 100])
SAMPLERS = {
    "evenly": lambda count, seed: UniformSampler(count, 8, seed),
    "by popularity": lambda count, seed: PopularitySampler(count, 0.75, TAKEN, seed),
    "same": lambda count, seed: SameCategorySampler(count, np.array([3, 3, 9, 9, 9, 0, 0, 0]), TAKEN, seed),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_depends_on_seed_and_step_and_those_before_it_alone(name):
    make, taken = SAMPLERS[name], np.array([0, 6, 7, 4, 7])
    draw = make(40, 3).draw(4, taken)
    assert np.array_equal(draw, make(40, 3).draw(4, taken))
    assert not np.array_equal(draw, make(40, 4).draw(4, taken))
    assert not np.array_equal(draw, make(40, 3).draw(5, taken))
    assert np.array_equal(draw[:5], make(5, 3).draw(4, taken))


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0, 2.0])
def test_popular_items_are_drawn_in_proportion_to_the_power(power):
    """An item that nobody took is drawn as if one had."""
    sampler = PopularitySampler(64, power, TAKEN, seed=1)
    counts = np.bincount(np.concatenate([sampler.draw(step, NOTHING) for step in range(3_000)]), minlength=8)
    weight = np.array([max(int(taken), 1) ** power for taken in TAKEN])
    assert abs(chi_square(counts, counts.sum() * weight / weight.sum())) < 5


def test_an_item_of_the_same_category_is_any_of_those_of_a_positive():
    """Positives are drawn evenly, each as often as it stands there; then the items of its category."""
    shelf = np.array([3, 3, 9, 9, 9, 0, 0, 0])
    sampler = SameCategorySampler(64, shelf, TAKEN, seed=1)
    taken = np.array([0, 0, 0, 4, 1])
    counts = np.bincount(np.concatenate([sampler.draw(step, taken) for step in range(3_000)]), minlength=8)
    expected = np.array([4 / 5 / 2, 4 / 5 / 2, 1 / 5 / 3, 1 / 5 / 3, 1 / 5 / 3, 0, 0, 0]) * counts.sum()
    assert (counts[expected == 0] == 0).all()
    assert abs(chi_square(counts[:5], expected[:5])) < 5
    assert sampler.draw(0, NOTHING).size == 0


def test_a_row_draws_one_of_its_lists_evenly_and_from_that_evenly():
    lists = Ragged.from_lists([[10, 11], [12], [], [13, 14, 15]])
    list_rows = Ragged.from_lists([[0, 3], [], [-1], [2], [1, -1], [3]])
    drawn = [sampled_from(list_rows, lists, 5, 1, step) for step in range(4_000)]
    assert all(each.lengths[[1, 2, 3]].tolist() == [0, 0, 0] for each in drawn)
    assert {each.lengths[0] for each in drawn} == {each.lengths[5] for each in drawn} == {5}
    first, last = (np.stack([each.take(np.array([row])).values for each in drawn]) for row in (0, 5))
    assert {tuple(set(row < 13)) for row in first.tolist() for row in [np.array(row)]} == {(True,), (False,)}
    for draw in range(5):
        counts = np.bincount(first[:, draw] - 10, minlength=6)[[0, 1, 3, 4, 5]]
        assert abs(chi_square(counts, np.array([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]) * len(first))) < 5
    assert abs(chi_square(np.bincount(last.reshape(-1) - 13, minlength=3), np.full(3, last.size / 3))) < 5
    half = np.array([each.lengths[4] for each in drawn])  # one list of two, the other is none
    assert set(half.tolist()) == {0, 5} and abs((half > 0).mean() - 0.5) < 5 * math.sqrt(0.25 / len(half))
    assert np.array_equal(drawn[7].values, sampled_from(list_rows, lists, 5, 1, 7).values)
    assert len({tuple(each.values.tolist()) for each in drawn[:50]}) == 50


# A world whose rows name items of their own


def random_lists(rng, low: int, high: int, popular: np.ndarray) -> list[list[int]]:
    return [rng.choice(ITEMS, rng.integers(low, high), replace=False, p=popular).tolist() for _ in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_dataset):
    """Folders with a row per event and a row per user, and files by item and by user."""
    rng = np.random.default_rng(3)
    popular = rng.zipf(1.6, NUM_ITEMS).clip(max=12).astype(float)
    popular /= popular.sum()
    refused = random_lists(rng, 0, 5, popular[::-1])
    refused[3], refused[5] = None, [refused[4][0], refused[4][0], None, ITEMS[0]] if refused[4] else [ITEMS[0]] * 2
    items_of = [rng.choice(ITEMS, rng.integers(8, 15), replace=False, p=popular).tolist() for _ in range(NUM_ROWS)]
    columns = {
        "user_id": rng.integers(0, NUM_USERS, NUM_ROWS),
        "row": np.arange(NUM_ROWS),
        "item_id": rng.choice(ITEMS, NUM_ROWS, p=popular),
        "positives": pa.array(items_of, pa.list_(pa.int64())),
        "shown": pa.array(refused, pa.list_(pa.int64())),
        "grade": pa.array([row and [int(n % 3) for n in range(len(row))] for row in refused], pa.list_(pa.int32())),
        "care": pa.array([row and [0.5 + n for n in range(len(row))] for row in refused], pa.list_(pa.float32())),
    }
    root = tmp_path_factory.mktemp("negatives")
    folder = write_dataset(
        root / "world",
        row_group_size=64,
        items=pa.table({"item_id": ITEMS, "shelf": [n * n % 7 for n in range(NUM_ITEMS)]}),
        train=pa.table(columns),
    )
    by_item = [rng.choice(ITEMS, 1 + n % 9, replace=False).tolist() for n in range(NUM_ITEMS - 5)]
    by_item[2] = []
    pq.write_table(pa.table({"item_id": ITEMS[5:], "negatives": by_item}), root / "by_item.parquet")
    by_user = [rng.choice(ITEMS, n % 8, replace=False).tolist() for n in range(NUM_USERS - 10)]
    lists = pa.array(by_user, pa.list_(pa.int64()))
    users = rng.permutation(NUM_USERS)[: NUM_USERS - 10]
    pq.write_table(pa.table({"user_id": users, "negatives": lists}), root / "by_user.parquet")
    pq.write_table(pa.table({"user_id": users, "item_ids": lists}), root / "known.parquet")
    return folder


@pytest.fixture(scope="module")
def told(world):
    """The rows as they stand in the files, read the plain way."""
    return pq.ParquetDataset(world / "train").read().to_pylist()


def batches_of(world, loss: LossConfig, share=(0, 1), rows="event", **data) -> TrainBatches:
    settings = {"batch_size": 20, "shuffle_rows": 200, "rows": rows} | data
    sources = FeatureDataset(Dataset(world), SCHEMA, rows)
    config = DataConfig(dataset=world, **settings)
    return TrainBatches(sources, config, loss, count_items(sources, loss), share)


def candidates_of(batches: list[Batch]) -> list[int]:
    """The item ids of a step's candidates, those of all ranks."""
    found = []
    for rank, batch in enumerate(batches):
        jagged = batch.sparse["item:item_id"]
        found += jagged.values()[: batch.item_sizes[rank]].tolist()
    return found


def rows_of(batch: Batch) -> list[int]:
    return batch.sparse["user:row"].values().tolist()


def given_of(batch: Batch, items: list[int]) -> list[list[tuple[int, float, float]]]:
    """By row the items that it names, with labels and weights, in their order."""
    found = [[] for _ in rows_of(batch)]
    given = batch.targets.given
    parts = (given.row_P, given.column_P, given.label_P, given.weight_P)
    for row, column, label, weight in zip(*(part.tolist() for part in parts), strict=True):
        found[row].append((items[column], label, weight))
    return found


# Every candidate with its inclusion probability

SHOWN = {"column": "shown"}
GRADED = {"column": "shown", "labels": "grade", "weights": "care"}
ONLY = {"in_batch": False}
CASES = {
    "in batch": {},
    "even": {"negatives": {"sampled": 30}},
    "even alone": {"negatives": ONLY | {"sampled": 30}},
    "popular": {"negatives": ONLY | {"sampled": 40, "power": 0.75}},
    "popular beside the batch": {"negatives": {"sampled": 25, "power": 1.0}},
    "even and popular": {"negatives": ONLY | {"sampled": 15, "popular": {"count": 25, "power": 1.0}}},
    "two powers beside the batch": {"negatives": {"sampled": 9, "power": 0.5, "popular": {"count": 12}}},
    "same": {"negatives": ONLY | {"same_category": {"feature": "shelf", "count": 25}}},
    "given": {"negatives": ONLY, "impressions": SHOWN},
    "given with labels": {"negatives": ONLY, "impressions": GRADED},
    "given to the own row": {"negatives": {"sampled": 20}, "impressions": SHOWN | {"shared": False}},
    "mined by item": {"negatives": ONLY | {"mined": {"file": "by_item.parquet", "count": 2}}},
    "mined by user": {"negatives": ONLY | {"mined": {"file": "by_user.parquet", "key": "user_id", "count": 2}}},
    "refreshed": {"negatives": ONLY | {"sampled": 1, "refresh": {"every": 10**6, "count": 2}}},
    "all together": {
        "impressions": GRADED,
        "negatives": {
            "sampled": 5,
            "power": 0.5,
            "popular": {"count": 4, "power": 0.9},
            "same_category": {"feature": "shelf", "count": 6},
            "mined": {"file": "by_item.parquet", "count": 1},
        },
    },
}


def in_world(world, case: dict) -> LossConfig:
    case = {name: dict(value) if isinstance(value, dict) else value for name, value in case.items()}
    mined = case.get("negatives", {}).get("mined")
    if mined:
        case["negatives"]["mined"] = mined | {"file": str(world.parent / mined["file"])}
    return build_loss(**case)


@pytest.mark.parametrize("rows", ["event", "user"])
@pytest.mark.parametrize("name", CASES)
def test_items_stand_against_all_rows_as_often_as_log_q_says(world, name, rows):
    """Over thousands of steps of real batches, each item within five standard errors of its probability.

    That is exact for what is drawn from the catalogue. Beside it there is an allowance: an epoch takes each row once,
    and a row brings some items together and none of them twice.
    """
    made = batches_of(world, in_world(world, CASES[name]), rows=rows, batch_size=20 if rows == "event" else 4)
    if name == "refreshed":
        lists = [[(7 * n + k * k) % NUM_ITEMS for k in range(n % 6)] for n in range(40)]
        list_of_item = np.arange(NUM_ITEMS) - 20
        made.negatives.refresh(Ragged.from_lists(lists), np.maximum(list_of_item, -1))
    seen, steps = np.zeros(NUM_ITEMS), 2700
    place = {item: row for row, item in enumerate(ITEMS)}
    for batch in made.iter_from(0, steps):
        columns = torch.arange(len(batch.is_negative_C))[batch.is_negative_C].tolist()
        items = candidates_of([batch])
        seen[[place[items[column]] for column in columns]] += 1
    expected = np.exp(made.log_q_I)
    if name in ("given", "given with labels", "mined by item", "mined by user"):
        expected[seen == 0] = np.where(expected < 0.05, 0, expected)[seen == 0]  # the floor of those never brought
    allowance = 0 if name in ("even alone", "popular", "even and popular") else 0.015
    error = np.sqrt(expected * (1 - expected) / steps)
    assert (np.abs(seen / steps - expected) < 5 * error + allowance).all()
    assert abs((seen / steps - expected).mean()) < 5 * math.sqrt((error**2).sum()) / NUM_ITEMS + allowance
    assert expected.std() > 0.02 or name == "even alone"


# Items that rows name themselves


@pytest.mark.parametrize("rows", ["event", "user"])
def test_a_row_refuses_what_its_column_says_with_labels_and_weights(world, told, rows):
    """Every element of every list, in its order, null lists and elements left out, doubles kept."""
    made = batches_of(world, in_world(world, {"impressions": GRADED}), rows=rows)
    found = {}
    for batch in made.iter_from(0, made.steps_per_epoch):
        found |= dict(zip(rows_of(batch), given_of(batch, candidates_of([batch])), strict=True))
    assert sorted(found) == list(range(NUM_ROWS))
    for number, row in enumerate(told):
        parts = zip(row["shown"] or [], row["grade"] or [], row["care"] or [], strict=True)
        assert found[number] == [(item, grade, care) for item, grade, care in parts if item is not None]
    assert sum(map(len, found.values())) > 1000


def test_without_labels_and_weights_a_row_refuses_all_alike(world, told):
    made = batches_of(world, in_world(world, {"impressions": SHOWN}))
    for batch in made.iter_from(0, 10):
        for number, given in zip(rows_of(batch), given_of(batch, candidates_of([batch])), strict=True):
            assert given == [(item, 0, 1) for item in told[number]["shown"] or [] if item is not None]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_candidates_are_what_rows_took_and_name_and_those_stand_against_all_that_are_shared(
    world, told, shared, in_batch
):
    """With labels, what some row refused stands against all, but what all that name it took does not."""
    case = {"impressions": GRADED | {"shared": shared}, "negatives": {"in_batch": in_batch, "sampled": 3}}
    made = batches_of(world, in_world(world, case))
    for step, batch in enumerate(made.iter_from(0, 20)):
        rows = [told[number] for number in rows_of(batch)]
        items = candidates_of([batch])
        named = [pair for row in rows for pair in zip(row["shown"] or [], row["grade"] or [], strict=True)]
        drawn = {ITEMS[row] for row in UniformSampler(3, NUM_ITEMS, 0).draw(step, NOTHING)}
        taken, named_items = {row["item_id"] for row in rows}, {item for item, _ in named if item is not None}
        assert [ITEMS.index(item) for item in items] == sorted(
            {ITEMS.index(item) for item in taken | named_items | drawn}
        )
        against_all = drawn | (taken if in_batch else set())
        against_all |= {item for item, grade in named if item is not None and grade <= 0} if shared else set()
        assert batch.is_negative_C.tolist() == [item in against_all for item in items]


def test_what_a_row_names_and_took_is_known_to_it(tmp_path, write_dataset):
    """So no loss counts it as its negative; against the other rows it may stand."""
    train = pa.table({"user_id": [1, 2], "row": [0, 1], "item_id": ITEMS[:2], "shown": [ITEMS[:3], [ITEMS[2]]]})
    items = pa.table({"item_id": ITEMS, "shelf": [0] * NUM_ITEMS})
    folder = write_dataset(tmp_path / "d", items=items, train=train)
    made = batches_of(folder, in_world(tmp_path, {"impressions": SHOWN}), batch_size=2)
    [batch] = made.iter_from(0, 1)
    known = set(zip(batch.targets.known.row_P.tolist(), batch.targets.known.column_P.tolist(), strict=True))
    first = rows_of(batch).index(0)
    items = candidates_of([batch])
    assert known == {(first, items.index(ITEMS[0])), (1 - first, items.index(ITEMS[1]))}
    assert [item for item, _, _ in given_of(batch, items)[first]] == ITEMS[:3]


LISTED = {
    "given": {"impressions": GRADED},
    "mined by item": {"negatives": {"mined": {"file": "by_item.parquet", "count": 3}}},
    "mined by user": {"negatives": {"mined": {"file": "by_user.parquet", "key": "user_id", "count": 3}}},
    "all": CASES["all together"] | {"known": "known.parquet"},
}


@pytest.mark.parametrize("rows", ["event", "user"])
@pytest.mark.parametrize("name", LISTED)
def test_ranks_threads_and_caches_change_no_pair(world, tmp_path, name, rows):
    """Two and three ranks with cache and threads hold together what one rank without has, row by row."""
    case = dict(LISTED[name])
    if "known" in case:
        case["known"] = str(world.parent / "known.parquet")
    loss = in_world(world, case)

    def pairs(batches: list[Batch]) -> tuple[list[int], list[bool], dict[int, tuple]]:
        items, found = candidates_of(batches), {}
        for batch in batches:
            given, known = given_of(batch, items), [set() for _ in rows_of(batch)]
            for row, column in zip(
                batch.targets.known.row_P.tolist(), batch.targets.known.column_P.tolist(), strict=True
            ):
                known[row].add(items[column])
            found |= dict(zip(rows_of(batch), zip(given, known, strict=True), strict=True))
        return items, batches[0].is_negative_C.tolist(), found

    alone = list(batches_of(world, loss, rows=rows, threads=0).iter_from(40, 60))
    for num_ranks in (1, 2, 3):
        for _ in range(2):  # the cache is filled, then read
            settings = {"rows": rows, "threads": 2, "cache": tmp_path / "cache"}
            ranks = [
                list(batches_of(world, loss, (r, num_ranks), **settings).iter_from(40, 60)) for r in range(num_ranks)
            ]
            for whole, *parts in zip(alone, *ranks, strict=True):
                assert pairs(parts) == pairs([whole])
                assert all(torch.equal(part.log_q_C, whole.log_q_C) for part in parts)


def test_a_cache_of_other_given_columns_is_another(world, tmp_path):
    cached = {"cache": tmp_path / "cache"}
    for number, given in enumerate((None, SHOWN, GRADED, GRADED | {"shared": False}), 1):
        loss = in_world(world, {"impressions": given} if given else {})
        list(batches_of(world, loss, **cached).iter_from(0, 3))
        assert len(list((tmp_path / "cache").glob("*/"))) == min(number, 3)  # shared changes no row


@pytest.mark.parametrize("key", ["item_id", "user_id"])
def test_mined_items_are_draws_from_the_list_of_the_key(world, told, key):
    """Rows whose key has no list, or an empty one, bring nothing; the others draw so many, anew each step."""
    mined = {"file": "by_item.parquet" if key == "item_id" else "by_user.parquet", "key": key, "count": 4}
    made = batches_of(world, in_world(world, {"negatives": {"mined": mined}}))
    file = pq.read_table(world.parent / mined["file"]).to_pylist()
    lists = {row[key]: row["negatives"] for row in file}
    draws = []
    for batch in made.iter_from(0, 2 * made.steps_per_epoch):
        for number, given in zip(rows_of(batch), given_of(batch, candidates_of([batch])), strict=True):
            wanted = lists.get(told[number][key]) or []
            assert len(given) == (4 if wanted else 0) and {item for item, _, _ in given} <= set(wanted)
            assert all((label, weight) == (0, 1) for _, label, weight in given)
            draws.append((number, tuple(item for item, _, _ in given)))
    by_row = {}
    for number, items in draws:
        by_row.setdefault(number, []).append(items)
    assert sum(first != second for first, second in by_row.values()) > NUM_ROWS / 2
    assert sum(len(items) == 4 for _, items in draws) > NUM_ROWS


def test_items_of_a_file_are_known_to_their_user(world, told):
    """Beside the row's own positive; users without a row in the file know nothing else."""
    loss = in_world(world, {"known": str(world.parent / "known.parquet"), "negatives": {"sampled": "all"}})
    by_user = {
        row["user_id"]: set(row["item_ids"]) for row in pq.read_table(world.parent / "known.parquet").to_pylist()
    }
    made = batches_of(world, loss)
    for batch in made.iter_from(0, made.steps_per_epoch):
        items = candidates_of([batch])
        known = [set() for _ in rows_of(batch)]
        pairs = batch.targets.known
        for row, column in zip(pairs.row_P.tolist(), pairs.column_P.tolist(), strict=True):
            known[row].add(items[column])
        for number, found in zip(rows_of(batch), known, strict=True):
            row = told[number]
            assert found == by_user.get(row["user_id"], set()) | {row["item_id"]}


def test_refreshed_lists_are_drawn_from_as_soon_as_they_are_there(world, told):
    loss = in_world(world, {"negatives": {"refresh": {"every": 10**6, "count": 2}}})
    made = batches_of(world, loss, prefetch=1)
    assert all(batch.targets.given is None for batch in made.iter_from(0, 3))
    made.negatives.refresh(
        Ragged.from_lists([[3, 4], [9]]), np.where(np.arange(NUM_ITEMS) % 3 == 2, -1, np.arange(60) % 3)
    )
    assert isinstance(made.negatives.lists[-1], RefreshedNegatives)
    for batch in made.iter_from(3, 8):
        for number, given in zip(rows_of(batch), given_of(batch, candidates_of([batch])), strict=True):
            group = ITEMS.index(told[number]["item_id"]) % 3
            assert len(given) == (0 if group == 2 else 2)
            assert {item for item, _, _ in given} <= [{ITEMS[3], ITEMS[4]}, {ITEMS[9]}, set()][group]


# What does not fit is told before the first batch


@pytest.fixture
def tiny(tmp_path, write_dataset):
    """Writes a dataset of three rows with further columns of train/, and makes its batches."""

    def make(case: dict, **columns) -> TrainBatches:
        train = pa.table({"user_id": [1, 2, 3], "row": [0, 1, 2], "item_id": [10, 20, 10], **columns})
        items = pa.table({"item_id": [10, 20, 30], "shelf": [0, 0, 1]})
        number = len(list(tmp_path.glob("d*")))
        folder = write_dataset(tmp_path / f"d{number}", row_group_size=2, items=items, train=train)
        return batches_of(folder, build_loss(**case), batch_size=2)

    return make


def test_a_column_that_train_lacks_is_told_with_the_nearest(tiny):
    shown = [[30], None, [20]]
    with pytest.raises(
        ConfigError, match=r"no column 'showm', which loss\.impressions\.column names \(nearest: 'shown'\)"
    ):
        tiny({"impressions": {"column": "showm"}}, shown=shown)
    with pytest.raises(
        ConfigError, match=r"no column 'label', which loss\.impressions\.labels names \(nearest: 'labels'\)"
    ):
        tiny({"impressions": {"column": "shown", "labels": "label"}}, shown=shown, labels=[[1], None, [0]])
    with pytest.raises(DataError, match=r"column 'row', which loss\.impressions\.column names, is int64, but lists"):
        tiny({"impressions": {"column": "row"}})
    with pytest.raises(DataError, match=r"its weights, column 'row', are int64, not a list of numbers"):
        tiny({"impressions": {"column": "shown", "weights": "row"}}, shown=shown)


def test_labels_and_weights_stand_beside_every_item(tiny):
    shown = [[30], None, [20, 10]]
    with pytest.raises(DataError, match=r"row group 1, column 'shown', row 0: 2 ids but 1 labels in 'labels'"):
        tiny({"impressions": {"column": "shown", "labels": "labels"}}, shown=shown, labels=[[1], None, [0]])
    for weight in (-1.0, 1e16):
        said = re.escape(f"row group 1, column 'shown', row 0: 'w' has the weight {weight:g}: write weights from 0 to")
        with pytest.raises(DataError, match=said):
            tiny({"impressions": {"column": "shown", "weights": "w"}}, shown=shown, w=[[1.0], None, [0.0, weight]])
    for what in ("label", "weight"):
        with pytest.raises(
            DataError, match=rf"row group 1, column 'shown', row 0: the {what}s in 'w' contain null, NaN"
        ):
            tiny({"impressions": {"column": "shown", f"{what}s": "w"}}, shown=shown, w=[[1.0], None, [0.0, math.nan]])


@pytest.mark.parametrize("kind", ["bce", "softmax_bce", "softmax", "bpr"])
@pytest.mark.parametrize("label", [2.0, 1.25, -1.0])
def test_labels_beyond_0_and_1_are_refused_where_the_loss_would_have_no_least_value(tiny, kind, label):
    """bce adds (1 - y) * softplus(l), which falls without end for y > 1; others ask only what is above 0."""
    columns = {"shown": [[30], None, [20, 10]], "y": [[0.5], None, [1.0, label]]}
    case = {"kind": kind, "impressions": {"column": "shown", "labels": "y"}}
    if kind in ("softmax", "bpr"):
        assert len(list(tiny(case, **columns).iter_from(0, 2))) == 2
        return
    with pytest.raises(DataError, match=rf"row group 1, column 'shown', row 0: 'y' has the label {label:g}, .*{kind}"):
        tiny(case, **columns)
    columns["y"] = [[0.5], None, [1.0, 0.0]]
    assert len(list(tiny(case, **columns).iter_from(0, 2))) == 2


def test_an_unknown_item_is_named_with_its_place_or_left_out_when_that_is_asked_for(tiny):
    columns = {"shown": [[30], None, [20, None, 99, 10, 98]], "w": [[1.0], None, [2.0, 7.0, 3.0, 4.0, 5.0]]}
    given = {"column": "shown", "weights": "w", "labels": "w"}
    with pytest.raises(
        DataError,
        match=r"part-0\.parquet, row group 1, column 'shown', row 0: item 99 is not in the catalogue .* \(2 "
        r"entries are such items\).*loss\.impressions\.unknown: skip",
    ):
        tiny({"impressions": given}, **columns)
    made = tiny({"impressions": given | {"unknown": "skip"}}, **columns)
    found = {}
    for batch in made.iter_from(0, 2):
        found |= dict(zip(rows_of(batch), given_of(batch, candidates_of([batch])), strict=True))
    assert found == {0: [(30, 1, 1)], 1: [], 2: [(20, 2, 2), (10, 4, 4)]}


def test_a_queue_without_room_for_a_step_is_refused_before_it(tiny):
    """Two rows a step draw item 10 twice in 4/3, or once in 2/3 of times, as Poisson has it; beside 3 even draws."""
    chance = [1 - math.exp(-4 / 3) * (2 / 3) ** 3, 1 - math.exp(-2 / 3) * (2 / 3) ** 3, 1 - (2 / 3) ** 3]
    mean = sum(chance)
    assert 2 < mean < 3
    assert tiny({"negatives": {"sampled": 3, "cross_batch_memory": 3}}).candidates.keeps_list
    with pytest.raises(
        ConfigError,
        match=rf"cross_batch_memory is 2, but a step has some {mean:.0f} candidates .* \(such as {8 * mean:.0f}\)",
    ):
        tiny({"negatives": {"sampled": 3, "cross_batch_memory": 2}})


def test_even_and_popular_draws_are_independent_of_each_other(world):
    """Both of power 1 and as many: the same numbers would bring the same items."""
    made = batches_of(
        world, in_world(world, {"negatives": {"sampled": 30, "power": 1.0, "popular": {"count": 30, "power": 1.0}}})
    )
    first, second = made.negatives.samplers
    np.testing.assert_array_equal(first.expected_I, second.expected_I)
    pairs = [(first.draw(step, np.empty(0)), second.draw(step, np.empty(0))) for step in range(200)]
    share_I = first.cumulative_I - np.concatenate([[0], first.cumulative_I[:-1]])
    alike = np.mean([(one == other).mean() for one, other in pairs])
    chance = float((share_I**2).sum())
    assert abs(alike - chance) < 5 * math.sqrt(chance / (200 * 30))


def test_items_that_share_a_fingerprint_are_two_to_the_queue_and_to_streaming_frequencies(tmp_path, write_dataset):
    """Two of 200,000 ids, found by search; the bits below 32 are what histories are compared by."""
    keys = np.arange(200_000)
    of_keys = fingerprints(keys)
    order = np.argsort(of_keys, kind="stable")
    [place, *_] = np.flatnonzero(np.diff(of_keys[order]) == 0)
    twins = order[place : place + 2].tolist()
    train = pa.table({"user_id": [1, 2], "row": [0, 1], "item_id": twins, "history": [[7], [7]]})
    folder = write_dataset(tmp_path / "d", train=train, items=pa.table({"item_id": [*twins, 7], "shelf": [0, 0, 1]}))
    for case in ({"negatives": {"cross_batch_memory": 9}}, {"log_q_estimate": "streaming"}):
        [batch] = batches_of(folder, build_loss(**case), batch_size=2).iter_from(0, 1)
        key = batch.item_key_C.numpy()
        assert len(set(key.tolist())) == 2 and (key >= 0).all()
        assert set((key % 2**32).tolist()) == {int(of_keys[twins[0]])}
        if batch.targets.masked_keys is not None:
            masked_key = batch.targets.masked_keys.column_P
            assert (~masked_key[masked_key < 0]).tolist() == [int(of_keys[7])] * 2


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("name", "of_count"),
    [
        ("sampled", lambda count: {"sampled": count}),
        ("sampled", lambda count: {"sampled": count, "power": 0.5}),
        ("popular.count", lambda count: {"popular": {"count": count}}),
    ],
    ids=["sampled", "by power", "popular"],
)
def test_a_sample_larger_than_the_catalogue_is_clipped_with_a_warning(tiny, monkeypatch, name, of_count, rank):
    """A step draws as many as there are items, and corrects for that; the first rank says so."""
    monkeypatch.setenv("RANK", rank)
    wanted = tiny({"negatives": of_count(3)}).negatives
    message = rf"loss\.negatives\.{name} is 4, but the catalogue has 3 items: 3 are drawn per step"
    with pytest.warns(UserWarning, match=message) if rank == "0" else contextlib.nullcontext():
        clipped = tiny({"negatives": of_count(4)}).negatives
    np.testing.assert_array_equal(clipped.log_I, wanted.log_I)


FILE_MISTAKES = {
    "another key": ({"itm_id": [10], "negatives": [[20]]}, ConfigError, r"no column 'item_id' \(nearest: 'itm_id'\)"),
    "no lists": ({"item_id": [10], "negatives": [20]}, DataError, r"'negatives' is int64, but lists"),
    "text": ({"item_id": ["10"], "negatives": [[20]]}, DataError, r"'item_id' is string, but the ids of .* int64"),
    "other text": ({"item_id": [10], "negatives": [["a"]]}, DataError, r"'negatives' is string, but .* int64"),
    "twice": ({"item_id": [10, 20, 10], "negatives": [[20], [], []]}, DataError, r"10 is in rows 0 and 2"),
    "unknown": ({"item_id": [10, 20], "negatives": [[20], [30, 99]]}, DataError,
                r"column 'negatives', row 1: item 99 is not in .*loss\.negatives\.mined\.unknown: skip"),
    "null": ({"item_id": [10, None], "negatives": [[20], [30]]}, DataError, r"1 of 2 ids are null"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILE_MISTAKES)
def test_a_file_that_cannot_be_used_is_refused_with_what_is_wrong(tiny, tmp_path, name):
    columns, error, message = FILE_MISTAKES[name]
    path = tmp_path / "mined.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(error, match=message):
        tiny({"negatives": {"mined": {"file": str(path), "count": 1}}})


def test_a_file_that_is_not_there_or_damaged_is_refused(tiny, tmp_path):
    known = tmp_path / "known.parquet"
    pq.write_table(pa.table({"user_id": [1], "item_ids": [[10]]}), known)
    with pytest.raises(ConfigError, match=r"loss\.known is .*knwn\.parquet, which is not a file \(nearest: 'known"):
        tiny({"known": str(tmp_path / "knwn.parquet")})
    known.write_bytes(known.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"known\.parquet cannot be read as Parquet"):
        tiny({"known": str(known)})


def test_unknown_items_of_a_file_are_left_out_where_that_is_asked_for_and_of_known_ones_always(tiny, tmp_path):
    path = tmp_path / "mined.parquet"
    pq.write_table(pa.table({"item_id": [10, 99], "negatives": [[99, 30, 98], [20]]}), path)
    made = tiny({"negatives": {"mined": {"file": str(path), "count": 2, "unknown": "skip"}}})
    named = [given for batch in made.iter_from(0, 2) for given in given_of(batch, candidates_of([batch]))]
    assert sorted(map(len, named)) == [0, 2, 2] and {item for given in named for item, _, _ in given} == {30}
    pq.write_table(pa.table({"user_id": [1], "item_ids": [[99, 20]]}), path)
    made = tiny({"known": str(path), "negatives": {"sampled": "all"}})
    assert sum(len(batch.targets.known.row_P) for batch in made.iter_from(0, 2)) == 3 + 1


def test_settings_that_do_not_fit_together_are_refused():
    def refused(values: dict) -> None:
        build_loss(**values)

    beside = {"same_category": {"feature": "shelf", "count": 1}, "cross_batch_memory": 5, "power": 0.5,
              "refresh": {"every": 1, "count": 1}, "mined": {"file": "f", "count": 1}}  # fmt: skip
    for name, value in beside.items():
        with pytest.raises(ConfigError, match=rf"sampled is all, so every item is a candidate already: remove {name}"):
            refused({"negatives": {"sampled": "all", name: value}})
    with pytest.raises(
        ConfigError, match=r"power is 0\.75, but nothing is sampled by it: set loss\.negatives\.sampled"
    ):
        refused({"negatives": {"power": 0.75}})
    with pytest.raises(ConfigError, match=r"refresh\.neighbor_range is \[9, 3\]: name the nearest first"):
        refused({"negatives": {"refresh": {"every": 1, "count": 1, "neighbor_range": [9, 3]}}})
    with pytest.raises(ConfigError, match=r"top_k is set, but loss\.kind bce uses all negatives"):
        refused({"kind": "bce", "negatives": {"top_k": 3}})
    with pytest.raises(ConfigError, match=r"top_k\.others is 0: items that are not among the hardest would only be"):
        refused({"negatives": {"top_k": {"count": 3, "others": 0}}})
    for value in (True, [3]):
        with pytest.raises(ConfigError, match=r"top_k is .*: set it to a number of negatives, such as 32, or to"):
            refused({"negatives": {"top_k": value}})
    assert build_loss(negatives={"top_k": 3}).negatives.top_k == TopKConfig(count=3)
    with pytest.raises(ConfigError, match=r"log_q_estimate is streaming, but loss\.log_q is 0"):
        refused({"log_q": 0, "log_q_estimate": "streaming"})
    with pytest.raises(ConfigError, match=r"in_batch: false and sampled: 0, so there are no negatives"):
        refused({"negatives": {"in_batch": False, "cross_batch_memory": 100}})
    with pytest.raises(ConfigError, match=r"listwise, which uses only a row's own list, .* has cross_batch_memory"):
        refused({"kind": "listwise", "impressions": GRADED, "negatives": {"sampled": 5, "cross_batch_memory": 9}})


@pytest.mark.parametrize(
    ("feature", "found"),
    [
        ("tags", "is of kind bag"),
        ("price", "is of kind number"),
        ("brnd", r"is not under `item` \(nearest: 'brand'\)"),
    ],
)
def test_the_same_category_needs_a_feature_of_one_id_a_row(small_world, tmp_path, feature, found):
    same = {"negatives": {"same_category": {"feature": feature, "count": 4}}}
    with pytest.raises(
        ConfigError, match=rf"same_category\.feature is '{feature}', which {found}: name an item feature"
    ):
        event_config(small_world, tmp_path, loss=same)
    assert event_config(small_world, tmp_path, loss={"negatives": {"same_category": {"feature": "brand", "count": 4}}})


def test_the_page_on_negatives_shows_configs_that_hold():
    page = (Path(__file__).resolve().parents[3] / "docs" / "negatives.md").read_text()
    shown = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 12
    for text in shown:
        build_loss(**parse_yaml(text, "docs/negatives.md")["loss"])
