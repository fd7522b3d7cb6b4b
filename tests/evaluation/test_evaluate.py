"""Evaluation says what a slow count says, and prints it in a table."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trec_twotower.errors import DataError
from trec_twotower.evaluation.baselines import ItemToItem, SpectralTowers
from trec_twotower.evaluation.evaluator import exactly
from trec_twotower.evaluation.result_text import format_table, verdict
from trec_twotower.evaluation.slices import make_slices
from trec_twotower.ops.ragged import Ragged
from trec_twotower.training.spectral_initialization import Interactions


def test_the_verdict_names_the_best_baseline_and_the_reachable_value():
    recalls = {
        "two towers, exact search": 0.30,
        "two towers, through the index": 0.31,
        "popularity": 0.1,
        "item to item": 0.25,
        "best reachable": 0.4,
    }
    result = {"metrics": {name: {"recall@5": recall} for name, recall in recalls.items()}}
    assert verdict(result, 5) == (
        "Two towers: recall@5 0.3000, 20% above the best baseline (item to item, 0.2500), 75% of the best reachable "
        "(0.4000)."
    )
    result["metrics"]["item to item"]["recall@5"] = 0.6
    del result["metrics"]["best reachable"]
    assert verdict(result, 5) == "Two towers: recall@5 0.3000, 50% below the best baseline (item to item, 0.6000)."


def test_popularity_is_that_of_a_slow_count(cli, shop_copy, shop_tables):
    said = cli("evaluate", shop_copy.run)
    assert said.code == 0, said.err
    reported = json.loads((shop_copy.run / "evaluation.json").read_text())["metrics"]["popularity"]
    taken = Counter(shop_tables["train"]["item_id"].to_pylist())
    # Most taken first; of equals, the one further up in the catalogue.
    popular = sorted(shop_tables["items"]["item_id"].to_pylist(), key=lambda item: -taken[item])
    test = shop_tables["test"].to_pylist()
    for k in (5, 10):
        hits = [row["positives"][0] in [item for item in popular if item not in row["history"]][:k] for row in test]
        assert reported[f"recall@{k}"] == reported[f"hit@{k}"] == pytest.approx(sum(hits) / len(hits))


def test_another_split_and_checkpoint_may_be_asked_for(cli, shop_copy):
    last, first = (f"step-{step:08d}" for step in (10, 5))
    assert {last, first} <= {path.name for path in (shop_copy.run / "checkpoints").iterdir()}
    results = {}
    for checkpoint in ("best", "newest", "5"):
        said = cli("evaluate", shop_copy.run, "--split", "valid", "--checkpoint", checkpoint)
        assert said.code == 0 and said.out.startswith("valid, 80 users"), said.err
        results[checkpoint] = json.loads((shop_copy.run / "evaluation.json").read_text())
    assert (results["5"]["step"], results["newest"]["step"]) == (5, 10)
    assert results["5"]["model_version"] != results["newest"]["model_version"]
    # The best is the best of what training saw of valid/.
    log = [json.loads(line) for line in (shop_copy.run / "metrics.jsonl").read_text().splitlines()]
    seen = {event["step"]: event["recall@5"] for event in log if event["kind"] == "valid"}
    assert results["best"]["step"] == max(seen, key=lambda step: seen[step])
    for result in results.values():
        assert result["metrics"]["two towers, exact search"]["recall@5"] == pytest.approx(seen[result["step"]])


@pytest.mark.parametrize("unwritable", ["evaluation.json", "rankings.parquet"])
def test_an_evaluation_that_cannot_be_written_is_printed_all_the_same(unwritable, cli, shop_copy, tmp_path):
    """A run on a read-only disk, or a full one: here something stands in the file's place."""
    whole = cli("evaluate", shop_copy.run).out
    place = (shop_copy.run if unwritable == "evaluation.json" else tmp_path) / unwritable
    rankings = ["--rankings", tmp_path / "rankings.parquet"]
    if unwritable == "evaluation.json":
        place.unlink()
        (place / "inside").mkdir(parents=True)
    else:
        tmp_path.joinpath("file").touch()
        rankings = ["--rankings", tmp_path / "file" / unwritable]
    said = cli("evaluate", shop_copy.run, *rankings)
    assert said.code == 1 and said.out == whole
    assert "the evaluation above is complete, but this file is not written" in said.mistake
    assert str(place if unwritable == "evaluation.json" else tmp_path / "file") in said.mistake


