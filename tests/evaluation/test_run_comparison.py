"""Two runs compared: figures counted by hand for four users, and refusals of what does not compare."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.evaluation.metrics import resampled_sums
from trec_twotower.evaluation.run_comparison import compare_rankings, format_comparison, list_overlap
from trec_twotower.evaluation.slices import Slice
from trec_twotower.ops.ragged import Ragged

ALONE = Ranks(0, 1, torch.device("cpu"))
# Four users, rankings of two items of six; each looks for one item, the last for two.
POSITIVES = Ragged.from_lists([[0], [1], [2], [3, 4]])
A = np.array([[0, 1], [2, 3], [2, 0], [3, 4]])
B = np.array([[1, 0], [1, 2], [3, 0], [3, -1]])
SECOND = 1 / math.log2(3)  # gain of a hit at the second place; the first has 1
BY_USER = Slice("activity", "user", ("few", "many", "nobody"), np.array([0, 0, 1, 1]))
BY_ITEM = Slice("tail", "item", ("tail", "head"), np.array([0, 1, 1, 1, 0, 0]))


def compared(first: np.ndarray = A, second: np.ndarray = B, **settings: Any) -> dict[str, Any]:
    return compare_rankings(first, second, POSITIVES, 2, (BY_USER, BY_ITEM), ranks=ALONE, **settings)


def check(figures: dict[str, Any], a: float, b: float) -> None:
    assert figures["a"] == pytest.approx(a) and figures["b"] == pytest.approx(b)
    assert figures["difference"] == pytest.approx(b - a)


def test_metrics_are_those_counted_by_hand():
    result = compared()
    assert result["users"] == 4
    # Recall of A: 1, 0, 1, 1. Of B: 1, 1, 0, 1/2.
    check(result["metrics"]["recall@2"], 3 / 4, 2.5 / 4)
    check(result["metrics"]["hit@2"], 3 / 4, 3 / 4)
    check(result["metrics"]["mrr@2"], 3 / 4, (1 / 2 + 1 + 0 + 1) / 4)
    check(result["metrics"]["precision@2"], (1 + 0 + 1 + 2) / 8, (1 + 1 + 0 + 1) / 8)
    check(result["metrics"]["map@2"], 3 / 4, (1 / 2 + 1 + 0 + 1 / 2) / 4)
    check(result["metrics"]["ndcg@2"], 3 / 4, (SECOND + 1 + 0 + 1 / (1 + SECOND)) / 4)


def test_overlap_and_churn_are_those_counted_by_hand():
    jaccard, churn = list_overlap(A, B)
    assert jaccard.tolist() == [1, pytest.approx(1 / 3), pytest.approx(1 / 3), 1 / 2]
    assert churn.tolist() == [0, 1 / 2, 1 / 2, 0]  # of the last list one item is left, which A has as well
    lists = compared()["lists"]
    assert lists["jaccard@2"] == pytest.approx((1 + 1 / 3 + 1 / 3 + 1 / 2) / 4)
    assert lists["churn@2"] == 1 / 4
    jaccard, churn = list_overlap(np.array([[-1, -1], [1, -1]]), np.array([[-1, -1], [-1, -1]]))
    assert (jaccard.tolist(), churn.tolist()) == ([1, 0], [0, 0])


def test_slices_are_those_counted_by_hand():
    slices = compared()["slices"]
    assert list(slices["activity"]) == ["few", "many"]  # a part without users is left out
    assert [part["users"] for part in slices["activity"].values()] == [2, 2]
    check(slices["activity"]["few"]["recall@2"], 1 / 2, 1)
    check(slices["activity"]["many"]["recall@2"], 1, 1 / 4)
    # The tail has items 0, 4 and 5: user 0 looks for 0, user 3 for 4 among others. The head has 1, 2 and 3.
    assert [part["users"] for part in slices["tail"].values()] == [2, 3]
    check(slices["tail"]["tail"]["recall@2"], 1, 1 / 2)
    check(slices["tail"]["head"]["recall@2"], 2 / 3, 2 / 3)
    check(slices["tail"]["tail"]["ndcg@2"], (1 + SECOND) / 2, SECOND / 2)


def test_the_interval_resamples_users_with_both_of_their_values():
    result = compared(resamples=500, seed=3)
    recall = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.5]])
    sums = resampled_sums(recall, 0, 500, seed=3)
    with np.errstate(invalid="ignore"):  # a resample may draw no user
        means = sums[:, 0] / sums[:, 1]
    expected = np.nanpercentile(means[:, 1] - means[:, 0], [2.5, 97.5])
    assert result["metrics"]["recall@2"]["interval"] == pytest.approx(expected.tolist())
    assert expected[0] < -1 / 8 < expected[1]
    assert compared(resamples=500, seed=3) == result
    assert compared(resamples=500, seed=4)["metrics"]["recall@2"]["interval"] != pytest.approx(expected.tolist())
    assert "interval" not in compared(resamples=0)["metrics"]["recall@2"]
    # The same difference for every user has no spread, though the metrics themselves have.
    shifted = compare_rankings(A, A[:, ::-1], Ragged.from_lists([[0], [2], [2], [3]]), 1, ranks=ALONE)
    assert shifted["metrics"]["recall@1"]["interval"] == [-1, -1]


def test_a_ranking_compared_with_itself_has_no_differences():
    result = compared(A, A)
    parts = [part for slices in result["slices"].values() for part in slices.values()]
    figures = [*result["metrics"].values(), *(part[name] for part in parts for name in ("recall@2", "ndcg@2"))]
    assert all((each["difference"], each["interval"]) == (0, [0, 0]) for each in figures)
    assert result["lists"] == {"jaccard@2": 1, "churn@2": 0}


def test_the_text_has_both_values_and_the_interval():
    facts = {"folder": "runs/a", "step": 1200, "model_version": "abc"}
    result = {"split": "test", "k": 2, "exclude_seen": True, "a": facts, "b": facts, **compared(resamples=0)}
    lines = format_comparison(result).splitlines()
    assert lines[:2] == [
        "test, 4 users, whole catalogue, exact search, seen items excluded",
        "A  runs/a (model abc, step 1,200)",
    ]
    assert lines[5].split() == ["recall@2", "0.7500", "0.6250", "-0.1250", "-", "-"]
    assert ["few", "2", "0.5000", "1.0000", "+0.5000", "-", "-"] in [line.split() for line in lines]


# ---------------------------------------------------------------- of runs


@pytest.fixture(scope="module")
def other(cli, shop, tmp_path_factory) -> Path:
    """The shop's run trained for one epoch more."""
    run = tmp_path_factory.mktemp("other") / "run"
    said = cli("train", shop.config, f"run_dir={run}", "train.epochs=1")
    assert said.code == 0, said.err
    return run


