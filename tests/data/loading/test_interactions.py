"""Training rows in batches: every row once an epoch, the same for any number of ranks, and right in every column."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.kinds import build_loss
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.losses import LossConfig, NegativesConfig
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.held_out import HeldOut
from trec_twotower.data.loading.batch import Batch, JaggedLookup
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.loading.pairs import Pairs, Targets
from trec_twotower.data.negatives.samplers import UniformSampler
from trec_twotower.errors import ConfigError, DataError

# A table so large that a bucket is the id itself: a batch can be read back.
ID = TableSpec(buckets=1 << 20, dim=4, hashing="modulo")
ITEMS = [1000 + 7 * n for n in np.random.default_rng(5).permutation(60).tolist()]
USERS = [50 + 3 * n for n in range(40)]

ROW = build_feature(name="row", kind="id", table="id")  # the global row: who is who in a batch
USER = build_feature(name="user_id", kind="id", table="id")
HISTORY = build_feature(name="history", kind="bag", table="id", max_length=3, pooling="sum")
AGE = build_feature(name="age", kind="number", normalize="none")
ITEM = build_feature(name="item_id", kind="id", table="id")
TAGS = build_feature(name="tags", kind="bag", table="id", pooling="mean")
PRICE = build_feature(name="price", kind="number", normalize="none")
SCHEMA = Schema.build({"id": ID}, (ROW, HISTORY, USER, AGE), (TAGS, ITEM, PRICE))


def items_table() -> pa.Table:
    tags = [None if n % 5 == 0 else [n, n + 1, None][: n % 4] for n in range(60)]
    return pa.table({"item_id": ITEMS, "tags": pa.array(tags, pa.list_(pa.int64())), "price": np.arange(60) / 4})


def event_tables(rng) -> list[pa.Table]:
    """93 events in three files, one of them empty; some histories are null or name items outside the catalogue."""
    histories = [rng.choice([*ITEMS, 1, 2], rng.integers(0, 6)).tolist() for _ in range(93)]
    histories[3] = histories[50] = None
    popular = rng.zipf(1.5, 93) % 60
    table = pa.table(
        {
            "user_id": rng.choice(USERS, 93),
            "item_id": np.array(ITEMS)[popular],
            "history": pa.array(histories, pa.list_(pa.int64())),
            "age": pa.array([None if n % 10 == 4 else float(n % 7) for n in range(93)]),
            "row": np.arange(93),
            "weight": pa.array((rng.integers(0, 8, 93) / 2).astype(np.float32)),
        }
    )
    return [table[:37], table[37:37], table[37:]]


def user_table(rng) -> pa.Table:
    """A row per user: all they took; one took nothing, one a single item."""
    positives = [rng.choice(ITEMS, rng.integers(2, 20), replace=False).tolist() for _ in USERS]
    positives[4], positives[9], positives[11] = [], ITEMS[:1], None
    columns = {"user_id": USERS, "positives": pa.array(positives, pa.list_(pa.int64())), "row": np.arange(40)}
    return pa.table(columns)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, write_dataset):
    """Folders of one world with a row per event and one with a row per user, in tiny row groups."""
    rng = np.random.default_rng(1)
    root, items = tmp_path_factory.mktemp("worlds"), items_table()
    users = pa.table({"user_id": [1, *USERS[::-1]], "age": [9.0, *(float(n % 7) for n in range(40))]})
    return {
        "event": write_dataset(root / "event", row_group_size=8, items=items, train=event_tables(rng)),
        "user": write_dataset(root / "user", row_group_size=6, items=items, train=user_table(rng), users=users),
    }


@pytest.fixture(scope="module")
def sources(worlds):
    return {rows: FeatureDataset(Dataset(folder), SCHEMA, rows) for rows, folder in worlds.items()}


@pytest.fixture(scope="module")
def rows_of(worlds):
    """The rows as they stand in the files, read the plain way."""
    found = {rows: pq.ParquetDataset(folder / "train").read().to_pylist() for rows, folder in worlds.items()}
    assert all([row["row"] for row in table] == list(range(len(table))) for table in found.values())
    return found


def batches_of(source: FeatureDataset, share=(0, 1), *, loss: LossConfig | None = None, **data) -> TrainBatches:
    """The batches of one rank; small windows, so that an epoch has several."""
    settings = {"rows": source.rows, "batch_size": 10, "shuffle_rows": 20} | data
    config = DataConfig(dataset=source.dataset.folder, **settings)
    return TrainBatches(source, config, loss or build_loss(), source.item_counts(), share)


def epoch_of(made: TrainBatches, epoch: int = 0) -> list[Batch]:
    steps = made.steps_per_epoch
    return list(made.iter_from(epoch * steps, (epoch + 1) * steps))


# A batch, read back the slow way


@dataclass
class Row:
    row: int
    user_id: int
    history: list[int]
    age: tuple[float, float]
    positives: list[tuple[int, float]]  # item id, weight
    known: set[int]


def features_of(batch: Batch) -> dict[str, list[list[int]]]:
    """Each key's lists, by walking through lengths and values."""
    lengths, values = batch.sparse.lengths().tolist(), batch.sparse.values().tolist()
    found, at = {}, 0
    for number, key in enumerate(batch.sparse.keys()):
        found[key] = []
        for length in lengths[number * batch.sparse.stride() : (number + 1) * batch.sparse.stride()]:
            found[key].append(values[at : at + length])
            at += length
    assert at == len(values)
    return found


