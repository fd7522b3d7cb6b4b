"""Warnings of training: below popularity, and collapsed vectors; each once, on any number of ranks, across restarts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.ranks.launch import SAID_BY_TORCHREC
from trec_twotower.config.base import as_values
from trec_twotower.config.loading import load_config, to_yaml
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.sources import prepare
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.evaluation.evaluator import Evaluator
from trec_twotower.training.collapse_guard import (
    BELOW_POPULARITY,
    ITEM_COSINE,
    MOST_COSINE,
    NEGATIVE_COSINE,
    USER_ITEM_COSINE,
    CollapseGuard,
    baseline_name,
    cosines,
    unit,
)
from trec_twotower.training.loop import train

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
CONFIG = """
data: {batch_size: 256}
tables: {item: {buckets: 4096, dim: 16}}
user: [{name: history, kind: bag, table: item, max_length: 20}]
item: [{name: item_id, kind: id, table: item}]
model: {dim: 16}
loss: {negatives: {in_batch: true, sampled: 64}}
train: {epochs: 2, log_every: 10}
evaluate: {k: [10], best: recall@10}
"""
# Nothing but the pull of positives: a negative costs next to nothing, and only at a cosine of .99 and more.
COLLAPSING = ("loss.kind=ccl", "loss.temperature=null", "loss.margin=0.99", "loss.negative_weight=1e-6")
LEARNING_NOTHING = ("train.optimizer.lr=1e-12", "train.optimizer.dense_lr=1e-12")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """1,500 users and 400 items in 8 clusters."""
    folder = tmp_path_factory.mktemp("clusters") / "data"
    prepare("synthetic", folder, {"users": 1500, "items": 400, "clusters": 8})
    return folder


@pytest.fixture
def config_of(dataset, tmp_path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG)
        return load_config(path, (f"data.dataset={dataset}", f"run_dir={tmp_path / 'run'}", *overrides))

    return make


def run(config: RunConfig, ranks: Ranks) -> None:
    train(config, ranks, lambda sources: Evaluator.of(sources, "valid", config.evaluate, ranks))


def logged(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    assert config.run_dir is not None
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# Figures


def test_mean_cosines_are_those_of_all_pairs_one_by_one(rng):
    """Vectors of any length, one of them zero, which has the cosine 0 with everything."""
    item_ID, user_BD = (scale * rng.standard_normal((count, 5)) for count, scale in ((7, 3.0), (4, 0.1)))
    item_ID[2] = 0

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        length = np.linalg.norm(one) * np.linalg.norm(other)
        return float(one @ other / length) if length else 0.0

    between_items = [cosine(item_ID[i], item_ID[j]) for i in range(7) for j in range(7) if i != j]
    with_users = [cosine(user, item) for user in user_BD for item in item_ID]
    found = cosines(item_ID.astype(np.float32), unit(user_BD).sum(axis=0), 4)
    # The zero vector's cosine with itself is 0, not 1, which the sum over pairs takes for granted: 1 of 42 pairs.
    assert found[ITEM_COSINE] == pytest.approx(np.mean(between_items) - 1 / 42, abs=1e-6)
    assert found[USER_ITEM_COSINE] == pytest.approx(np.mean(with_users), abs=1e-6)


# When it warns


def figures(recall: float = 0.3, item_cosine: float = 0.1, user_item_cosine: float = 0.0) -> dict[str, float]:
    metrics = {"recall@10": recall, ITEM_COSINE: item_cosine, USER_ITEM_COSINE: user_item_cosine}
    return {**metrics, baseline_name("recall@10"): 0.2}


BAD = {
    BELOW_POPULARITY: figures(recall=0.19),
    ITEM_COSINE: figures(item_cosine=MOST_COSINE[ITEM_COSINE] + 0.01),
    USER_ITEM_COSINE: figures(user_item_cosine=MOST_COSINE[USER_ITEM_COSINE] + 0.01),
}


@pytest.mark.parametrize("cause", BAD)
def test_a_cause_is_reported_at_the_end_of_a_pass_or_when_it_lasts_and_once(cause, config_of):
    guard = CollapseGuard(config_of())
    assert guard.validated(figures(), is_pass_end=False) == []
    assert guard.validated(BAD[cause], is_pass_end=False) == []
    assert guard.validated(figures(), is_pass_end=False) == []
    assert guard.validated(BAD[cause], is_pass_end=False) == []
    [found] = guard.validated(BAD[cause], is_pass_end=False)
    assert found.cause == cause
    assert guard.validated(BAD[cause], is_pass_end=True) == []
    again = CollapseGuard(config_of())
    assert [each.cause for each in again.validated(BAD[cause], is_pass_end=True)] == [cause]
    assert again.validated(BAD[cause], is_pass_end=True) == []


def test_a_healthy_run_at_the_bounds_is_not_reported(config_of):
    guard = CollapseGuard(config_of())
    at_bounds = figures(0.2, MOST_COSINE[ITEM_COSINE], MOST_COSINE[USER_ITEM_COSINE])
    assert guard.validated(at_bounds, is_pass_end=True) == []
    assert guard.trained(MOST_COSINE[NEGATIVE_COSINE]) == []
    assert guard.validated({"recall@10": 0.0}, is_pass_end=True) == []  # an evaluation of one's own, without figures


def test_a_resumed_run_knows_what_was_reported_and_what_was_found_last(config_of):
    first = CollapseGuard(config_of())
    first.validated(BAD[ITEM_COSINE], is_pass_end=False)
    second = CollapseGuard(config_of())
    second.resume([{"kind": "valid", "step": 5, **BAD[ITEM_COSINE]}])
    [found] = second.validated(BAD[ITEM_COSINE], is_pass_end=False)
    third = CollapseGuard(config_of())
    third.resume([{"kind": "warning", "step": 9, **found.as_values()}, {"kind": "valid", **BAD[ITEM_COSINE]}])
    assert third.validated(BAD[ITEM_COSINE], is_pass_end=True) == []


def test_a_message_names_what_was_measured_what_was_expected_and_what_to_change(config_of):
    changed = config_of(
        "loss.negatives.cross_batch_memory=4096", "loss.negatives.top_k=32", "loss.log_q=0.5", "train.optimizer.lr=7"
    )
    [found] = CollapseGuard(changed).validated(BAD[BELOW_POPULARITY], is_pass_end=True)
    assert found.message == (
        "warning: validation recall@10 is 0.1900, below the 0.2000 of ranking all items by popularity. A model that "
        "learns is above popularity after its first pass over the data. Change one of: loss.log_q to its default 1.0 "
        "(now 0.5); loss.negatives.cross_batch_memory to its default 0 (now 4096); loss.negatives.top_k to its default "
        "null (now {'count': 32, 'others': 0.1}); train.optimizer.lr and dense_lr to less (now 7 and 0.001); "
        "train.epochs to more (now 2) (docs/losses.md)."
    )
    ccl = config_of("loss.kind=ccl", "loss.temperature=null")
    [found] = CollapseGuard(ccl).validated(BAD[ITEM_COSINE], is_pass_end=True)
    assert found.message.startswith("warning: the mean cosine of two items is 0.960, above 0.95. Vectors this close")
    assert "loss.kind to its default softmax (now ccl)" in found.message
    assert "log_q" not in found.message  # which ccl has not


# Training


def test_a_planted_collapse_is_reported_once_also_where_the_run_goes_on(config_of, lone_rank, capsys):
    """By validation's vectors and by a step's own negatives, on the screen and in metrics.jsonl."""
    config = config_of(*COLLAPSING)
    run(config, lone_rank)
    warned, printed = logged(config, "warning"), capsys.readouterr().out
    causes = [line["cause"] for line in warned]
    assert {ITEM_COSINE, NEGATIVE_COSINE} <= set(causes) and len(causes) == len(set(causes))
    for line in warned:
        assert printed.count(line["message"]) == 1
        if line["cause"] in MOST_COSINE:
            assert line["value"] > line["bound"] == MOST_COSINE[line["cause"]]
    run(config_of(*COLLAPSING, "train.epochs=3"), lone_rank)
    assert logged(config, "warning") == warned
    assert "warning: " not in capsys.readouterr().out


def test_a_healthy_run_has_no_warnings_and_logs_what_it_was_held_against(config_of, lone_rank, capsys):
    """Popularity's recall is that of a count by hand: the ten most popular items outside each history."""
    config = config_of()
    run(config, lone_rank)
    assert logged(config, "warning") == []
    assert "warning: " not in capsys.readouterr().out
    for line in logged(config, "valid"):
        assert line["recall@10"] > line[baseline_name("recall@10")]
        assert -1 <= line[USER_ITEM_COSINE] < line[ITEM_COSINE] < MOST_COSINE[ITEM_COSINE]
    assert logged(config, "valid")[0][baseline_name("recall@10")] == pytest.approx(popularity_by_hand(config))


