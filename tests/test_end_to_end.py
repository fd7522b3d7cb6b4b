"""The whole chain as a user types it: a world is prepared, learned on two ranks, exported, indexed and judged."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from trec_twotower.config.evaluation import METRICS
from trec_twotower.config.loading import read_yaml

CONFIG = Path(__file__).resolve().parent.parent / "configs/demo.yaml"
KS = (10, 20)


def table(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder of Parquet files, by pyarrow alone."""
    return ds.dataset(folder, format="parquet").to_table().to_pylist()


def vectors(export: Path, what: str, id_column: str) -> dict[Any, np.ndarray]:
    """The vectors of an export by id, by pyarrow alone."""
    rows = pa.concat_tables(pq.read_table(path) for path in sorted(export.glob(f"{what}-*.parquet"))).to_pylist()
    return {row[id_column]: np.array(row["vector"]) for row in rows}


def score_slowly(ranked: dict[Any, list[Any]], test: list[dict[str, Any]], k: int) -> dict[str, float]:
    """The metrics of some rankings, a user and an item at a time."""
    total = dict.fromkeys(METRICS, 0.0)
    for row in test:
        wanted, gained, found, first, precision = set(row["positives"]), 0.0, 0, 0.0, 0.0
        for place, item in enumerate(ranked[row["user_id"]][:k], 1):
            if item in wanted:
                found += 1
                gained += 1 / math.log2(place + 1)
                first = first or 1 / place
                precision += found / place
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(wanted)) + 1))
        total["recall"] += found / len(wanted)
        total["ndcg"] += gained / ideal
        total["hit"] += found > 0
        total["mrr"] += first
        total["map"] += precision / min(k, len(wanted))
        total["precision"] += found / k
    return {f"{name}@{k}": value / len(test) for name, value in total.items()}


def recommended(out: str) -> list[tuple[float, str]]:
    """Score and item id of each line that `recommend` prints."""
    lines = out.split("and is recommended:")[1].splitlines()
    return [(float(line.split()[1]), re.findall(r"\[(\S+)\]$", line)[0]) for line in lines if line.strip()]


def vector_now(run: Path, dataset: Path, row: dict[str, Any]) -> np.ndarray:
    """A user's vector by the run's encoder, of a row of test/ as it is when its positives are history as well."""
    import torch

    from trec_twotower.distributed.ranks import Ranks
    from trec_twotower.inference.tower_encoder import Encoder
    from trec_twotower.training.run_dir import Run

    opened = Run.open(run)
    encoder = Encoder.of(opened, opened.open_dataset(Ranks(0, 1, torch.device("cpu"))))
    values, kinds = {**row, "history": [*row["history"], *row["positives"]]}, ds.dataset(dataset / "test").schema
    if "history_weight" in values:  # a weight for each, the mean of the others
        weights = values["history_weight"]
        values["history_weight"] = [*weights, *[float(np.mean(weights))] * len(row["positives"])]
    if (dataset / "users").is_dir():
        about = ds.dataset(dataset / "users").to_table(filter=ds.field("user_id") == row["user_id"])
        values |= about.to_pylist()[0]
        kinds = pa.unify_schemas([kinds, about.schema])
    wanted = {name: pa.array([values[name]], kinds.field(name).type) for name in encoder.columns("user")}
    return encoder.encode("user", pa.table(wanted))[0]


# ---------------------------------------------------------------- a world whose best is known