def items_of(batches: list[Batch]) -> list[int]:
    """The candidates of a step: the shares of all ranks, one behind the other."""
    found = []
    for rank, batch in enumerate(batches):
        item_ids = features_of(batch)["item:item_id"]
        share = batch.item_sizes[rank]
        assert all(len(ids) == 1 for ids in item_ids[:share]) and not any(item_ids[share:])
        assert batch.item_divisor_SF.shape[0] == batch.item_number_SN.shape[0] == share
        found += [ids[0] for ids in item_ids[:share]]
    return found


def rows_in(batches: list[Batch]) -> list[Row]:
    """The rows of a step: those of all ranks, one behind the other."""
    items, found = items_of(batches), []
    for batch in batches:
        features = features_of(batch)
        num_rows = batch.user_divisor_BF.shape[0]
        assert not any(features["user:row"][num_rows:] + features["user:history"][num_rows:])
        rows = [
            Row(
                features["user:row"][r][0],
                features["user:user_id"][r][0],
                features["user:history"][r],
                tuple(batch.user_number_BN[r].tolist()),
                [],
                set(),
            )
            for r in range(num_rows)
        ]
        taken = zip(
            batch.targets.positive.row_P, batch.targets.positive.column_P, batch.targets.positive.weight_P, strict=True
        )
        for row, column, weight in taken:
            rows[int(row)].positives.append((items[int(column)], float(weight)))
        for row, column in zip(batch.targets.known.row_P, batch.targets.known.column_P, strict=True):
            rows[int(row)].known.add(items[int(column)])
        found += rows
    return found


def same(first: Batch, second: Batch) -> bool:
    tensors, others = first.named_tensors(), second.named_tensors()
    if tensors.keys() != others.keys() or not all(torch.equal(value, others[name]) for name, value in tensors.items()):
        return False
    for name, value in vars(first).items():
        if name not in (*tensors, "sparse", "targets") and value != getattr(second, name):
            return False
    parts = ("values", "lengths", "stride", "keys")
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(first.sparse, part)(), getattr(second.sparse, part)()) for part in parts)
    )


# Order: every row once, whatever the ranks

BOTH = pytest.mark.parametrize("rows", ["event", "user"])


@BOTH
def test_an_epoch_takes_every_row_once(sources, rows_of, rows):
    """Also the tail, and with windows that batches do not divide."""
    everything = list(range(len(rows_of[rows])))
    for epoch, batch_size, shuffle_rows in [(0, 10, 20), (1, 7, 1), (2, 40, 1000), (3, 2, 33)]:
        made = batches_of(sources[rows], batch_size=batch_size, shuffle_rows=shuffle_rows)
        steps = [[row.row for row in rows_in([batch])] for batch in epoch_of(made, epoch)]
        assert sorted(row for step in steps for row in step) == everything
        tail = len(everything) % batch_size or batch_size
        assert [len(step) for step in steps] == [batch_size] * (len(steps) - 1) + [tail]
        assert len(steps) == made.steps_per_epoch