def test_a_run_compared_with_itself_is_the_same(cli, shop, tmp_path):
    said = cli("compare", shop.run, shop.run, "--k", "5", "--json", tmp_path / "same.json", "--slice", "item.colour")
    assert said.code == 0 and said.err == "", said.err
    result = json.loads((tmp_path / "same.json").read_text())
    assert {each["difference"] for each in result["metrics"].values()} == {0}
    assert result["lists"] == {"jaccard@5": 1, "churn@5": 0}
    assert sum(part["users"] for part in result["slices"]["item.colour"].values()) == result["users"] == 80
    assert "overlap of the top 5 (mean Jaccard index) 1.0000; churn" in said.out


def test_the_metrics_are_those_of_evaluate(cli, shop_copy, other, tmp_path):
    said = cli("compare", shop_copy.run, other, "--k", "10", "--json", tmp_path / "both.json")
    assert said.code == 0, said.err
    result = json.loads((tmp_path / "both.json").read_text())
    copy = Path(shutil.copytree(other, tmp_path / "other"))
    for side, run in (("a", shop_copy.run), ("b", copy)):
        assert cli("evaluate", run).code == 0
        evaluation = json.loads((run / "evaluation.json").read_text())
        metrics = evaluation["metrics"]["two towers, exact search"]
        for name, figures in result["metrics"].items():
            assert figures[side] == pytest.approx(metrics[name])
        assert result[side]["model_version"] == evaluation["model_version"]
        for name in ("tail", "popularity", "activity"):
            for label, part in evaluation["slices"][name].items():
                assert result["slices"][name][label]["users"] == part["users"]
                wanted = part["metrics"]["two towers, exact search"]["ndcg@10"]
                assert result["slices"][name][label]["ndcg@10"][side] == pytest.approx(wanted)
    assert 0 < result["lists"]["jaccard@10"] < 1  # otherwise the runs differ in nothing


@pytest.mark.timeout(200)
def test_two_ranks_compare_as_one(cli, on_forked_ranks, shop, other, tmp_path):
    assert cli("compare", shop.run, other, "--k", "5", "--json", tmp_path / "one.json").code == 0
    said = on_forked_ranks("compare", shop.run, other, "--k", "5", "--json", tmp_path / "two.json")
    assert said.code == 0, said.err
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for name, figures in one["metrics"].items():
        assert two["metrics"][name]["difference"] == pytest.approx(figures["difference"])
        assert two["metrics"][name]["interval"] == pytest.approx(figures["interval"])
    assert two["lists"] == pytest.approx(one["lists"])


def test_runs_that_do_not_compare_are_refused(cli, shop, other, shop_tables, write_dataset, tmp_path):
    parts = {**shop_tables, "train": shop_tables["train"].slice(1)}
    elsewhere = write_dataset(tmp_path / "elsewhere", **parts)
    run = tmp_path / "run"
    assert cli("train", shop.config, f"data.dataset={elsewhere}", f"run_dir={run}", "train.epochs=1").code == 0
    said = cli("compare", shop.run, run, "--k", "5")
    assert said.code == 2 and "different datasets" in said.mistake
    assert str(elsewhere) in said.mistake and str(shop.dataset) in said.mistake and said.out == ""

    seen = Path(shutil.copytree(other, tmp_path / "seen"))
    settings = ("train.epochs=1", "evaluate.exclude_seen=false")
    assert cli("train", shop.config, f"run_dir={seen}", *settings).code == 0
    said = cli("compare", shop.run, seen, "--k", "5")
    assert said.code == 2 and "evaluate.exclude_seen is true in" in said.mistake and "and false in" in said.mistake


def test_runs_of_other_catalogues_are_refused(cli, shop, shop_tables, write_dataset, tmp_path):
    """The rows are equal, so that the fingerprints are, but the items have another order."""
    items = shop_tables["items"]
    folder = write_dataset(tmp_path / "shop", **{**shop_tables, "items": items.take(list(range(39, -1, -1)))})
    run = tmp_path / "run"
    assert cli("train", shop.config, f"data.dataset={folder}", f"run_dir={run}", "train.epochs=1").code == 0
    said = cli("compare", shop.run, run, "--k", "5")
    assert said.code == 2 and "different catalogues" in said.mistake


def test_too_many_items_are_refused(cli, shop):
    said = cli("compare", shop.run, shop.run, "--k", "41")
    assert said.code == 2 and "k is 41, but the catalogue has 40 items" in said.mistake
    assert "--k is 0" in cli("compare", shop.run, shop.run, "--k", "0").mistake
