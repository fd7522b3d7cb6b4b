"""A checkpoint goes on under another plan where its state allows, and gives its weights to another run where not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.states import whole_optimizer_state, whole_state
from tests.ranks.worlds import event_config, tables
from trec_twotower.config.run_config import RunConfig
from trec_twotower.errors import ConfigError
from trec_twotower.training.checkpoints.checkpoint import Checkpoints
from trec_twotower.training.loop import train
from trec_twotower.training.model_builder import build_model
from trec_twotower.training.optimizer import RunOptimizer

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
SPREAD = ("table_wise", "row_wise", "table_row_wise")


def optimizer_of(kind: str) -> dict[str, Any]:
    return {"optimizer": {"sparse": kind, "lr": 0.1}}


@pytest.fixture
def run_here(lone_rank, capsys):
    """Trains on one rank in this process; gives what it said."""

    def start(config: RunConfig, evaluate: Any = None, **arguments: Any) -> str:
        train(config, lone_rank, evaluate, **arguments)
        return capsys.readouterr().out

    return start


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def states(config: RunConfig, ranks: Any, run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights and the optimizer's states of a run's newest checkpoint, loaded under the config's plan."""
    model = build_model(config, ranks)
    optimizer = RunOptimizer(model, config.train.optimizer)
    checkpoints = Checkpoints(run_dir / "checkpoints", ranks)
    checkpoints.load(checkpoints.complete()[-1], model, optimizer)
    return whole_state(model, ranks), whole_optimizer_state(optimizer, ranks)