@BOTH
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_ranks_together_take_what_one_would(sources, rows, num_ranks):
    """Rows, items and weights of a step in one order, for any number of ranks; no rank has steps of its own."""
    loss = build_loss(negatives=NegativesConfig(sampled=7))
    alone = epoch_of(batches_of(sources[rows], loss=loss, batch_size=9))
    ranks = [epoch_of(batches_of(sources[rows], (r, num_ranks), loss=loss, batch_size=9)) for r in range(num_ranks)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert items_of(parts) == items_of([whole])
        by_row = sorted(rows_in(parts), key=lambda row: row.row)
        assert by_row == sorted(rows_in([whole]), key=lambda row: row.row)
        for part in parts:
            assert torch.equal(part.log_q_C, whole.log_q_C) and torch.equal(part.is_negative_C, whole.is_negative_C)
            assert part.num_rows_of_all_ranks == whole.num_rows_of_all_ranks == whole.user_divisor_BF.shape[0]
            assert sum(part.item_sizes) == whole.item_sizes[0] and max(part.item_sizes) - min(part.item_sizes) <= 1
        assert len({part.sparse.stride() for part in parts}) == 1  # row-wise tables want equal batches
    # Each rank has its share of the rows, to within chance.
    shares = [sum(part.user_divisor_BF.shape[0] for part in batches) for batches in ranks]
    assert max(shares) - min(shares) <= len({window.number for window in batches_of(sources[rows]).windows(0)})


def test_a_rank_without_a_row_still_takes_the_step(sources):
    """93 rows in steps of 4 end with one row, which three of four ranks do not get."""
    last = [epoch_of(batches_of(sources["event"], (rank, 4), batch_size=4))[-1] for rank in range(4)]
    assert sorted(batch.user_divisor_BF.shape[0] for batch in last) == [0, 0, 0, 1]
    assert len(rows_in(last)) == 1 and {batch.num_rows_of_all_ranks for batch in last} == {1}


@BOTH
def test_a_run_resumes_at_any_step(sources, rows):
    made = batches_of(sources[rows], batch_size=9, loss=build_loss(negatives=NegativesConfig(sampled=7)))
    end = 2 * made.steps_per_epoch + 2
    whole = list(made.iter_from(0, end))
    assert len(whole) == end
    for step in range(0, end + 1):
        rest = list(made.iter_from(step, end))
        assert len(rest) == end - step
        assert all(same(first, second) for first, second in zip(whole[step:], rest, strict=True))


@BOTH
def test_epochs_and_seeds_have_orders_of_their_own(sources, rows):
    def order(epoch=0, **data):
        batches = epoch_of(batches_of(sources[rows], **data), epoch)
        return tuple(row.row for batch in batches for row in rows_in([batch]))

    assert order() == order()
    assert len({order(), order(epoch=1), order(epoch=2), order(seed=1), order(seed=2)}) == 5


def test_a_window_is_whole_row_groups_mixed_among_themselves(sources):
    made = batches_of(sources["event"], shuffle_rows=20)
    groups = sources["event"].dataset.train.row_groups
    order = [row.row for batch in epoch_of(made) for row in rows_in([batch])]
    at = 0
    for window in made.windows(0):
        inside = [group.first_row + n for group in window.groups for n in range(group.num_rows)]
        found = order[at : at + len(inside)]
        assert window.first == at and window.num_rows == len(inside)
        assert sorted(found) == sorted(inside) and found != inside
        at += len(inside)
    assert at == 93
    assert sorted(group.number for window in made.windows(0) for group in window.groups) == sorted(
        group.number for group in groups
    )
    assert len(made.windows(0)) == 4 and len(batches_of(sources["event"], shuffle_rows=1).windows(0)) == 12


def test_every_row_is_as_likely_to_come_first(sources):
    """Over many epochs the rows of the first step are even, by chi-square."""
    made = batches_of(sources["user"], batch_size=10, shuffle_rows=1000, prefetch=1)
    epochs = 250
    counts = Counter(
        row.row
        for epoch in range(epochs)
        for batch in made.iter_from(epoch * made.steps_per_epoch, epoch * made.steps_per_epoch + 1)
        for row in rows_in([batch])
    )
    expected = epochs * 10 / 40
    # A step draws without putting back, which narrows the spread by (1 - 10/40).
    chi_square = sum((counts[row] - expected) ** 2 for row in range(40)) / (expected * (1 - 10 / 40))
    assert abs(chi_square - 39) < 5 * math.sqrt(2 * 39)


# Contents


def test_a_batch_says_what_the_files_say(sources, rows_of):
    """Ids, histories, numbers, positives, weights and known items of every row, against the files read plainly."""
    catalogue = set(ITEMS)
    for batch in epoch_of(batches_of(sources["event"])):
        candidates = set(items_of([batch]))
        for row in rows_in([batch]):
            told = rows_of["event"][row.row]
            history = told["history"] or []
            assert row.user_id == told["user_id"]
            assert row.history == history[-3:]
            assert row.age == ((0, 1) if told["age"] is None else (told["age"], 0))
            assert row.positives == [(told["item_id"], told["weight"])]
            assert row.known == ({told["item_id"]} | set(history) & catalogue) & candidates


def test_candidates_carry_the_features_of_their_items(sources):
    items = {row["item_id"]: row for row in items_table().to_pylist()}
    loss = build_loss(negatives=NegativesConfig(sampled=20))
    for batch in epoch_of(batches_of(sources["event"], loss=loss)):
        features = features_of(batch)
        for place, item in enumerate(items_of([batch])):
            tags = [tag for tag in items[item]["tags"] or [] if tag is not None]
            assert features["item:tags"][place] == tags
            assert batch.item_divisor_SF[place].tolist() == [max(len(tags), 1), 1]
            assert batch.item_number_SN[place].tolist() == [items[item]["price"], 0]


@BOTH
def test_candidates_are_the_positives_and_the_sample_each_once_in_the_order_of_the_catalogue(sources, rows):
    source = sources[rows]
    for in_batch in (True, False):
        loss = build_loss(negatives=NegativesConfig(in_batch=in_batch, sampled=15), log_q=0.5)
        made = batches_of(source, loss=loss)
        for step, batch in enumerate(epoch_of(made)):
            places = [ITEMS.index(item) for item in items_of([batch])]
            assert places == sorted(set(places))
            positives = {ITEMS.index(item) for row in rows_in([batch]) for item, _ in row.positives}
            drawn = set(UniformSampler(15, len(ITEMS), made.data.seed).draw(step, np.empty(0, np.int64)).tolist())
            assert set(places) == positives | drawn
            assert batch.is_negative_C.tolist() == [in_batch or place in drawn for place in places]
            assert torch.equal(batch.log_q_C, torch.from_numpy(made.log_q_I[places]))


@BOTH
def test_the_correction_counts_positives_a_step_by_hand(sources, rows_of, rows):
    taken = Counter(item for told in rows_of[rows] for item in (told.get("positives") or [told.get("item_id")]))
    taken.pop(None, None)
    if rows == "user":
        assert sources[rows].item_counts().sum() == sum(len(told["positives"] or []) for told in rows_of[rows])
    counts = sources[rows].item_counts()
    assert {item: count for item, count in zip(ITEMS, counts.tolist(), strict=True) if count} == taken
    made = batches_of(sources[rows], loss=build_loss(log_q=0.5, negatives=NegativesConfig(sampled=6)), input_share=0.3)
    # Positives a step: 10 rows of one each, or of their mean number less the three tenths that are input.
    draws = 10.0 if rows == "event" else 10 * sum(taken.values()) / 40 * 0.7
    for row, item in enumerate(ITEMS):
        missed = math.exp(-draws * taken[item] / sum(taken.values())) * (59 / 60) ** 6
        by_hand = math.log(1 - missed)  # whatever the strength, which is the model's affair
        assert made.log_q_I[row] == pytest.approx(by_hand, rel=1e-5)


@BOTH
def test_items_are_candidates_as_often_as_the_correction_says(sources, rows):
    """Over many epochs; without repetition inside an epoch the formula is a little low, hence the allowance."""
    loss = build_loss(negatives=NegativesConfig(sampled=6))
    made = batches_of(sources[rows], loss=loss, batch_size=2, shuffle_rows=1000)
    seen, steps = np.zeros(60), 12 * made.steps_per_epoch
    for batch in made.iter_from(0, steps):
        seen[[ITEMS.index(item) for item in items_of([batch])]] += 1
    formula = np.exp(made.log_q_I)
    error = np.sqrt(formula * (1 - formula) / steps)
    taken = sources[rows].item_counts() > 0
    assert (np.abs(seen / steps - formula)[taken] < 5 * error[taken] + 0.03).all()


def test_history_that_is_not_masked_is_not_known(sources, rows_of):
    loss = build_loss(mask_history=False)
    for batch in epoch_of(batches_of(sources["event"], loss=loss)):
        for row in rows_in([batch]):
            assert row.known == {rows_of["event"][row.row]["item_id"]}
    for batch in epoch_of(batches_of(sources["user"], loss=loss)):
        for row in rows_in([batch]):
            assert row.known == {item for item, _ in row.positives}


def test_the_keys_are_in_the_order_of_the_schema(sources):
    expected = ["user:row", "user:history", "user:user_id", "item:tags", "item:item_id"]
    assert SCHEMA.layout.pooled_keys == expected
    for rows in ("event", "user"):
        for batch in epoch_of(batches_of(sources[rows], (1, 2))):
            assert batch.sparse.keys() == expected
            assert batch.sparse.weights_or_none() is None


def test_weights_of_a_bag_stand_beside_its_ids_and_ones_beside_all_others(tmp_path, write_dataset):
    tags = [[7, 8], [], [9]]
    items = pa.table({"item_id": [1, 2, 3], "tags": tags, "w": [[0.5, 2.0], [], [4.0]]})
    train = pa.table({"user_id": [70, 80, 90], "item_id": [3, 1, 2]})
    weighted = build_feature(name="tags", kind="bag", table="id", weights="w")
    schema = Schema.build({"id": ID}, (USER,), (weighted, ITEM))
    source = FeatureDataset(Dataset(write_dataset(tmp_path / "d", items=items, train=train)), schema, "event")
    (batch,) = epoch_of(batches_of(source, batch_size=3))
    users = [ids[0] for ids in features_of(batch)["user:user_id"]]
    assert sorted(users) == [70, 80, 90]
    assert batch.sparse.values().tolist() == [*users, 7, 8, 9, 1, 2, 3]
    assert batch.sparse.weights().tolist() == [1, 1, 1, 0.5, 2, 4, 1, 1, 1]
    assert batch.item_divisor_SF.tolist() == [[2.5, 1], [1, 1], [4, 1]]


# A row per user: part of the items is input, the rest are the positives


def test_a_users_items_are_split_and_nothing_is_lost(sources, rows_of):
    schema = Schema.build({"id": ID}, (ROW, HISTORY.model_copy(update={"max_length": None}), USER, AGE), SCHEMA.item)
    source = FeatureDataset(Dataset(sources["user"].dataset.folder), schema, "user")
    for epoch in range(5):
        for batch in epoch_of(batches_of(source), epoch):
            candidates = set(items_of([batch]))
            for row in rows_in([batch]):
                items = rows_of["user"][row.row]["positives"] or []
                targets = [item for item, _ in row.positives]
                assert sorted(row.history + targets) == sorted(items)
                assert not set(row.history) & set(targets)
                assert targets or not items
                assert [item for item in items if item in row.history] == row.history  # in their order
                assert row.known == set(items) & candidates


def test_the_split_is_drawn_anew_each_epoch_and_by_seed(sources):
    def targets(epoch=0, **data):
        batches = epoch_of(batches_of(sources["user"], **data), epoch)
        return {row.row: tuple(row.positives) for batch in batches for row in rows_in([batch])}

    assert targets() == targets(batch_size=7, shuffle_rows=1)  # of the row alone
    for other in (targets(epoch=1), targets(seed=1)):
        assert sum(targets()[row] != other[row] for row in range(40)) > 30


def test_with_no_share_of_input_all_items_are_asked_for(tmp_path, write_dataset):
    positives = [[1, 2], [5], [1, 3, 4]] * 4
    train = pa.table({"user_id": range(12), "positives": positives})
    schema = Schema.build({"id": ID}, (ROW.model_copy(update={"name": "user_id"}),), (ITEM,))
    folder = write_dataset(tmp_path / "d", items=pa.table({"item_id": [1, 2, 3, 4, 5]}), train=train)
    made = epoch_of(batches_of(FeatureDataset(Dataset(folder), schema, "user"), batch_size=6, input_share=0))
    targets = []
    for batch in made:
        items = items_of([batch])
        pairs = zip(batch.targets.positive.row_P.tolist(), batch.targets.positive.column_P.tolist(), strict=True)
        by_row: dict[int, list[int]] = {}
        for row, column in pairs:
            by_row.setdefault(row, []).append(items[column])
        targets += [sorted(found) for found in by_row.values()]
    assert sorted(targets) == sorted(positives)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_share_of_input_is_near_its_setting(tmp_path, write_dataset, share):
    """Each item by itself, so over n items within five standard errors; users are long, so that few need a target."""
    users = pa.table({"user_id": range(50), "positives": [ITEMS] * 50})
    schema = Schema.build({"id": ID}, (USER, HISTORY.model_copy(update={"max_length": None})), (ITEM,))
    folder = write_dataset(tmp_path / "d", row_group_size=10, items=pa.table({"item_id": ITEMS}), train=users)
    made = batches_of(FeatureDataset(Dataset(folder), schema, "user"), batch_size=50, input_share=share)
    inputs = [tuple(ids) for batch in made.iter_from(0, 10) for ids in features_of(batch)["user:history"][:50]]
    assert len(set(inputs)) == 10 * 50  # users with the same items are split each in their own way
    n = 10 * 50 * 60
    assert abs(sum(map(len, inputs)) / n - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_an_item_that_stands_twice_falls_on_one_side(tmp_path, write_dataset):
    """Else the input would hold the answer; that holds for a row that is one item many times, too."""
    positives = [[1, 2, 1, 3, 1, 2], [4, 4, 4], [5]] * 20
    train = pa.table({"user_id": range(60), "positives": positives})
    schema = Schema.build({"id": ID}, (ROW.model_copy(update={"name": "user_id"}), HISTORY), (ITEM,))
    folder = write_dataset(tmp_path / "d", items=pa.table({"item_id": [1, 2, 3, 4, 5]}), train=train)
    made = batches_of(FeatureDataset(Dataset(folder), schema, "user"), batch_size=30)
    for batch in made.iter_from(0, 20):
        inputs = [set(ids) for ids in features_of(batch)["user:history"]][:30]
        items = items_of([batch])
        targets = [set() for _ in inputs]
        for row, column in zip(
            batch.targets.positive.row_P.tolist(), batch.targets.positive.column_P.tolist(), strict=True
        ):
            targets[row].add(items[column])
        assert all(target and not target & given for target, given in zip(targets, inputs, strict=True))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_row_of_n_positives_weighs_n_to_the_power(sources, power):
    for batch in epoch_of(batches_of(sources["user"], loss=build_loss(positive_power=power))):
        for row in rows_in([batch]):
            assert all(weight == pytest.approx(len(row.positives) ** -power) for _, weight in row.positives)


# The thread that runs ahead


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("reader")}


def test_the_thread_ends_with_the_last_batch_and_when_nobody_asks_for_more(sources):
    others = readers()  # of a generator that another test has left to the garbage collector
    made = batches_of(sources["event"], prefetch=1)
    list(made.iter_from(0, 3))
    assert readers() <= others
    running = made.iter_from(0, 1000)
    next(running)
    assert readers() - others
    running.close()
    assert readers() <= others


def test_an_error_of_the_thread_is_raised_where_the_batches_are_taken(tmp_path, write_dataset):
    """After the batches before it; and the thread is gone."""
    train = pa.table({"user_id": [1, 2, 3, 4], "item_id": [10, 10, 10, 10], "age": [1.0, 1.0, 1.0, float("nan")]})
    schema = Schema.build({"id": ID}, (USER, AGE), (ITEM,))
    folder = write_dataset(tmp_path / "d", row_group_size=1, items=pa.table({"item_id": [10]}), train=train)
    source = FeatureDataset(Dataset(folder), schema, "event", {"user:age": Statistics()})
    made = batches_of(source, batch_size=2, shuffle_rows=1)
    taken, others = [], readers()
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 3, column 'age': 1 of 1 .* in row 0"):
        taken.extend(made.iter_from(0, 2))
    assert len(taken) <= 1
    assert readers() <= others


# What does not fit is told before the first batch


@pytest.fixture
def tiny(tmp_path, write_dataset):
    """Writes a dataset of two rows with one part replaced, and reads it by a schema."""

    def read(user=(USER,), item=(ITEM,), rows="event", **parts):
        good = {
            "items": pa.table({"item_id": [10, 20]}),
            "train": pa.table({"user_id": [1, 2], "item_id": [10, 20]}),
        }
        folder = write_dataset(tmp_path / f"d{len(list(tmp_path.iterdir()))}", **(good | parts))
        return FeatureDataset(Dataset(folder), Schema.build({"id": ID}, tuple(user), tuple(item)), rows)

    return read


def test_a_user_feature_that_no_column_has_names_the_nearest(tiny):
    feature = build_feature(name="usr_id", kind="id", table="id")
    with pytest.raises(ConfigError, match=r"reads column 'usr_id', which neither .* has \(nearest: 'user_id'\)"):
        tiny(user=[feature])


def test_an_item_feature_that_no_column_has_names_the_nearest(tiny):
    feature = build_feature(name="itm_id", kind="id", table="id")
    with pytest.raises(ConfigError, match=r"no column 'itm_id', which feature 'itm_id' reads \(nearest: 'item_id'\)"):
        tiny(item=[feature])


def test_rows_must_be_of_the_kind_that_is_set(tiny):
    with pytest.raises(
        ConfigError, match=r"data\.rows is 'user', which needs the column 'positives'.*data\.rows: event"
    ):
        tiny(rows="user")
    with pytest.raises(ConfigError, match=r"data\.rows is 'event', which needs the column 'item_id'.*data\.rows: user"):
        tiny(train=pa.table({"user_id": [1], "positives": [[10]]}))


def test_a_history_that_is_drawn_is_a_bag_without_weights(tiny):
    train = pa.table({"user_id": [1], "positives": [[10]]})
    for feature in (
        build_feature(name="history", kind="category", table="id"),
        build_feature(name="history", kind="bag", table="id", weights="w"),
    ):
        with pytest.raises(ConfigError, match=r"reads 'history', which is sampled per epoch here: make it a bag without weights"):
            tiny(user=[feature], rows="user", train=train)


def test_more_rows_a_step_than_there_are_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"data\.batch_size is 3, but .*train has only 2 rows: set it to 2 or less"):
        batches_of(tiny(), batch_size=3)