@dataclass(frozen=True)
class Trained:
    """What the commands made and said; not to be changed by a test."""

    dataset: Path
    run: Path
    rankings: Path
    train_call: tuple[object, ...]
    said: dict[str, Any]

    @property
    def evaluation(self) -> dict[str, Any]:
        return json.loads((self.run / "evaluation.json").read_text())

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return self.evaluation["metrics"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, cli, on_ranks, on_forked_ranks) -> Trained:
    folder = tmp_path_factory.mktemp("world")
    dataset, run, rankings = folder / "data", folder / "run", folder / "rankings.parquet"
    settings = (
        *("train.epochs=8", "train.optimizer.dense_lr=5e-3", "loss.temperature=0.15"),
        *("loss.negatives.sampled=all", f"evaluate.k={list(KS)}"),
    )
    train_call = ("train", CONFIG, f"data.dataset={dataset}", f"run_dir={run}", *settings)
    said = {
        "prepare": cli("prepare", "synthetic", "--out", dataset, "users=3001", "items=801", "clusters=16"),
        "train": on_ranks(*train_call),
        "export": on_forked_ranks("export", run),
        "index": cli("index", run),
        "evaluate": on_forked_ranks("evaluate", run, "--index", "--rankings", rankings),
    }
    for command, answer in said.items():
        assert answer.code == 0, f"{command}: {answer.err}"
        assert answer.err == "", f"{command}: {answer.err}"
    return Trained(dataset, run, rankings, train_call, said)


@pytest.mark.timeout(400)
def test_two_ranks_learn_the_world(world):
    """Measured: 0.80 of the recall that the world allows and 2.7 times that of popularity, over several seeds."""
    best = read_yaml(world.dataset / "dataset.yaml")["best_reachable"]["recall@10"]
    reached = world.metrics["two towers, exact search"]["recall@10"]
    assert 0.7 * best <= reached <= best + 0.02, f"{reached:.4f} of {best:.4f}"
    assert reached >= 2.5 * world.metrics["popularity"]["recall@10"]
    # Likeness by who took them is a fair guess of clusters: between popularity and the best.
    assert world.metrics["popularity"]["recall@10"] < world.metrics["item to item"]["recall@10"] <= best + 0.02


def test_the_index_finds_what_exact_search_finds(world):
    exact, through = world.metrics["two towers, exact search"], world.metrics["two towers, through the index"]
    for k in KS:
        assert through[f"recall@{k}"] >= 0.98 * exact[f"recall@{k}"]


def test_metrics_equal_those_of_the_rankings_scored_slowly(world):
    ranked = {row["user_id"]: row["item_ids"] for row in pq.read_table(world.rankings).to_pylist()}
    test = table(world.dataset / "test")
    reported = world.metrics["two towers, exact search"]
    slow = {name: value for k in KS for name, value in score_slowly(ranked, test, k).items()}
    assert slow == pytest.approx(reported, abs=1e-6)


def test_what_is_told_of_popularity_equals_a_slow_count(world):
    """The bias of the lists, and recall by how often an item was taken in train/."""
    ranked = {row["user_id"]: row["item_ids"][:10] for row in pq.read_table(world.rankings).to_pylist()}
    test = table(world.dataset / "test")
    taken = dict.fromkeys((row["item_id"] for row in table(world.dataset / "items")), 0)
    for row in table(world.dataset / "train"):
        taken[row["item_id"]] += 1
    listed = [np.mean([taken[item] for item in items]) for items in ranked.values()]
    wanted = [np.mean([taken[item] for item in row["positives"]]) for row in test]
    found = world.evaluation["lists"]["two towers, exact search"]
    assert found["popularity_bias@10"] == pytest.approx(np.mean(listed) / np.mean(wanted), rel=1e-6)
    assert world.evaluation["lists"]["popularity"]["popularity_bias@10"] > 2 * found["popularity_bias@10"]

    ordered = sorted((item for item in taken if taken[item]), key=lambda item: -taken[item])  # sorted keeps the order
    head = set(ordered[: math.ceil(len(ordered) / 5)])

    def part(item: Any, name: str) -> str:
        if name == "tail":
            cold = "cold (no interactions in train)"
            return cold if not taken[item] else "head (top fifth by interactions)" if item in head else "tail"
        low = 2 ** int(math.log2(taken[item])) if taken[item] else 0
        return str(low) if low < 2 else f"{low:,} - {2 * low - 1:,}"

    for name in ("tail", "popularity"):
        recalls: dict[str, list[float]] = {}
        for row in test:
            for label in {part(item, name) for item in row["positives"]}:
                mine = {item for item in row["positives"] if part(item, name) == label}
                recalls.setdefault(label, []).append(len(mine & set(ranked[row["user_id"]])) / len(mine))
        told = world.evaluation["slices"][name]
        assert told.keys() == recalls.keys() and len(told) >= 2
        for label, each in recalls.items():
            assert told[label]["users"] == len(each)
            reported = told[label]["metrics"]["two towers, exact search"]["recall@10"]
            assert reported == pytest.approx(np.mean(each), abs=1e-9)