def test_a_later_choice_of_k_needs_no_new_training(cli, shop_copy):
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}", "evaluate.k=[3]", "evaluate.best=recall@3")
    assert said.code == 0 and "trained 10 steps" in said.out, said.err
    said = cli("evaluate", shop_copy.run)
    assert said.code == 0 and "recall@3" in said.out and "recall@5" not in said.out


def test_rankings_end_where_the_unseen_items_do(cli, shop_copy, shop_tables, tmp_path):
    """k is the whole catalogue, of which each user has seen five items."""
    overrides = ("evaluate.k=[40]", "evaluate.best=recall@40")
    assert cli("train", shop_copy.config, f"run_dir={shop_copy.run}", *overrides).code == 0
    said = cli("evaluate", shop_copy.run, "--index", "--rankings", tmp_path / "all.parquet")
    assert said.code == 0, said.err
    items = set(shop_tables["items"]["item_id"].to_pylist())
    test = {row["user_id"]: row for row in shop_tables["test"].to_pylist()}
    for row in pq.read_table(tmp_path / "all.parquet").to_pylist():
        assert len(row["item_ids"]) == 35
        assert set(row["item_ids"]) == items - set(test[row["user_id"]]["history"])
    metrics = json.loads((shop_copy.run / "evaluation.json").read_text())["metrics"]
    assert {name: values["recall@40"] for name, values in metrics.items()} == dict.fromkeys(metrics, 1.0)


def test_the_table_aligns_names_and_figures():
    rows = {"two towers": {"recall@10": 0.25, "ndcg@10": 1.0}, "best reachable": {"recall@10": 0.5}}
    assert format_table(rows, ["recall@10", "ndcg@10"]).splitlines() == [
        "                 recall@10     ndcg@10",
        "two towers          0.2500      1.0000",
        "best reachable      0.5000           -",
    ]


# ---------------------------------------------------------------- beside the metrics


@pytest.fixture(scope="module")
def judged(cli, shop, tmp_path_factory):
    """evaluation.json, the rankings and what was said of the shop, told apart by two columns more."""
    import shutil

    run = shutil.copytree(shop.run, tmp_path_factory.mktemp("judged") / "run")
    rankings = run.parent / "rankings.parquet"
    slices = ("--slice", "item.colour", "--slice", "user.country", "--slice", "user.age", "--slice", "item.price")
    said = cli("evaluate", run, "--index", "--rankings", rankings, *slices)
    assert said.code == 0, said.err
    ranked = {row["user_id"]: row["item_ids"] for row in pq.read_table(rankings).to_pylist()}
    return json.loads((run / "evaluation.json").read_text()), ranked, said.out


def test_what_the_lists_are_like_is_counted_right(judged, shop, shop_tables):
    result, ranked, _ = judged
    taken = Counter(shop_tables["train"]["item_id"].to_pylist())
    wanted = [row["positives"][0] for row in shop_tables["test"].to_pylist()]
    table = pa.concat_tables(pq.read_table(path) for path in (shop.run / "export").glob("items-*.parquet"))
    vector = {row["item_id"]: np.array(row["vector"]) for row in table.to_pylist()}
    for k in (5, 10):
        lists = [items[:k] for items in ranked.values()]
        found = result["lists"]["two towers, exact search"]
        assert found[f"coverage@{k}"] == len({item for items in lists for item in items}) / 40
        bits = [-math.log2((taken[item] + 1) / (320 + 40)) for items in lists for item in items]
        assert found[f"novelty@{k}"] == pytest.approx(sum(bits) / len(bits))
        listed = np.mean([taken[item] for items in lists for item in items])
        assert found[f"popularity_bias@{k}"] == pytest.approx(listed / np.mean([taken[item] for item in wanted]))
        apart = [1 - vector[a] @ vector[b] / np.linalg.norm(vector[a]) / np.linalg.norm(vector[b])
                 for items in lists for at, a in enumerate(items) for b in items[:at]]  # fmt: skip
        assert found[f"diversity@{k}"] == pytest.approx(np.mean(apart), abs=1e-5)
    assert result["lists"]["popularity"]["coverage@5"] < found["coverage@5"]