def test_an_item_outside_the_catalogue_is_named(tiny):
    train = pa.table({"user_id": [1, 2], "item_id": [10, 30]})
    with pytest.raises(DataError, match=r"column 'item_id': item 30 is not in the catalogue .*items \(1 entries"):
        tiny(train=train).item_counts()
    lists = pa.table({"user_id": [1, 2, 3], "positives": [[10], None, [20, None, 30, 40]]})
    with pytest.raises(DataError, match=r"row group 0, column 'positives', row 2: item 30 is not .* \(2 entries"):
        tiny(train=lists, rows="user").item_counts()


TEXTS = pa.list_(pa.string())


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"items": {"item_id": ["10", "20"]}}, r"train: column 'item_id' is int64, but 'item_id' in .*items is string"),
        ({"train": {"history": pa.array([["10"], []], TEXTS)}}, r"train: column 'history' is list<item: string>,"),
        ({"test": {"history": pa.array([["10"], []], TEXTS)}}, r"test: column 'history' is list<item: string>,"),
        ({"test": {"positives": pa.array([["10"], ["20"]], TEXTS)}}, r"test: column 'positives' is list<"),
        ({"test": {"shop": ["1", "2"]}}, r"test: column 'shop' is string, but 'shop' in .*train is int64"),
        ({"users": {"user_id": ["1", "2"]}}, r"train: column 'user_id' is int64, but 'user_id' in .*users is string"),
    ],
)
def test_ids_that_are_text_here_and_numbers_there_are_refused(tmp_path, write_dataset, parts, said):
    """Such ids hash apart: towers would learn one and be asked of the other, and no mask would know what was taken."""
    train = {"user_id": [1, 2], "item_id": [10, 20], "history": [[20], [10]], "shop": [1, 2]}
    tables = {
        "train": train,
        "test": {**{name: train[name] for name in ("user_id", "history", "shop")}, "positives": [[10], [20]]},
        "items": {"item_id": [10, 20]},
        "users": {"user_id": [1, 2], "age": [1.0, 2.0]},
    }
    tables = {part: pa.table({**columns, **parts.get(part, {})}) for part, columns in tables.items()}
    user = (build_feature(name="shop", kind="category", buckets=8, dim=4), AGE)
    schema = Schema.build(
        {"id": TableSpec(buckets=8, dim=4)}, user, (build_feature(name="item_id", kind="id", table="id"),)
    )
    with pytest.raises(DataError, match=said):
        HeldOut.read(FeatureDataset(Dataset(write_dataset(tmp_path / "d", **tables)), schema, "event"), "test")


