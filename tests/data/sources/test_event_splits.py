"""How a log of events is split: baskets, ties, logs without times, outcomes, and what is kept for serving."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.sources.test_events import (
    EVENTS,
    HOLD_OUT,
    chance,
    digests,
    found,
    make,
    num_unfindable,
    refusal,
    rows,
    write_log,
)
from trec_twotower.data.sources import prepare
from trec_twotower.data.sources.event_logs import splits as event_splits
from trec_twotower.data.sources.event_logs.splits import held_out_items
from trec_twotower.data.sources.event_logs.summary import describe
from trec_twotower.data.sources.tables import event_files
from trec_twotower.errors import ConfigError, DataError

NAMES = ("user_id", "item_id", "timestamp")


def as_rows(log: list[tuple], *more: str) -> list[dict[str, Any]]:
    return [dict(zip((*NAMES, *more), event, strict=True)) for event in log]


def untimed(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "timestamp"} for row in log]


# Baskets


def slow_baskets(log: list[tuple], hold_out: str) -> dict[str, list[tuple]]:
    """(user, items, history) of every row of a last-basket split, by the words of docs/data.md."""
    made = defaultdict(list)
    for user in sorted({user for user, _, _ in log}):
        baskets = defaultdict(list)
        for _, item, time in sorted((event for event in log if event[0] == user), key=lambda e: chance(user, e[1])):
            baskets[time].append(item)
        times = sorted(baskets)
        past = {time: [item for earlier in times if earlier < time for item in baskets[earlier]] for time in times}
        wanted = {
            time: [item for item in dict.fromkeys(baskets[time]) if hold_out == "any" or item not in past[time]]
            for time in times
        }
        may = [time for time in times if wanted[time]]
        held = {}
        if len(may) >= 2:
            held[may[-1]] = "test"
        if len(may) >= 3:
            held[may[-2]] = "valid"
        held_items = {item for time in held for item in wanted[time]} if hold_out == "new" else set()
        for time in times:
            if time in held:
                made[held[time]].append((user, wanted[time], past[time]))
            known = [item for item in past[time] if item not in held_items]
            if hold_out == "new" or time not in held:
                made["train"] += [(user, [item], known) for item in baskets[time] if item not in held_items]
    return made


@settings(max_examples=40, deadline=None)
@given(log=EVENTS, hold_out=HOLD_OUT, limits=st.sampled_from([(4, 3), (131_072, 4_000_000)]))
def test_the_last_basket_is_that_of_the_slow_way(log, hold_out, limits):
    expected = slow_baskets(log, hold_out)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_files, "_ROWS_PER_BATCH", limits[0])
        patch.setattr(event_splits, "_VALUES_PER_PIECE", limits[1])
        out, manifest = make(Path(name), as_rows(log), split="last-basket", hold_out=hold_out, max_history=100)
        for split in ("train", "valid", "test"):
            assert found(out, split) == expected[split]
        counts = manifest["counts"]
        for split in ("valid", "test"):
            assert counts.get(f"{split}_unfindable", 0) == num_unfindable(expected[split])
            assert hold_out == "any" or not num_unfindable(expected[split])
        used = len(expected["train"]) + sum(len(row[1]) for row in expected["valid"] + expected["test"])
        assert counts.get("repeats_left_out", 0) == len(log) - used
        assert counts.get("users_in_train_only", 0) == len({row[0] for row in log}) - len(expected["test"])


def test_the_held_out_item_of_a_basket_is_not_the_one_with_the_greatest_id(tmp_path):
    """Three items of one time: over 300 users each is the test item about equally often, whatever its id."""
    for items in ((1, 2, 3), ("a", "b", "POST")):
        log = as_rows([(user, item, 5) for user in range(300) for item in items])
        out, _ = make(tmp_path, log)
        tested = Counter(row["positives"][0] for row in rows(out, "test"))
        assert set(tested) == set(items) and max(tested.values()) < 130, tested


def test_ties_are_broken_by_the_seed_for_ids_of_any_type(tmp_path):
    tests = {}
    for kind in (int, str):
        for seed in (0, 1, 2**40):
            log = [(kind(user), kind(item), 7) for user in range(-20, 20) for item in range(6)]
            out, manifest = make(tmp_path, as_rows(random.Random(seed).sample(log, len(log))), seed=seed)
            assert manifest["options"]["seed"] == seed
            tests[kind, seed] = {row["user_id"]: row["positives"][0] for row in rows(out, "test")}
            assert tests[kind, seed] == {
                kind(user): max(map(kind, range(6)), key=lambda item: chance(kind(user), item, seed))
                for user in range(-20, 20)
            }
        assert tests[kind, 0] != tests[kind, 1] != tests[kind, 2**40]


# The order of events of one time


def test_a_column_orders_events_of_one_time(tmp_path):
    """Days without a time of day: `rank` gives the order, and two events of one rank do not see each other."""
    log = as_rows([(1, 50, 9, 1), (1, 40, 9, 2), (1, 30, 9, 2), (1, 20, 9, 4), (1, 10, 9, 5), (1, 60, 5, 99)], "rank")
    for shuffled in (log, log[::-1], log[3:] + log[:3]):
        out, manifest = make(tmp_path, shuffled, order="rank")
        assert [(row["item_id"], row["history"]) for row in rows(out, "train")] == [
            (60, []),
            (50, [60]),
            *[(item, [60, 50]) for item in sorted((40, 30), key=lambda item: chance(1, item))],
        ]
        tied = sorted((40, 30), key=lambda item: chance(1, item))
        assert rows(out, "valid")[0] == {"user_id": 1, "positives": [20], "timestamp": 9, "history": [60, 50, *tied]}
        assert rows(out, "test")[0]["positives"] == [10]
        assert "rank" not in manifest["columns"]["train"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_the_order_of_the_files_orders_events_of_one_time(tmp_path, ending):
    """300,000 rows in five files: DuckDB reads them with several threads, in pieces."""
    rng = np.random.default_rng(3)
    log = pa.table(
        {"user_id": rng.integers(0, 40, 300_000), "item_id": np.arange(300_000), "timestamp": np.zeros(300_000, int)}
    )
    (tmp_path / "parts").mkdir()
    for number in range(5):
        part = log.slice(60_000 * number, 60_000)
        if ending == "csv":
            import pyarrow.csv

            pyarrow.csv.write_csv(part, tmp_path / f"parts/{number}.csv")
        elif ending == "jsonl":
            lines = "".join(json.dumps(row) + "\n" for row in part.to_pylist())
            (tmp_path / f"parts/{number}.jsonl").write_text(lines)
        else:
            pq.write_table(part, tmp_path / f"parts/{number}.parquet", row_group_size=7_000)
    out, _ = make(tmp_path, events=str(tmp_path / "parts"), order="file", max_history=1)
    items = defaultdict(list)
    for user, item in zip(log["user_id"].to_pylist(), range(300_000), strict=True):
        items[user].append(item)
    tests = {row["user_id"]: row for row in rows(out, "test")}
    assert {user: row["history"] + row["positives"] for user, row in tests.items()} == items


def test_a_log_without_times_may_be_in_the_order_of_its_file(tmp_path):
    log = as_rows([(1, 5, 0), (2, 9, 0), (1, 3, 0), (1, 5, 0), (1, 8, 0), (2, 1, 0), (1, 2, 0), (1, 3, 0)])
    out, manifest = make(tmp_path, untimed(log), split="position")
    assert rows(out, "train") == [
        {"user_id": 1, "item_id": 5, "history": []},
        {"user_id": 1, "item_id": 3, "history": [5]},
        {"user_id": 1, "item_id": 5, "history": [5, 3]},
        {"user_id": 1, "item_id": 3, "history": [5, 3, 5]},
        {"user_id": 2, "item_id": 9, "history": []},
        {"user_id": 2, "item_id": 1, "history": [9]},
    ]
    assert rows(out, "valid") == [{"user_id": 1, "positives": [8], "history": [5, 3, 5]}]
    assert rows(out, "test") == [{"user_id": 1, "positives": [2], "history": [5, 3, 5, 8]}]
    assert manifest["counts"]["repeats_left_out"] == 0
    with_times, _ = make(tmp_path, log, split="position")  # times are not read
    assert "timestamp" not in pq.read_schema(with_times / "train/part-00000.parquet").names
    ordered, _ = make(tmp_path, [{**row, "at": -n} for n, row in enumerate(untimed(log))], split="position", order="at")
    assert rows(ordered, "test") == [{"user_id": 1, "positives": [5], "history": [3, 2, 8]}]


# Random parts


def slow_random(log: list[tuple], valid_share: float, test_share: float, seed: int) -> dict[str, dict[int, list]]:
    """The items of each user in train, valid and test: the last shares of them by their chance."""
    made: dict[str, dict[int, list]] = {"train": {}, "valid": {}, "test": {}}
    for user in {user for user, _ in log}:
        items = sorted({item for owner, item in log if owner == user}, key=lambda item: chance(user, item, seed))
        count = len(items)
        num_valid, num_test = (
            max(1, int(count * share + 1e-9)) if count >= 3 and share else 0 for share in (valid_share, test_share)
        )
        num_valid = min(num_valid, max(0, count - 1 - (num_test > 0)))
        num_test = min(num_test, max(0, count - 1 - num_valid))
        cuts = (0, count - num_test - num_valid, count - num_test, count)
        for part, (start, stop) in zip(made, itertools.pairwise(cuts), strict=True):
            if stop > start:
                made[part][user] = sorted(items[start:stop])
    return made


PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=80)
SHARES = st.sampled_from([(0.1, 0.1), (0.0, 0.3), (0.4, 0.0), (0.3, 0.6), (0.9, 0.05), (0.05, 0.9)])


@settings(max_examples=40, deadline=None)
@given(log=PAIRS, shares=SHARES, seed=st.integers(0, 3), has_times=st.booleans(), data=st.data())
def test_random_parts_are_those_of_the_slow_way(log, shares, seed, has_times, data):
    expected = slow_random(log, *shares, seed)
    times = data.draw(st.lists(st.integers(0, 9), min_size=len(log), max_size=len(log)))
    listed = as_rows([(*pair, time) for pair, time in zip(log, times, strict=True)])
    with tempfile.TemporaryDirectory() as name:
        options = {"split": "random", "valid_share": shares[0], "test_share": shares[1], "seed": seed}
        out, manifest = make(Path(name), listed if has_times else untimed(listed), **options, max_history=100)
        part: dict[str, dict[int, set]] = {"train": defaultdict(set)}
        for row in rows(out, "train"):
            part["train"][row["user_id"]].add(row["item_id"])
            assert ("timestamp" in row) == has_times
        for split in ("valid", "test"):
            part[split] = {row["user_id"]: set(row["positives"]) for row in rows(out, split)}
        assert {
            split: {user: sorted(items) for user, items in users.items()} for split, users in part.items()
        } == expected
        # What a row knows: train rows of train items, earlier ones where there are times; the others all before.
        at = defaultdict(list)
        for row in listed:
            at[row["user_id"], row["item_id"]].append(row["timestamp"])
        for row in rows(out, "train"):
            assert set(row["history"]) <= part["train"][row["user_id"]]
            if has_times:
                assert all(min(at[row["user_id"], item]) < row["timestamp"] for item in row["history"])
        for row in rows(out, "valid"):
            assert set(row["history"]) == part["train"][row["user_id"]]
        for row in rows(out, "test"):
            assert set(row["history"]) == part["train"][row["user_id"]] | part["valid"].get(row["user_id"], set())
        assert len(rows(out, "train")) == sum(item in part["train"][user] for user, item in log)
        assert manifest["counts"].get("test_unfindable", 0) == manifest["counts"].get("valid_unfindable", 0) == 0


def test_the_held_out_shares_leave_an_item_to_train_on():
    count = np.arange(200)
    for valid, test in ((0.1, 0.1), (0.5, 0.49), (0.99, 0.001), (0.001, 0.99), (0.0, 0.999), (0.999, 0.0)):
        num_valid, num_test = held_out_items(count, valid, test)
        assert ((num_valid + num_test)[:3] == 0).all() and (num_valid + num_test < np.maximum(count, 1)).all()
        assert ((num_valid > 0)[3:] == (valid > 0)).all() and ((num_test > 0)[3:] == (test > 0)).all()
    num_valid, num_test = held_out_items(np.array([30, 100, 7]), 0.1, 0.29)
    assert (num_valid.tolist(), num_test.tolist()) == ([3, 10, 1], [8, 29, 2])


def test_a_random_split_does_not_depend_on_the_order_of_the_file(tmp_path):
    rng = random.Random(0)
    log = untimed(as_rows([(rng.randrange(9), rng.randrange(30), 0) for _ in range(400)]))
    made = []
    for _ in range(3):
        rng.shuffle(log)
        out, _ = make(tmp_path, log, split="random")
        made.append(digests(out))
    assert made[0] == made[1] == made[2]


# All events to train on


def test_without_a_split_all_events_train_and_each_user_has_a_row_to_serve(tmp_path):
    log = [(1, 5, 1), (1, 3, 2), (1, 5, 3), (1, 8, 4), (1, 7, 4), (2, 9, 8)]
    out, manifest = make(
        tmp_path, as_rows([(*event, "ab"[n % 2]) for n, event in enumerate(log)], "device"),
        split="none", context=["device"], max_history=2, rows="both",
    )  # fmt: skip
    first, second = sorted((8, 7), key=lambda item: chance(1, item))
    assert [(row["user_id"], row["item_id"], row["history"]) for row in rows(out, "train")] == [
        (1, 5, []),
        (1, 3, [5]),
        (1, 5, [5, 3]),
        (1, first, [3, 5]),
        (1, second, [3, 5]),
        (2, 9, []),
    ]
    device = {8: "b", 7: "a"}[second]
    assert rows(out, "serving") == [
        {"user_id": 1, "positives": [], "timestamp": 4, "device": device, "history": [5, 3, 5, first, second]},
        {"user_id": 2, "positives": [], "timestamp": 8, "device": "b", "history": [9]},
    ]
    assert {row["user_id"]: row["positives"] for row in rows(out, "train_users")} == {1: [5, 3, first, second], 2: [9]}
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["items", "serving", "train", "train_users"]
    assert manifest["counts"]["serving_rows"] == 2 and manifest["counts"]["train_rows"] == 6
    assert manifest["columns"]["serving"]["positives"] == "list<element: int64>"


def test_a_final_fit_trains_exports_indexes_and_recommends(cli, tmp_path):
    """The recipe of docs/data.md: measured on held-out items first, then fitted to all events."""
    rng = random.Random(1)
    log = write_log(
        tmp_path / "log.parquet",
        as_rows([(user, 4 * rng.randrange(8) + user % 4, step) for user in range(60) for step in range(10)]),
    )
    (tmp_path / "config.yaml").write_text(
        f"data: {{dataset: {tmp_path}/measured, batch_size: 64}}\n"
        "tables: {item: {buckets: 64, dim: 8}}\n"
        "user: [{name: history, kind: bag, table: item}]\n"
        "item: [{name: item_id, kind: id, table: item}]\n"
        "model: {dim: 8}\n"
        "loss: {negatives: {sampled: all}}\n"
        "train: {epochs: 2, optimizer: {lr: 0.1}}\n"
        "evaluate: {k: [5], best: recall@5}\n"
    )
    config, final = tmp_path / "config.yaml", tmp_path / "final"
    steps = [
        ("prepare", "events", "--out", tmp_path / "measured", f"events={log}"),
        ("train", config, f"run_dir={tmp_path}/run"),
        ("prepare", "events", "--out", tmp_path / "whole", f"events={log}", "split=none"),
        ("train", config, f"data.dataset={tmp_path}/whole", f"run_dir={final}", "--init-from", tmp_path / "run"),
        ("export", final),
        ("index", final),
        ("report", final),
    ]
    for step in steps:
        said = cli(*step)
        assert said.code == 0, said.err
    newest = [row["item_id"] for row in pq.read_table(log).to_pylist() if row["user_id"] == 7]
    said = cli("recommend", final, "--user", "7", "--k", "5")
    assert said.code == 0, said.err
    took, gets = said.out.split("and is recommended:")
    assert f"item {newest[-1]}" in took.splitlines()[1]
    assert not {f"[{item}]" for item in newest} & set(gets.split())
    exported = pa.concat_tables(pq.read_table(path) for path in (final / "export").glob("users-*.parquet"))
    assert sorted(exported["user_id"].to_pylist()) == list(range(60))
    said = cli("evaluate", final)
    assert said.code == 2 and "split=none" in said.mistake
    assert cli("evaluate", final, "--split", "serving").code == 2


# Outcomes


def test_outcomes_stand_beside_the_history_and_never_in_a_rows_own_columns(tmp_path):
    log = as_rows(
        [(1, 10, 1, 11, "a"), (1, 20, 2, 12, "b"), (1, 30, 3, None, "c"), (1, 40, 4, 14, "d"), (2, 10, 1, 15, "e")],
        "dwell",
        "device",
    )
    for split in ("leave-last-out", "last-basket", "none", "random"):
        out, manifest = make(tmp_path, log, split=split, outcomes=["dwell"], weight=None, context=["device"])
        dwell = {(row["user_id"], row["item_id"]): row["dwell"] for row in log}
        names = ("train", "valid", "test", "serving")
        for part in (name for name in names if name in manifest["columns"]):
            assert "dwell" not in manifest["columns"][part]
            for row in rows(out, part):
                assert row["history_dwell"] == [dwell[row["user_id"], item] for item in row["history"]]
    out, _ = make(tmp_path, log, outcomes=["device"], max_history=1)
    assert [row["history_device"] for row in rows(out, "train")] == [[], ["a"], []]
    assert rows(out, "test")[0]["history_device"] == ["a", "b", "c"]


def test_an_outcome_may_weigh_the_row_and_stand_beside_later_histories(tmp_path):
    log = as_rows([(1, item, item, float(item)) for item in range(1, 6)], "dwell")
    out, manifest = make(tmp_path, log, outcomes=["dwell"], weight="dwell")
    assert [(row["weight"], row["history_dwell"]) for row in rows(out, "train")] == [
        (1.0, []),
        (2.0, [1.0]),
        (3.0, [1.0, 2.0]),
    ]
    assert "weight" not in manifest["columns"]["test"]


# What is refused


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"timestamp": None}, ["timestamp is null", "split = position", "split = random"]),
        ({"timestamp": None, "split": "last-basket"}, ["split = last-basket needs times"]),
        ({"timestamp": "when", "split": "position"}, ["timestamp = 'when'", "reads no times"]),
        ({"split": "last-basket", "order": "file"}, ["order = file", "all items of one time"]),
        ({"valid_share": 0.2}, ["valid_share is set", "split is leave-last-out", "split = random"]),
        ({"split": "random", "valid_share": 1}, ["valid_share = 1"]),
        ({"split": "random", "valid_share": 0.5, "test_share": 0.5}, ["valid_share + test_share = 1", "below 1"]),
        ({"split": "random", "valid_share": 0, "test_share": 0}, ["nothing is held out", "split = none"]),
        ({"split": "random", "hold_out": "any"}, ["hold_out = any", "all events of an item go together"]),
        ({"split": "none", "hold_out": "any"}, ["hold_out = any", "nothing is held out"]),
        ({"split": "none", "valid_from": 5}, ["valid_from is set", "split is none"]),
        ({"context": ["dwell"], "outcomes": ["dwell"]}, ["'dwell' is named twice"]),
        ({"context": ["history_dwell"], "outcomes": ["dwell"]}, ["'history_dwell' has the name of a column"]),
        ({"outcomes": ["timestamp"]}, ["'timestamp' is named twice"]),
        ({"seed": -1}, ["seed = -1"]),
        ({"hold_out": "old"}, ["hold_out = 'old'"]),
    ],
)
def test_splits_that_cannot_be_are_named(tmp_path, options, parts):
    said = refusal(ConfigError, tmp_path, events="x", **options)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"order": "rnk"}, ["no column 'rnk'", "nearest: 'rank'", "order = NAME"]),
        ({"order": "rank"}, ["row 1", "'rank' is null", "give each row a value"]),
        ({"order": "score"}, ["row 0", "'score' is nan"]),
        ({"order": "tags"}, ["'tags' is", "an order is given by numbers"]),
        ({"timestamp": "when"}, ["no column 'when'", "timestamp = NAME", "split = position", "split = random"]),
        ({"split": "random", "timestamp": "when"}, ["no column 'when'"]),
    ],
)
def test_columns_that_give_no_order_are_named(tmp_path, options, parts):
    log = as_rows([(1, 1, 1, 1, float("nan"), ["x"]), (1, 2, 2, None, 0.5, ["y"])], "rank", "score", "tags")
    said = refusal(DataError, tmp_path, log, **options)
    assert all(part in said for part in parts), said


# Odd logs


def test_odd_logs_are_split_without_a_loss(tmp_path):
    """All events of one time, single events, repeats alone: every user is in train, and nothing is held out twice."""
    logs = {
        "one time": as_rows([(user, item, 7) for user in range(5) for item in range(4)]),
        "single events": as_rows([(user, user % 3, user) for user in range(6)]),
        "repeats alone": as_rows([(user, 1, time) for user in range(4) for time in range(9)]),
        "one event": as_rows([(1, 1, 1)]),
        "one pair at one time": as_rows([(1, 1, 1)] * 5),
    }
    for log in logs.values():
        for options in (
            {},
            {"hold_out": "any"},
            {"split": "last-basket"},
            {"split": "last-basket", "hold_out": "any"},
            {"split": "random"},
            {"split": "position"},
            {"split": "none"},
        ):
            out, _ = make(tmp_path, log, **options)
            assert {row["user_id"] for row in rows(out, "train")} == {row["user_id"] for row in log}
            for part in ("valid", "test"):
                held = [row["user_id"] for row in rows(out, part)]
                assert len(held) == len(set(held)) and all(row["positives"] for row in rows(out, part))


# What is printed


def test_the_summary_counts_what_was_read_dropped_and_written(tmp_path):
    items = write_log(tmp_path / "items.parquet", [{"item_id": item} for item in (1, 2, 9)])
    log = as_rows([(1, 1, 1), (1, 2, 2), (1, 2, 3), (1, 3, 4), (1, 1, 5), (2, 1, 6), (2, 1, 7)])
    _, manifest = make(tmp_path, log, items=str(items), hold_out="any")
    assert describe(Path("data/shop"), manifest) == (
        "data/shop: source events, split leave-last-out\n"
        "  events       7 read, 7 kept, 3 of them repeat a user and an item\n"
        "  users        2, 1 in train only\n"
        "  items        4, 1 without a row in the file, 1 in no event\n"
        "  train        5 rows, 2 (40.0 %) without history\n"
        "  valid        1 row, 0 without history, 0 unfindable with exclude_seen\n"
        "  test         1 row, 0 without history, 1 (100.0 %) unfindable with exclude_seen\n"
        "Warning: 2 (40.0 %) of the train rows have no history, mostly because they are the first events of their "
        "users: min_history=1 leaves these out.\n"
        "Warning: 1 (100.0 %) of the test rows ask only for items of their own history, which no model can find while "
        "evaluate.exclude_seen is true. Set it to false or except_target, or prepare with hold_out=new."
    )
    _, manifest = make(tmp_path, log, min_item_events=2, dedupe=True)
    said = describe(Path("x"), manifest)
    assert "7 read, 3 dropped: repeats of a user and an item, 2 dropped: of rare users and items, 2 kept\n" in said
    assert "There are no test rows: no user has enough events to hold one out (it needs 3 items)." in said


def test_histories_that_ties_leave_empty_are_warned_of_with_the_option_that_helps(tmp_path):
    log = as_rows([(user, item, 7) for user in range(4) for item in range(5)])
    _, manifest = make(tmp_path, log)
    counts = manifest["counts"]
    assert [counts[f"{part}_empty_by_ties"] for part in ("train", "valid", "test")] == [8, 4, 4]
    said = describe(Path("x"), manifest)
    assert "12 (100.0 %) of the train rows and 4 (100.0 %) of the valid rows and 4 (100.0 %) of the test rows" in said
    assert "have the same time" in said and "order=COLUMN" in said and "order=file" in said
    _, manifest = make(tmp_path, log, order="file")
    assert "order=" not in describe(Path("x"), manifest)
    timed = as_rows([(1, 1, 0), (2, 7, 10), (3, 6, 20)])
    _, manifest = make(tmp_path, timed, split="time", valid_from=10, test_from=20)
    assert "their users have no earlier event" in describe(Path("x"), manifest)


def test_repeats_of_train_items_are_trained_on_after_the_held_out_items(tmp_path):
    """A month that repeats the one before: both are in train/, without the held-out items 5 and 6 in any history."""
    log = as_rows([(1, 1 + time % 6, time) for time in range(12)])
    for split in ("leave-last-out", "last-basket"):
        out, manifest = make(tmp_path, log, split=split)
        train = [1, 2, 3, 4, 1, 2, 3, 4]
        assert [(row["item_id"], row["history"]) for row in rows(out, "train")] == [
            (item, train[:place]) for place, item in enumerate(train)
        ]
        assert [row["timestamp"] for row in rows(out, "train")] == [0, 1, 2, 3, 6, 7, 8, 9]
        assert [row["positives"] for part in ("valid", "test") for row in rows(out, part)] == [[5], [6]]
        assert manifest["counts"]["repeats_left_out"] == 2
        assert "not trained  2 repeats of held-out items" in describe(Path("x"), manifest)


def test_repeats_of_the_held_out_items_are_warned_of(tmp_path):
    log = as_rows([(user, min(time, 4), time) for user in range(3) for time in range(20)])
    said = describe(Path("x"), make(tmp_path, log)[1])
    assert "45 (75.0 %) of the events are repeats" in said and "split=time" in said and "hold_out=any" in said
    assert "repeats at" not in describe(Path("x"), make(tmp_path, log, hold_out="any")[1])


def test_a_share_of_nothing_is_no_warning(tmp_path):
    log = as_rows([(user, item, item) for user in range(3) for item in range(9)])
    said = describe(Path("x"), make(tmp_path, log, split="random", valid_share=0)[1])
    assert "Warning" not in said and "valid" not in said and "test         3 rows" in said


def test_every_source_has_a_summary(tmp_path):
    manifest = prepare("synthetic", tmp_path / "out", {"users": 50, "items": 100, "clusters": 4})
    said = describe(Path("x"), manifest)
    assert "users        50" in said and "test         50 rows" in said and "Warning" not in said