def test_slices_are_those_of_a_slow_count(judged, shop_tables):
    result, ranked, said = judged
    taken = Counter(shop_tables["train"]["item_id"].to_pylist())
    users = {row["user_id"]: row for row in shop_tables["users"].to_pylist()}
    items = {row["item_id"]: row for row in shop_tables["items"].to_pylist()}
    order = sorted(taken, key=lambda item: (-taken[item], list(items).index(item)))
    head = set(order[: math.ceil(len(order) / 5)])
    prices = sorted(row["price"] for row in items.values() if row["price"] is not None)
    inner = np.quantile(prices, [0.25, 0.5, 0.75])
    parts = defaultdict(lambda: defaultdict(list))
    for row in shop_tables["test"].to_pylist():
        [item] = row["positives"]
        hit = item in ranked[row["user_id"]][:5]
        price = items[item]["price"]
        quarter = "none" if price is None else sum(price >= end for end in inner)
        is_head = "head (top fifth by interactions)" if item in head else "tail"
        assert len(row["history"]) == 5
        for name, label in (
            ("tail", is_head if taken[item] else "cold (no interactions in train)"),
            ("activity", "4 - 7"),
            ("item.colour", items[item]["colour"]),
            ("user.country", users[row["user_id"]]["country"] or "none"),
            ("item.price", quarter),
        ):
            parts[name][label].append(hit)
    assert set(result["slices"]) == {*parts, "popularity", "user.age"}
    for name, labels in parts.items():
        told = result["slices"][name]
        if name == "item.price":  # the labels are ranges, from the least on
            told = dict(zip([0, 1, 2, 3, "none"], told.values(), strict=True))
        assert set(told) == set(labels)
        for label, hits in labels.items():
            assert told[label]["users"] == len(hits)
            found = told[label]["metrics"]["two towers, exact search"]
            assert found["recall@5"] == found["hit@5"] == pytest.approx(np.mean(hits))
    assert sum(part["users"] for part in result["slices"]["popularity"].values()) == 80
    assert sum(part["users"] for part in result["slices"]["user.age"].values()) == 80
    assert "recall@5 by item.colour (users): " in said


def test_intervals_lie_around_their_means_and_the_loss_is_the_difference(judged):
    result, _, said = judged
    for name, intervals in result["intervals"].items():
        mean = result["metrics"][name]["recall@5"]
        low, high = intervals["recall@5"]
        assert low <= mean <= high
        # A share of 80 users: the normal approximation of its interval.
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(mean * (1 - mean) / 80), rel=0.2, abs=0.01)
    exact, index = (result["metrics"][f"two towers, {how}"] for how in ("exact search", "through the index"))
    loss = result["index_loss"]["recall@5"]
    assert loss["value"] == pytest.approx(exact["recall@5"] - index["recall@5"])
    assert loss["interval"][0] <= loss["value"] <= loss["interval"][1]
    assert "recall@5 lost to the index: " in said


def test_intervals_and_baselines_may_be_left_out(cli, shop_copy):
    settings = ("evaluate.bootstrap=0", "evaluate.item_to_item=false", "evaluate.svd=0", "evaluate.slices=[]")
    assert cli("train", shop_copy.config, f"run_dir={shop_copy.run}", *settings).code == 0
    said = cli("evaluate", shop_copy.run)
    assert said.code == 0, said.err
    result = json.loads((shop_copy.run / "evaluation.json").read_text())
    assert result["metrics"].keys() == {"two towers, exact search", "popularity"}
    assert set(map(len, result["intervals"].values())) == {0} and result["slices"] == {}
    assert "sampled" not in result


