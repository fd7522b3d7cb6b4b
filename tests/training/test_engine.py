"""The training engine as a whole: ways to take a step, what it tells of itself, and losses that must not move."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.golden.curves import KEPT, curves
from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import event_config
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model import step_diagnostics as watching
from trec_twotower.model.losses import Pairs, Relations
from trec_twotower.model.losses.pair_products import add_products, dots
from trec_twotower.model.step_diagnostics import StepDiagnostics
from trec_twotower.model.tower_inputs import Pooled, concatenate_features
from trec_twotower.training import loop as training

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID_BY_TORCHREC]

SLOW = pytest.mark.skipif(
    "TREC_TT_SLOW_TESTS" not in os.environ, reason="a minute of C++ compiler: set TREC_TT_SLOW_TESTS"
)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def golden(small_world, tmp_path_factory, lone_rank) -> tuple[dict[str, list[float]], Path]:
    """The losses of the trainings of tests/golden, and the folder of their runs."""
    out = tmp_path_factory.mktemp("golden")
    return curves(small_world, out, lone_rank), out


@pytest.fixture(scope="module")
def usual(small_world, tmp_path_factory, lone_rank) -> Path:
    """A run that `trained` with nothing changed, three of whose steps were traced."""
    return trained(small_world, tmp_path_factory.mktemp("usual"), lone_rank, profile_steps=3)


def trained(world: Path, run_dir: Path, ranks: Ranks, loss: dict[str, Any] | None = None, **change: Any) -> Path:
    settings = {"epochs": 3, "log_every": 1, **change}
    training.train(event_config(world, run_dir, loss=loss or {}, train=settings), ranks)
    return run_dir


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run_dir)]


# Losses


def test_losses_are_what_they_were(golden):
    """A change that is meant to move them remakes the file (`python -m tests.golden`) and says why."""
    kept, (found, _) = json.loads(KEPT.read_text()), golden
    assert found.keys() == kept.keys()
    for name, losses in found.items():
        assert losses == pytest.approx(kept[name], rel=2e-4), name


@pytest.mark.parametrize("change", [{"micro_batch": 3}, {"pipeline": "sparse_dist"}])
def test_other_ways_to_take_a_step_give_the_same_losses(small_world, tmp_path, lone_rank, usual, change):
    """Rows in parts, and ids that travel ahead: the tables are updated once a step, by the same gradients."""
    found = losses_of(trained(small_world, tmp_path / "run", lone_rank, **change))
    assert found == pytest.approx(losses_of(usual), rel=1e-5)


def test_bf16_products_keep_the_losses_near(small_world, tmp_path, lone_rank, usual):
    """Towers and the loss's gradient, by the words of the config."""
    run = trained(small_world, tmp_path / "run", lone_rank, loss={"precision": "bf16"}, precision="bf16")
    assert losses_of(run) != losses_of(usual)
    assert losses_of(run) == pytest.approx(losses_of(usual), rel=0.02)


# What it tells of itself


def test_every_logged_line_tells_how_the_step_went(golden):
    """Numbers that make sense, and histograms that count what they say."""
    lines = lines_of(golden[1] / "events")
    for line in lines:
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["waiting_share"] <= 1
        assert 0.05 < line["temperature"] < 0.5
        for name in ("user_length", "item_length", "gradient_norm", "rows_per_s", "resident_bytes", "lr", "dense_lr"):
            assert line[name] > 0 and math.isfinite(line[name]), name
        for name in ("positive_scores", "negative_scores"):
            seen = line[name]
            assert len(seen["edges"]) == len(seen["counts"]) + 1 and sum(seen["counts"]) > 0
            assert seen["edges"] == sorted(seen["edges"])
    means = [np.average(np.convolve(line["positive_scores"]["edges"], [0.5, 0.5], "valid"),
                        weights=line["positive_scores"]["counts"]) for line in lines]  # fmt: skip
    assert np.mean(means[-3:]) > np.mean(means[:3])  # positives come closer as they are learned


