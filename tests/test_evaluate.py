"""Evaluation says what a slow count says, and prints it in a table."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from trec_twotower.evaluate import comparison


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


def test_a_later_choice_of_k_needs_no_new_training(cli, shop_copy):
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}", "evaluate.k=[3]", "evaluate.best=recall@3")
    assert said.code == 0 and "trained 10 steps" in said.out, said.err
    said = cli("evaluate", shop_copy.run)
    assert said.code == 0 and "recall@3" in said.out and "recall@5" not in said.out


def test_rankings_end_where_the_unseen_items_do(cli, shop_copy, shop_tables, tmp_path):
    """k is the whole catalogue, of which each user has seen five items."""
    import pyarrow.parquet as pq

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
    assert comparison(rows, ["recall@10", "ndcg@10"]).splitlines() == [
        "                 recall@10     ndcg@10",
        "two towers          0.2500      1.0000",
        "best reachable      0.5000           -",
    ]