@pytest.mark.parametrize(
    ("kind", "plans"),
    [
        *(("rowwise_adagrad", (first, second)) for first in SPREAD for second in SPREAD if first != second),
        ("adagrad", ("table_wise", "row_wise")),
        ("adagrad", ("row_wise", "column_wise")),
        ("sgd", ("table_wise", "column_wise")),
        ("sgd", ("column_wise", "data_parallel")),
        ("sgd", ("data_parallel", "row_wise")),
    ],
)
def test_a_run_goes_on_under_another_plan(kind, plans, run_here, lone_rank, small_world, tmp_path):
    """Tables and states are equal element by element, and the losses that follow those of a run that never changed."""
    settings = {"train": optimizer_of(kind)}
    stays, moves = (tmp_path / name for name in ("stays", "moves"))
    run_here(event_config(small_world, stays, plans[0], train={"epochs": 1, **settings["train"]}))
    shutil.copytree(stays, moves)
    there = event_config(small_world, stays, plans[0], **settings)
    here = event_config(small_world, moves, plans[1], **settings)
    for before, after in zip(states(there, lone_rank, stays), states(here, lone_rank, moves), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
    run_here(there)
    assert "resumed at step 3 of 9" in run_here(here)
    assert losses(moves) == pytest.approx(losses(stays), rel=1e-6)
    assert len(losses(moves)) == 9


@pytest.mark.parametrize(
    ("kind", "plans"),
    [
        ("rowwise_adagrad", ("table_wise", "column_wise")),
        ("rowwise_adagrad", ("column_wise", "table_wise")),
        ("rowwise_adagrad", ("table_wise", "data_parallel")),
        ("adagrad", ("data_parallel", "table_wise")),
    ],
)
def test_a_plan_whose_state_differs_is_refused_and_weights_alone_can_begin_another_run(
    kind, plans, run_here, lone_rank, small_world, tmp_path
):
    """Row-wise Adagrad has a number a row and column shard; a data-parallel table's state has other names."""
    settings = {"train": optimizer_of(kind)}
    old, new = tmp_path / "old", tmp_path / "new"
    first = event_config(small_world, old, plans[0], **settings)
    run_here(first)
    with pytest.raises(ConfigError) as raised:
        run_here(event_config(small_world, old, plans[1], train={"epochs": 4, **settings["train"]}))
    for said in ("state is laid out otherwise", "table 'item'", "sharding", f"run_dir=... --init-from {old}"):
        assert said in str(raised.value)
    second = event_config(small_world, new, plans[1], train={"epochs": 1, **settings["train"]})
    said = run_here(second, init_from=old)
    assert f"began with the weights of {old}" in said and "skipped" not in said and "mapped" not in said
    assert losses(new)[0] < losses(old)[0]  # it begins where the other ended
    begun = event_config(small_world, tmp_path / "begun", plans[1], train={"epochs": 0, **settings["train"]})
    run_here(begun, init_from=old)
    taken, given = states(begun, lone_rank, tmp_path / "begun")[0], states(first, lone_rank, old)[0]
    assert taken.keys() == given.keys()
    for name, value in given.items():
        assert torch.equal(value, taken[name]), name


def test_a_state_that_no_optimizer_takes_is_refused(run_here, lone_rank, small_world, tmp_path):
    """It would be lost without a word: Adagrad's, where plain steps are to go on."""
    run = tmp_path / "run"
    run_here(event_config(small_world, run, train={"epochs": 1, **optimizer_of("adagrad")}))
    with pytest.raises(ConfigError, match=r"laid out otherwise for table 'brand', .* there\)"):
        states(event_config(small_world, run, train=optimizer_of("sgd")), lone_rank, run)


def test_init_from_reports_what_it_copied_and_what_it_skipped(run_here, lone_rank, small_world, tmp_path):
    """A table of another size and a wider layer keep their first weights, bit for bit, and only they."""
    old, new = tmp_path / "old", tmp_path / "new"
    run_here(event_config(small_world, old, train={"epochs": 1}))
    config = event_config(
        small_world,
        new,
        "row_wise",
        tables={"tag": {"buckets": 17}},
        model={"user_tower": {"mlp": [11]}},
        train={"epochs": 0},
    )
    said = run_here(config, init_from=old).splitlines()
    copied = next(line for line in said if line.startswith("  copied"))
    for name in ("table item", "table click", "table country", "table brand", "item tower's hidden layer 1"):
        assert name in copied
    for reason in (
        "table tag: buckets was 16, now 17",
        "user tower's hidden layer 1: 10 x 58 there, 11 x 58 here",
        "user tower's last layer: 6 x 10 there, 6 x 11 here",
    ):
        assert any(line.endswith(reason) for line in said)
    drawn = whole_state(build_model(config, lone_rank), lone_rank)
    begun = states(config, lone_rank, new)[0]
    assert {name for name in drawn if torch.equal(drawn[name], begun[name])} == {
        "tables.embedding_bags.tag.weight",
        "user_tower.layers.0.bias",
        "user_tower.layers.0.weight",
        "user_tower.layers.2.weight",
    }


def test_a_lone_number_that_the_other_run_has_not_stays_as_it_was_drawn(run_here, small_world, tmp_path):
    """A learned temperature is of size (), as is what is not there."""
    fixed, learned = tmp_path / "fixed", tmp_path / "learned"
    temperature = {"temperature": {"learned": True, "start": 0.2}}
    run_here(event_config(small_world, fixed, train={"epochs": 1}))
    said = run_here(event_config(small_world, learned, loss=temperature, train={"epochs": 1}), init_from=fixed)
    assert "  skipped  the learned temperature: not in that run\n" in said
    said = run_here(event_config(small_world, tmp_path / "back", train={"epochs": 1}), init_from=learned)
    assert "  skipped  the learned temperature: only in that run\n" in said
    third = event_config(small_world, tmp_path / "on", loss=temperature, train={"epochs": 1})
    said = run_here(third, init_from=learned)
    assert "the learned temperature" in said and "skipped" not in said
    wider = {"temperature": {"learned": True, "start": 0.2, "high": 2.0}}
    said = run_here(event_config(small_world, tmp_path / "wider", loss=wider, train={"epochs": 1}), init_from=learned)
    assert "  skipped  the learned temperature: high was 1.0, now 2.0\n" in said


def test_init_from_gives_way_to_the_runs_own_checkpoint(run_here, small_world, tmp_path):
    """The same command resumes."""
    old, new = tmp_path / "old", tmp_path / "new"
    run_here(event_config(small_world, old, train={"epochs": 1}))
    run_here(event_config(small_world, new, train={"epochs": 1}), init_from=old)
    said = run_here(event_config(small_world, new, train={"epochs": 2}), init_from=old)
    assert "resumed at step 3 of 6" in said and "began with" not in said


def test_a_run_of_which_nothing_fits_is_refused(run_here, small_world, tmp_path):
    run_here(event_config(small_world, tmp_path / "old", train={"epochs": 1}))
    wider = {name: {**spec, "buckets": spec["buckets"] + 1} for name, spec in tables("table_wise").items()}
    towers = {"dim": 7, "user_tower": {"mlp": [3]}, "item_tower": {"mlp": [4]}}
    config = event_config(small_world, tmp_path / "new", tables=wider, model=towers)
    with pytest.raises(ConfigError, match="has no weight that fits this model"):
        run_here(config, init_from=tmp_path / "old")


# Evaluation and what it chooses


class Judge:
    """Gives the values of a list, one a call, as recall@20."""

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def __call__(self, sources: Any) -> Any:
        return lambda model: {"recall@20": next(self.values)}


def best_of(run_dir: Path) -> Any:
    return Checkpoints(run_dir / "checkpoints", None).best()


def test_the_best_mark_outlives_a_kill_at_any_moment(run_here, small_world, tmp_path):
    """It is in the checkpoint itself: with the newest one gone, the best is that of those that are left."""
    config = event_config(small_world, tmp_path / "run", train={"epochs": 4}, checkpoint={"keep": 9})
    run_here(config, Judge([0.1, 0.4, 0.2, 0.3]))
    assert best_of(tmp_path / "run") == {"step": 6, "metric": "recall@20", "value": 0.4}
    for step in (12, 9):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    run_here(config, Judge([0.35, 0.5]))
    assert best_of(tmp_path / "run") == {"step": 12, "metric": "recall@20", "value": 0.5}
    assert json.loads((tmp_path / "run/status.json").read_text())["best"]["step"] == 12