def test_a_user_without_a_row_in_users_is_named(tiny):
    train = pa.table({"user_id": [1, 5], "item_id": [10, 20]})
    source = tiny(user=[AGE], train=train, users=pa.table({"user_id": [1, 2], "age": [1.0, 2.0]}))
    with pytest.raises(DataError, match=r"part-0.* user 5 is not in .*users \(1 rows have such users\)"):
        epoch_of(batches_of(source, batch_size=2))


def test_a_bad_number_in_train_is_named_by_group_and_row(tmp_path, write_dataset):
    train = pa.table({"user_id": [1, 2, 3], "item_id": [10, 10, 10], "age": [1.0, 2.0, float("inf")]})
    folder = write_dataset(tmp_path / "d", row_group_size=2, items=pa.table({"item_id": [10]}), train=train)
    with pytest.raises(DataError, match=r"train/part-0\.parquet, row group 1, column 'age': .* in row 0"):
        FeatureDataset(Dataset(folder), Schema.build({"id": ID}, (AGE,), (ITEM,)), "event")


@pytest.mark.parametrize("weight", [[1.0, -1.0], [1.0, math.nan], [1.0, None], [1.0, math.inf], [1.0, 1e16]])
def test_a_weight_that_is_none_is_refused_with_its_row(tiny, weight):
    train = pa.table({"user_id": [1, 2], "item_id": [10, 20], "weight": weight})
    said = re.escape(f"column 'weight', row 1: {weight[1]}: row weights are at least 0 and at most 1e+15")
    with pytest.raises(DataError, match=said):
        epoch_of(batches_of(tiny(train=train), batch_size=2))