def test_rankings_leave_out_the_history_and_name_no_item_twice(world):
    rows = pq.read_table(world.rankings).to_pylist()
    test = {row["user_id"]: set(row["history"]) for row in table(world.dataset / "test")}
    items = {row["item_id"] for row in table(world.dataset / "items")}
    assert [row["user_id"] for row in rows] == [row["user_id"] for row in table(world.dataset / "test")]
    for row in rows:
        assert len(row["item_ids"]) == len(set(row["item_ids"])) == max(KS)
        assert set(row["item_ids"]) <= items - test[row["user_id"]]


def test_the_run_folder_tells_what_happened(world):
    run = world.run
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [event for event in events if event["kind"] == "train"]
    valid = [event for event in events if event["kind"] == "valid"]
    assert train[-1]["loss"] < train[0]["loss"] and len(valid) == 8
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert max(event["recall@10"] for event in valid) > valid[0]["recall@10"]
    assert any(path.stat().st_size > 500 for path in (run / "tensorboard").iterdir())
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished" and status["num_ranks"] == 2
    best = max(valid, key=lambda event: event["recall@10"])
    assert status["best"] == {"step": best["step"], "metric": "recall@10", "value": best["recall@10"]}
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (evaluation["split"], evaluation["users"], evaluation["step"]) == ("test", 3001, best["step"])
    versions = {json.loads((run / name / "manifest.json").read_text())["model_version"] for name in ("export", "index")}
    assert versions == {evaluation["model_version"]}
    saved = read_yaml(run / "config.yaml")
    assert saved["loss"]["temperature"] == 0.15 and saved["data"]["dataset"] == str(world.dataset)


def test_the_table_stands_beside_its_baselines(world):
    lines = world.said["evaluate"].out.splitlines()
    assert "test, 3,001 users" in lines[0]
    names = ("two towers, exact search", "two towers, through the index", "popularity", "item to item",
             "SVD two towers")  # fmt: skip
    assert lines[2].startswith(" ")
    assert [line.split("  ")[0] for line in lines[3:9]] == [*names, "best reachable"]
    assert f"{world.metrics['popularity']['recall@10']:.4f}" in lines[5]
    assert lines[9].startswith("Two towers: recall@10 ") and "of the best reachable" in lines[9]
    tail = next(line for line in lines if line.startswith("recall@10 by tail"))
    best = read_yaml(world.dataset / "dataset.yaml")["best_reachable"]["recall@10 of head"]
    assert f"of {best:.4f} reachable" in tail.partition("head")[2]