@pytest.mark.parametrize("is_unit", [True, False])
@pytest.mark.parametrize("limits", [{}, {"SAMPLE_ROWS": 4, "HISTOGRAM_CELLS": 30}], ids=["all rows", "some rows"])
def test_what_is_seen_of_a_step_is_what_loops_see(monkeypatch, rng, is_unit, limits):
    """Accuracy, mean lengths and both histograms, cell by cell; of many rows every nth is ranked."""
    for name, value in limits.items():
        monkeypatch.setattr(watching, name, value)
    num_rows, num_columns = 9, 13
    user, item = (rng.normal(0, 2, (count, 3)).astype(np.float32) for count in (num_rows, num_columns))
    positives = [
        (row, int(column)) for row in range(num_rows) for column in rng.choice(num_columns, (row + 1) % 3, False)
    ]
    for row, column in positives[::2]:  # so that some are the best
        user[row] = 2 * item[column]
    raw = {"user": user * 3, "item": item[:5]}
    if is_unit:
        user, item = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (user, item))
    known = [*positives, *((int(row), int(column)) for row, column in rng.integers(0, (9, 13), (12, 2)))]
    is_negative = rng.random(num_columns) < 0.8
    diagnostics = StepDiagnostics(is_unit=is_unit)
    for side, vectors in raw.items():
        diagnostics.record_length(side, torch.from_numpy(vectors))
    pairs = [Pairs(*torch.tensor(each).unbind(1)) for each in (positives, known)]
    diagnostics.record(
        torch.from_numpy(user), torch.from_numpy(item), Relations(*pairs, is_negative_C=torch.tensor(is_negative))
    )
    found = diagnostics.figures(Ranks(0, 1, torch.device("cpu")))
    assert diagnostics.figures(Ranks(0, 1, torch.device("cpu"))) == {}

    every = 3 if limits else 1
    rows = list(range(0, num_rows, every))
    hits, of_positives, of_negatives = [], [], []
    for row in rows:
        against = [
            sum(float(a) * float(b) for a, b in zip(user[row], item[column], strict=True))
            for column in range(num_columns)
            if is_negative[column] and (row, column) not in known
        ]
        if row in rows[: 30 // num_columns if limits else num_rows]:
            of_negatives += against
        for column in (column for taker, column in positives if taker == row):
            score = sum(float(a) * float(b) for a, b in zip(user[row], item[column], strict=True))
            hits.append(score > max(against))
            of_positives.append(score)
    assert 0 < sum(hits) < len(hits) or limits
    assert found["accuracy"] == sum(hits) / len(hits)
    for side, vectors in raw.items():
        assert found[f"{side}_length"] == pytest.approx(
            np.mean([math.hypot(*row) for row in vectors.tolist()]), rel=1e-5
        )
    for name, scores in (("positive_scores", of_positives), ("negative_scores", of_negatives)):
        edges, counts = found[name].edges, found[name].counts
        wanted = [0] * (len(edges) - 1)
        for score in scores:  # what lies beyond the outer edges counts in the outer bins
            wanted[sum(score > edge for edge in edges[1:-1])] += 1
        assert counts.tolist() == wanted


def test_tensorboard_shows_what_the_lines_say(golden):
    run = golden[1] / "events"
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    lines = lines_of(run)
    names = {name for line in lines for name, value in line.items() if isinstance(value, int | float)} - {"step"}
    assert {"loss", "accuracy", "rows_per_s"} <= names
    for name in names:
        shown = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6), name
    for name in ("positive_scores", "negative_scores"):
        shown = {event.step: event.histogram_value for event in board.Histograms(f"train/{name}")}
        assert shown.keys() == {line["step"] for line in lines}
        for line in lines:
            histogram, (edges, counts) = shown[line["step"]], line[name].values()
            inside = dict(zip(edges[1:], counts, strict=True))
            drawn = {
                round(limit, 6): count for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True)
            }
            assert {limit: count for limit, count in drawn.items() if count} == {
                limit: count for limit, count in inside.items() if count
            }
            assert histogram.num == sum(counts)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it looks at what it compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiled_towers_train_as_the_others_do(small_world, tmp_path, lone_rank, usual, backend):
    """Three epochs whose batches differ in size; with aot_eager the graphs are traced, and run without a compiler."""
    compiled: list[Any] = []
    real = torch.compile

    def spy(work: Any, **how: Any) -> Any:
        compiled.append(how)
        return real(work, **how, backend=backend)

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", spy)
        found = losses_of(trained(small_world, tmp_path / "run", lone_rank, compile=True))
    assert compiled == [{"dynamic": True}] * 2
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    )  # both towers were, and not left to run as they are
    assert found == pytest.approx(losses_of(usual), rel=1e-4)