def test_weights_that_are_no_numbers_are_refused_as_no_feature(tiny):
    train = pa.table({"user_id": [1, 2], "item_id": [10, 20], "weight": ["light", "heavy"]})
    with pytest.raises(DataError, match=r"column 'weight' is .*string.*weight of each row in the loss: write numbers, or"):
        epoch_of(batches_of(tiny(train=train), batch_size=2))


def test_weights_may_be_integers_of_any_size(tiny):
    train = pa.table({"user_id": [1, 2], "item_id": [10, 20], "weight": [3, 2**24 + 1]})
    (batch,) = epoch_of(batches_of(tiny(train=train), batch_size=2))
    assert sorted(batch.targets.positive.weight_P.tolist()) == [3, 2**24]


# Statistics and static features


def test_numbers_are_learned_from_train_items_and_users_together(tiny):
    age, price, fame = (build_feature(name=name, kind="number") for name in ("age", "price", "fame"))
    source = tiny(
        user=[age, fame],
        item=[ITEM, price],
        items=pa.table({"item_id": [10, 20], "price": [1.0, 3.0]}),
        train=[pa.table({"user_id": [1, 2], "item_id": [10, 20], "age": a}) for a in ([1, 2], [3, None], [6, 7])],
        users=pa.table({"user_id": [1, 2], "fame": [5.0, 5.0]}),
    )
    ages = np.array([1, 2, 3, 6, 7])
    assert source.statistics.keys() == {"user:age", "user:fame", "item:price"}
    assert source.statistics["item:price"] == Statistics(2.0, 1.0, 1.0, 3.0)
    assert source.statistics["user:fame"] == Statistics(5.0, 1.0, 5.0, 5.0)
    found = source.statistics["user:age"]
    np.testing.assert_allclose([found.mean, found.std, found.low, found.high], [ages.mean(), ages.std(), 1, 7])