@pytest.mark.timeout(150)
def test_training_again_says_that_it_is_finished_and_changes_no_checkpoint(world, on_forked_ranks):
    def checkpoints() -> dict[str, tuple[bytes, int]]:
        paths = sorted(path for path in (world.run / "checkpoints").rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before, log = checkpoints(), (world.run / "metrics.jsonl").read_bytes()
    said = on_forked_ranks(*world.train_call)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert re.match(r"resumed at step (\d+) of \1 ", lines[0]) and lines[1].startswith("trained ")
    assert lines[2:] == [f"Next: trec-twotower launch --ranks 2 export {world.run}"]
    assert checkpoints() == before and (world.run / "metrics.jsonl").read_bytes() == log


def test_one_rank_measures_and_exports_what_two_did(world, cli, tmp_path):
    """The users and items do not divide by two, so the ranks had unequal shares."""
    run = shutil.copytree(world.run, tmp_path / "run")
    for call in (("export", run), ("evaluate", run, "--index", "--rankings", tmp_path / "rankings.parquet")):
        said = cli(*call)
        assert said.code == 0, said.err
    evaluation = json.loads((run / "evaluation.json").read_text())
    alone = evaluation["metrics"]
    assert alone.keys() == world.metrics.keys()
    for name, metrics in world.metrics.items():
        # Sums of floats differ in the last digit with the block they stand in, so a pair of near-equal items may swap.
        assert alone[name] == pytest.approx(metrics, abs=2 / 3001)
    for name, intervals in world.evaluation["intervals"].items():  # of the same draws of the users
        for metric in ("recall@10", "ndcg@20", "novelty@10", "diversity@10", "popularity_bias@10"):
            assert evaluation["intervals"][name][metric] == pytest.approx(intervals[metric], rel=0.02, abs=0.002)
        one, two = evaluation["lists"][name], world.evaluation["lists"][name]
        assert one == pytest.approx(two, rel=0.02, abs=0.01)
    for name, parts in world.evaluation["slices"].items():
        for label, part in parts.items():
            other = evaluation["slices"][name][label]
            assert other["users"] == part["users"]
            for contender, metrics in part["metrics"].items():
                assert other["metrics"][contender] == pytest.approx(metrics, abs=2 / part["users"])
    ranked, ranked_alone = (
        pq.read_table(path)["item_ids"].to_pylist() for path in (world.rankings, tmp_path / "rankings.parquet")
    )
    assert sum(one == two for one, two in zip(ranked, ranked_alone, strict=True)) > 0.99 * len(ranked)
    catalogue = [row["item_id"] for row in table(world.dataset / "items")]
    for what, id_column in (("items", "item_id"), ("users", "user_id")):
        assert len(list((world.run / "export").glob(f"{what}-*.parquet"))) == 2
        two, one = vectors(world.run / "export", what, id_column), vectors(run / "export", what, id_column)
        assert list(one) == list(two) and (what == "users" or list(one) == catalogue)
        np.testing.assert_allclose(np.stack(list(one.values())), np.stack(list(two.values())), atol=1e-5)


def test_exported_vectors_multiply_to_the_scores_that_are_recommended(world, cli):
    users = vectors(world.run / "export", "users", "user_id")
    items = vectors(world.run / "export", "items", "item_id")
    assert (len(users), len(items)) == (3001, 801)
    for row in table(world.dataset / "test")[:3]:
        user, seen = vector_now(world.run, world.dataset, row), {*row["history"], *row["positives"]}
        said = cli("recommend", world.run, "--user", row["user_id"], "--k", 15)
        assert said.code == 0, said.err
        answer = [(score, int(item)) for score, item in recommended(said.out)]
        for score, item in answer:
            assert user @ items[item] == pytest.approx(score, abs=2e-4)
        unseen = sorted((user @ items[item] for item in items if item not in seen), reverse=True)
        assert [score for score, _ in answer] == pytest.approx(unseen[:15], abs=2e-3)
        assert not {item for _, item in answer} & seen and len({item for _, item in answer}) == 15


# ---------------------------------------------------------------- datasets that somebody else made


def test_a_dataset_of_words_for_ids_goes_all_the_way(shop_copy, cli, shop_tables, tmp_path):
    """Without dataset.yaml; with weighted bags, null countries and lists of positives."""
    shop = shop_copy
    assert not (shop.dataset / "dataset.yaml").exists()
    said = cli("evaluate", shop.run, "--index", "--rankings", tmp_path / "rankings.parquet")
    assert said.code == 0, said.err
    metrics = json.loads((shop.run / "evaluation.json").read_text())["metrics"]
    baselines = {"popularity", "item to item", "SVD two towers"}
    assert metrics.keys() == {"two towers, exact search", "two towers, through the index", *baselines}
    ranked = {row["user_id"]: row["item_ids"] for row in pq.read_table(tmp_path / "rankings.parquet").to_pylist()}
    test = shop_tables["test"].to_pylist()
    slow = {**score_slowly(ranked, test, 5), **score_slowly(ranked, test, 10)}
    assert slow == pytest.approx(metrics["two towers, exact search"], abs=1e-6)
    assert metrics["two towers, exact search"]["recall@5"] > 1.5 * metrics["popularity"]["recall@5"]

    items = vectors(shop.run / "export", "items", "item_id")
    said = cli("recommend", shop.run, "--user", "user-7")
    assert said.code == 0, said.err
    answer = recommended(said.out)
    row = next(row for row in test if row["user_id"] == "user-7")
    user, history = vector_now(shop.run, shop.dataset, row), [*row["history"], *row["positives"]]
    score = {item: user @ vector for item, vector in items.items() if item not in history}
    assert [item for _, item in answer] == sorted(score, key=score.__getitem__, reverse=True)[:10]
    for found, item in answer:
        assert score[item] == pytest.approx(found, abs=2e-4)
    shown = said.out.split("and is recommended:")[0].splitlines()[1:]
    assert [line.split(" (")[0].strip() for line in shown] == [
        f"A {item.replace('-', ' no. ')}" for item in history[::-1][:5]
    ]


ROW_A_USER = """
data: {dataset: data, rows: user, batch_size: 32}
tables:
  item: {buckets: 128, dim: 16, hashing: modulo}
user:
  - {name: history, kind: bag, table: item, pooling: sqrtn}
item:
  - {name: item_id, kind: id, table: item}
model: {dim: 16, user_tower: {project: false}, item_tower: {project: false}}
train: {epochs: 8, optimizer: {lr: 0.3}}
evaluate: {k: [5], best: recall@5}
"""


def test_a_row_a_user_goes_all_the_way(cli, write_dataset, tmp_path, rng):
    """96 users of three tastes, each with eight of the twelve items of one; six to train on, two to find."""
    taken = {user: rng.permutation(12)[:8] + 12 * (user % 3) + 40 for user in range(1, 97)}
    lists = {name: pa.list_(pa.int64()) for name in ("positives", "history")}

    def rows(**columns: slice) -> pa.Table:
        values = {name: [items[part].tolist() for items in taken.values()] for name, part in columns.items()}
        return pa.table({"user_id": list(taken), **{name: pa.array(values[name], lists[name]) for name in columns}})

    write_dataset(
        tmp_path / "data",
        train=rows(positives=slice(6)),
        test=rows(positives=slice(6, 8), history=slice(6)).slice(0, 95),
        items=pa.table({"item_id": range(40, 76)}),
    )
    (tmp_path / "users.yaml").write_text(ROW_A_USER.replace("dataset: data", f"dataset: {tmp_path / 'data'}"))
    run, rankings = tmp_path / "run", tmp_path / "new/rankings.parquet"
    for call in (
        ("train", tmp_path / "users.yaml", f"run_dir={run}"),
        ("export", run),
        ("index", run),
        ("evaluate", run, "--index", "--rankings", rankings),
        ("recommend", run, "--user", 5, "--k", 5),
    ):
        said = cli(*call)
        assert said.code == 0, said.err
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]
    ranked = {row["user_id"]: row["item_ids"] for row in pq.read_table(rankings).to_pylist()}
    test = table(tmp_path / "data/test")
    assert score_slowly(ranked, test, 5) == pytest.approx(metrics["two towers, exact search"], abs=1e-6)
    # Of the six unseen items of a user's taste two are to be found: 5 of 6 is the best that chance gives.
    assert metrics["two towers, exact search"]["recall@5"] > 0.7 > 2 * metrics["popularity"]["recall@5"]
    assert not set(ranked[5]) & set(taken[5][:6].tolist())
    row = next(row for row in test if row["user_id"] == 5)
    user, items = vector_now(run, tmp_path / "data", row), vectors(run / "export", "items", "item_id")
    score = {item: user @ vector for item, vector in items.items() if item not in taken[5]}
    assert [int(item) for _, item in recommended(said.out)] == sorted(score, key=score.__getitem__, reverse=True)[:5]
    said = cli("recommend", run, "--user", 96, "--k", 30)  # of whom train/ alone has a row
    assert {int(item) for _, item in recommended(said.out)} == set(range(40, 76)) - set(taken[96][:6].tolist())