def popularity_by_hand(config: RunConfig) -> float:
    folder = Path(config.data.dataset)
    ids = pq.read_table(folder / "items", columns=["item_id"])["item_id"].to_pylist()
    counts = dict.fromkeys(ids, 0)
    for item in pq.read_table(folder / "train", columns=["item_id"])["item_id"].to_pylist():
        counts[item] += 1
    order = sorted(ids, key=lambda item: (-counts[item], ids.index(item)))
    valid = pq.read_table(folder / "valid", columns=["history", "positives"]).to_pylist()
    hits = []
    for row in valid:
        best = [item for item in order if item not in row["history"]][:10]
        hits.append(np.mean([item in best for item in row["positives"]]))
    return float(np.mean(hits))


def test_a_model_that_learns_nothing_is_reported_as_below_popularity(config_of, lone_rank):
    config = config_of(*LEARNING_NOTHING)
    run(config, lone_rank)
    [found] = [line for line in logged(config, "warning") if line["cause"] == BELOW_POPULARITY]
    first = logged(config, "valid")[0]
    assert (found["step"], found["metric"]) == (first["step"], "recall@10")
    assert found["value"] == first["recall@10"] < found["bound"] == first[baseline_name("recall@10")]


def test_a_collapse_without_validation_is_reported_by_the_negatives(
    dataset, config_of, lone_rank, tmp_path, monkeypatch
):
    """Under cosine alone: products without bound are no cosines."""
    for name in ("train", "items", "users"):
        shutil.copytree(dataset / name, tmp_path / "data" / name)
    config = config_of(*COLLAPSING, f"data.dataset={tmp_path / 'data'}", "train.epochs=1")
    train(config, lone_rank)
    [found] = logged(config, "warning")
    last = logged(config, "train")[-1]
    assert (found["cause"], found["step"]) == (NEGATIVE_COSINE, last["step"])
    histogram = last["negative_scores"]
    middle = (np.array(histogram["edges"][1:]) + np.array(histogram["edges"][:-1])) / 2
    assert found["value"] == pytest.approx(np.average(middle, weights=histogram["counts"]), abs=1e-4)
    monkeypatch.setitem(MOST_COSINE, NEGATIVE_COSINE, -1e9)  # any mean would be above it
    dot = config_of(f"data.dataset={tmp_path / 'data'}", f"run_dir={tmp_path / 'dot'}", "model.similarity=dot")
    train(dot, lone_rank)
    assert logged(dot, "warning") == []


def test_two_ranks_report_what_one_rank_does_once(config_of, lone_rank, forked, tmp_path):
    alone = config_of(*COLLAPSING)
    run(alone, lone_rank)
    both = config_of(*COLLAPSING, f"run_dir={tmp_path / 'two'}")
    path = tmp_path / "two.yaml"
    path.write_text(to_yaml(as_values(both)))
    code, printed = forked(2, "trec_twotower", "train", path)
    assert code == 0, printed
    found, wanted = logged(both, "warning"), logged(alone, "warning")
    assert [(line["cause"], line["step"]) for line in found] == [(line["cause"], line["step"]) for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=5e-3)
        assert printed.count(one["message"]) == 1