def test_features_of_users_come_from_their_folder(sources):
    """In the world of users `age` stands in users/, whose rows lie in another order."""
    age_of = {user: float(n % 7) for n, user in enumerate(USERS[::-1])}
    for batch in epoch_of(batches_of(sources["user"])):
        for row in rows_in([batch]):
            assert row.user_id == USERS[row.row]
            assert row.age == (age_of[row.user_id], 0)


# Held-out rows


HELD = {
    "user_id": [7, 8, 9, 7],
    "history": [[10, 20, 99], None, [20], [30]],
    "positives": [[30, 10], [20], [], [10]],
}


@pytest.fixture
def held(tiny):
    return partial(
        tiny,
        user=[USER, HISTORY],
        rows="user",
        items=pa.table({"item_id": [10, 20, 30]}),
        train=pa.table({"user_id": [1, 2], "positives": [[10], [20]]}),
    )


def test_held_out_rows_are_those_with_something_to_find(held):
    found = HeldOut.read(held(test=pa.table(HELD)), "test")
    assert found.user_ids.to_pylist() == [7, 8, 7] and len(found) == 3
    assert np.split(found.positives.values, found.positives.offsets[1:-1])[0].tolist() == [2, 0]
    assert found.positives.lengths.tolist() == [2, 1, 1]
    assert found.seen.lengths.tolist() == [2, 0, 1]  # item 99 is in no catalogue, so it cannot be ranked
    assert found.seen.values.tolist() == [0, 1, 2]
    assert found.user.sparse["history"].values.tolist() == [10, 20, 99, 30]
    part = found.part(slice(1, 3))
    assert part.user_ids.to_pylist() == [8, 7] and part.positives.values.tolist() == [1, 0]
    assert part.user.sparse["history"].values.tolist() == [30] and part.seen.values.tolist() == [2]