def test_a_trace_shows_the_steps_that_were_asked_for(usual):
    events = json.loads((usual / "profile" / "rank-0.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert len(steps) == 3
    assert "addmm" in (usual / "profile" / "rank-0.txt").read_text()


def test_a_run_that_ends_before_its_trace_begins_says_so(small_world, tmp_path, lone_rank, capsys):
    trained(small_world, tmp_path / "run", lone_rank, epochs=1, profile_steps=2)
    assert not (tmp_path / "run" / "profile").exists()
    assert "no trace was written: train.profile_steps is 2, but the 6 steps before them" in capsys.readouterr().out


# Precision


@pytest.mark.parametrize(
    ("device", "has", "wanted"),
    [
        *(("cpu", (), "fp32"), ("cpu", ("avx512_bf16",), "bf16"), ("cpu", ("amx_tile",), "bf16")),
        *(("cuda", (8, 0), "bf16"), ("cuda", (7, 5), "fp32")),
    ],
)
def test_auto_is_bf16_where_the_device_has_it_or_what_the_environment_says(monkeypatch, device, has, wanted):
    alone = Ranks(0, 1, torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: has)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has, raising=False)
    assert [alone.precision(word) for word in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]  # as conftest says
    monkeypatch.delenv("TREC_TWOTOWER_PRECISION")
    assert alone.precision("auto") == wanted
    monkeypatch.setenv("TREC_TWOTOWER_PRECISION", "bf16")
    assert alone.precision("auto") == "bf16" and alone.precision("fp32") == "fp32"
    monkeypatch.setenv("TREC_TWOTOWER_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="TREC_TWOTOWER_PRECISION is 'fp16'"):
        alone.precision("auto")


# Parts of a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_rows_are_multiplied_and_added_as_one_by_one(rng, dtype):
    """The same row occurs often."""
    one, other = (torch.from_numpy(rng.normal(size=(rows, 5))).to(dtype) for rows in (3, 4))
    row, column = torch.tensor([2, 0, 2, 2]), torch.tensor([3, 3, 1, 0])
    pairs = list(zip(row.tolist(), column.tolist(), strict=True))
    expected = [sum(float(x) * float(y) for x, y in zip(one[i], other[j], strict=True)) for i, j in pairs]
    found = dots(one, row, other, column)
    assert found.dtype == dtype and found.tolist() == pytest.approx(expected, rel=1e-5)
    weight, into = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype), one.clone()
    add_products(into, row, weight, other, column)
    by_hand = one.double().clone()
    for (i, j), factor in zip(pairs, weight.tolist(), strict=True):
        by_hand[i] += factor * other[j].double()
    torch.testing.assert_close(into.double(), by_hand, rtol=1e-5, atol=1e-6)


def test_tower_inputs_have_the_gradient_of_their_parts_divided_and_joined():
    """Rows beyond a side's own get none, and neither do keys of a side that is not asked for."""
    bags = [build_feature(name=name, kind="bag", table="t", pooling=how) for name, how in (("a", "mean"), ("b", "sum"))]
    tables = {"t": TableSpec(buckets=5, dim=2, sharding="data_parallel")}
    schema = Schema.build(tables, bags, (build_feature(name="c", kind="id", table="t"),))
    source, other = (torch.randn(4, width, dtype=torch.float64, requires_grad=True) for width in (4, 2))
    divisor_BF = torch.tensor([[2.0, 1.0], [3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    number_BN, item_divisor, item_number = torch.randn(3, 1).double(), torch.ones(2, 1).double(), torch.empty(2, 0)
    pooled = Pooled()
    pooled.add(source, {"item:c": 2, "user:b": 2})
    pooled.add(other, {"user:a": 2})

    def by_torch(*sides: str) -> list[torch.Tensor]:
        made = {"user": torch.cat([other[:3] / divisor_BF[:, :1], source[:3, 2:], number_BN], 1),
                "item": source[:2, :2]}  # fmt: skip
        return [made[side] for side in sides]

    beside = {"user": (divisor_BF, number_BN), "item": (item_divisor, item_number.double())}
    for sides in (("user", "item"), ("user",), ("item",)):
        made = concatenate_features(schema, pooled, {side: beside[side] for side in sides})
        expected = by_torch(*sides)
        weights = [torch.randn_like(each) for each in expected]
        for found, wanted in zip(made.values(), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        slopes = [
            torch.autograd.grad(sum((w * each).sum() for w, each in zip(weights, parts, strict=True)),
                                (source, other), materialize_grads=True)
            for parts in (list(made.values()), expected)
        ]  # fmt: skip
        for found, wanted in zip(*slopes, strict=True):
            torch.testing.assert_close(found, wanted)