def test_drawn_negatives_come_by_request_and_are_named_for_it(cli, shop_copy):
    """Of 40 items in four colours every user has taken five of one: the same places among like and among all."""
    said = cli("evaluate", shop_copy.run, "--sampled", "6", "--same", "colour")
    assert said.code == 0, said.err
    result = json.loads((shop_copy.run / "evaluation.json").read_text())
    assert result["sampled"].keys() == {"6 uniform negatives", "6 same colour negatives"}
    assert said.out.count("NOT over the whole catalogue: each positive item is ranked among 6 ") == 2
    assert said.out.count("'item to item' is missing there") == 1
    of_all, alike = (rows["two towers, exact search"] for rows in result["sampled"].values())
    assert of_all["hit@5"] > result["metrics"]["two towers, exact search"]["recall@5"]
    assert of_all["mrr"] > alike["mrr"]  # items of the own colour are the hard ones
    assert of_all["hit@10"] == alike["hit@10"] == 1.0  # seven items have no eleventh
    for options, message in (
        (("--same", "colour"), "no negatives are sampled"),
        (("--sampled", "6", "--same", "colur"), "nearest: 'colour'"),
        (("--sampled", "-1"), "'sampled' is -1"),
    ):
        said = cli("evaluate", shop_copy.run, *options)
        assert said.code == 2 and message in said.err, said.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("item.colur", "needs column 'colur'"),
        ("item.colur", "nearest: 'colour'"),
        ("user.history", "which has the type list<"),
        ("colour", "evaluate.slices names 'colour'"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(cli, shop, name, message):
    said = cli("evaluate", shop.run, "--slice", name)
    assert said.code == 2 and message in said.mistake


def test_rare_values_of_a_column_are_others_and_strangers_are_told():
    """Twenty values, of which twelve are told apart; one user is not in users/."""
    from types import SimpleNamespace

    values = [f"v{number}" for number in range(20) for _ in range(30 - number)] + [None]

    class Part:
        def __init__(self, table):
            self.data, self.columns, self.folder = table, dict.fromkeys(table.column_names), "here"

        def has(self, column):
            return column in self.columns

        def table(self, columns):
            return self.data.select(columns)

    ids = list(range(len(values)))
    users = Part(pa.table({"user_id": ids, "kind": values}))
    test = Part(pa.table({"user_id": [len(values), 0]}))
    dataset = SimpleNamespace(users=users, split=lambda _: test)
    shown = [len(values), 0, len(values) - 1, len(values) - 2, 5]
    held_out = SimpleNamespace(user_ids=pa.array(shown, pa.int32()))
    [found] = make_slices(["user.kind"], SimpleNamespace(dataset=dataset), held_out, "test", np.ones(3))
    assert found.labels == (*(f"v{number}" for number in range(12)), "others", "none", "not in users/")
    assert [found.labels[part] for part in found.part] == ["not in users/", "v0", "none", "others", "v0"]


def item_to_item_written_out(pairs, num_items, seen, k, count):
    """Scores of every item, from the sets of who took it; of the nearest hundred of each seen item."""
    takers = [{user for user, item in pairs if item == each} for each in range(num_items)]
    score = dict.fromkeys(range(num_items), 0.0)
    for one in set(seen):
        alike = {other: len(takers[one] & takers[other]) / math.sqrt(len(takers[one]) * len(takers[other]))
                 for other in range(num_items) if other != one and takers[one] & takers[other]}  # fmt: skip
        for other in sorted(alike, key=lambda item: (-alike[item], item))[:100]:
            score[other] += alike[other]
    left = [item for item in range(num_items) if item not in seen]
    ordered = sorted(left, key=lambda item: (-round(score[item], 5), -count[item] if score[item] == 0 else 0, item))
    return [(item, score[item]) for item in ordered[:k]]


def test_item_to_item_equals_sets_of_who_took_what(lone_rank, rng):
    pairs = sorted({(int(user), int(item)) for user, item in rng.integers(0, (30, 25), size=(150, 2))} | {(30, 24)})
    count = np.bincount([item for _, item in pairs], minlength=26) + rng.integers(0, 9, 26)  # 25 was never taken
    taken = Interactions(np.array([user for user, _ in pairs]), np.array([item for _, item in pairs]), 31, 26)
    baseline = ItemToItem.of(taken, count, lone_rank)
    seen = [rng.permutation(26)[: rng.integers(0, 8)].tolist() for _ in range(60)] + [list(range(26)), [3, 3, 4]]
    for k in (5, 26):
        ranked = baseline.rankings(Ragged.from_lists(seen), k)
        for row, each in zip(ranked.tolist(), seen, strict=True):
            expected = item_to_item_written_out(pairs, 26, each, k, count)
            items = [item for item in row if item >= 0]
            assert len(items) == len(set(items)) == len(expected) and not set(items) & set(each)
            assert row[len(items) :] == [-1] * (k - len(items))
            score = dict(item_to_item_written_out(pairs, 26, each, 26, count))
            assert [score[item] for item in items] == pytest.approx([value for _, value in expected], abs=1e-5)
            nothing = [item for item in items if score[item] == 0]
            assert nothing == [item for item, value in expected if value == 0]


def test_svd_towers_score_the_sum_of_what_a_user_took(lone_rank, rng):
    """The sum and the products written out; the most popular for a user who took nothing."""
    user_P, item_P = np.nonzero(rng.random((40, 12)) < 0.3)
    count = np.bincount(item_P, minlength=12)
    towers = SpectralTowers.of(Interactions(user_P, item_P, 40, 12), 99, count, lone_rank)
    assert towers.item_ID.shape == (12, 12)  # no more than there is
    seen = [[1, 4, 7], [2], [], [5, 5, 9]]
    ranked = towers.rankings(Ragged.from_lists(seen), 6)
    for row, items in zip(ranked.tolist(), seen, strict=True):
        score = towers.history_ID[sorted(set(items))].sum(axis=0) @ towers.item_ID.T if items else count
        unseen = [item for item in np.argsort(-score, kind="stable").tolist() if item not in items]
        assert row == unseen[:6]


def test_a_user_who_took_nearly_all_does_not_make_items_alike(lone_rank, monkeypatch):
    monkeypatch.setattr("trec_twotower.evaluation.baselines.MOST_TAKEN", 3)
    user_P, item_P = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1, 0, 1, 2, 3])
    baseline = ItemToItem.of(Interactions(user_P, item_P, 2, 4), np.ones(4), lone_rank)
    assert baseline.neighbour_IN[:, 0].tolist() == [1, 0, -1, -1]
    assert baseline.likeness_IN[0, 0] == pytest.approx(1 / 2)