def test_held_out_rows_of_one_item_each(tiny):
    test = [pa.table({"user_id": [1], "item_id": [20]}), pa.table({"user_id": [5], "item_id": [10]})]
    found = HeldOut.read(tiny(test=test), "test")
    assert found.positives.values.tolist() == [1, 0] and found.positives.lengths.tolist() == [1, 1]
    assert found.seen.lengths.tolist() == [0, 0]
    assert found.user.sparse["user_id"].values.tolist() == [1, 5]


def test_a_sample_of_held_out_rows_is_the_same_each_time(tiny):
    test = pa.table({"user_id": range(200), "item_id": [10, 20] * 100})
    source = tiny(test=test)
    draws = [HeldOut.read(source, "test", 50, seed).user_ids.to_pylist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 50 and draws[0] == sorted(draws[0])
    rows = [HeldOut.read(source, "test", 50).positives.values.tolist()]
    assert rows == [[user % 2 for user in draws[0]]]
    assert len(HeldOut.read(source, "test", 500)) == 200


def test_held_out_rows_that_do_not_fit_are_refused(held, tiny):
    with pytest.raises(DataError, match=r"test: no row has a held-out item, so there is nothing to evaluate"):
        HeldOut.read(held(test=pa.table(HELD)[2:3]), "test")
    with pytest.raises(DataError, match=r"has no part 'valid'"):
        HeldOut.read(held(test=pa.table(HELD)), "valid")
    with pytest.raises(ConfigError, match=r"test has no column 'history', which the user tower reads"):
        HeldOut.read(held(test=pa.table(HELD).drop(["history"])), "test")
    with pytest.raises(ConfigError, match=r"test has no column 'item_id', which holds the held-out items"):
        HeldOut.read(tiny(test=pa.table({"user_id": [1]})), "test")
    with pytest.raises(DataError, match=r"row 0: item 99 is not in the catalogue"):
        HeldOut.read(held(test=pa.table({"user_id": [1], "history": [[10]], "positives": [[10, 99]]})), "test")


# Copies to a GPU


def full_batch() -> Batch:
    """One that has all its parts, each of other numbers."""
    number = iter(range(100))

    def tensor() -> torch.Tensor:
        return torch.full((2,), float(next(number)))

    def jagged() -> KeyedJaggedTensor:
        return KeyedJaggedTensor(["a"], values=tensor(), lengths=torch.tensor([1, 1]), weights=tensor())

    tensors = {
        part.name: tensor() for part in fields(Batch) if "Tensor" in str(part.type) and "Keyed" not in str(part.type)
    }
    whole = JaggedLookup(**{part.name: tensor() for part in fields(JaggedLookup)})
    listed = {"x": whole, "y": JaggedLookup(place=tensor())}
    targets = Targets(*(Pairs(*(tensor() for _ in fields(Pairs))) for _ in fields(Targets)))
    return Batch(
        **tensors,
        sparse=jagged(),
        sequences=jagged(),
        listed=listed,
        targets=targets,
        item_sizes=(3, 4),
        num_rows_of_all_ranks=7,
    )


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by its place."""
    found = batch.named_tensors()
    for name, value in vars(batch).items():
        if isinstance(value, KeyedJaggedTensor):
            found |= {f"{name}.values": value.values(), f"{name}.weights": value.weights()}
            found[f"{name}.lengths"] = value.lengths()
    for key, listed in batch.listed.items():
        found |= {f"{key}.{name}": value for name, value in vars(listed).items() if value is not None}
    return found


def test_every_tensor_of_a_batch_is_pinned_moved_and_recorded(monkeypatch):
    """On a CPU, by spies in place of torch's: pinning and moving give other tensors, which hold the same."""
    batch = full_batch()
    before = tensors_of(batch)
    assert len(before) == 7 + 4 * 4 + 2 * 3 + 6 + 1, "a new part of a batch belongs in this test"
    pinned: list[torch.Tensor] = []

    def pin_memory(self, *_):
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    after = batch.pin_memory()
    assert (after.item_sizes, after.num_rows_of_all_ranks) == ((3, 4), 7)
    for name, value in tensors_of(after).items():
        assert value is not before[name] and torch.equal(value, before[name]), name
        assert any(value is each for each in pinned), name

    recorded: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append((self.data_ptr(), stream)))
    batch.record_stream("a stream")
    assert {(value.data_ptr(), "a stream") for value in before.values()} <= set(recorded)

    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert tensors_of(moved).keys() == before.keys()
    assert {value.device.type for value in tensors_of(moved).values()} == {"meta"}


@pytest.mark.parametrize("is_pinned", [True, False])
def test_batches_are_pinned_where_that_is_asked_for(monkeypatch, sources, is_pinned):
    pinned: list[Batch] = []
    monkeypatch.setattr(Batch, "pin_memory", lambda self: pinned.append(self) or self)
    data = DataConfig(dataset=sources["event"].dataset.folder, batch_size=10)
    counts = sources["event"].item_counts()
    batches = TrainBatches(sources["event"], data, build_loss(), counts, (0, 1), pin_memory=is_pinned)
    assert [any(batch is each for each in pinned) for batch in batches.iter_from(0, 2)] == [is_pinned] * 2