@pytest.mark.parametrize(("num_items", "k"), [(5, 5), (70, 7), (33, 1), (300, 100)])
def test_every_item_is_scored_and_equals_go_by_row(num_items, k, rng, monkeypatch, lone_rank):
    """Small whole numbers, so that products are exact and many scores equal; blocks end inside users."""
    monkeypatch.setattr("trec_twotower.index.exact.MAX_CELLS", 300)
    item_ID, user_BD = (rng.integers(-3, 4, size=(rows, 4)).astype(np.float32) for rows in (num_items, 20))
    seen = [rng.permutation(num_items)[: rng.integers(0, num_items + 1)].tolist() for _ in range(20)]
    seen[3], seen[4] = list(range(num_items)), []
    expected = []
    for user, mine in zip(user_BD.tolist(), seen, strict=True):
        score = [sum(a * b for a, b in zip(user, item, strict=True)) for item in item_ID.tolist()]
        order = sorted((item for item in range(num_items) if item not in mine), key=lambda item: (-score[item], item))
        expected.append([*order[:k], *[-1] * (k - len(order))])
    search = exactly(item_ID, lone_rank)
    assert search(user_BD, k, Ragged.from_lists(seen)).tolist() == expected


def test_users_without_a_place_are_refused(lone_rank):
    with pytest.raises(DataError, match="NaN or infinity"):
        exactly(np.ones((3, 2), np.float32), lone_rank)(np.full((1, 2), np.nan, np.float32), 1, Ragged.empty(1))
