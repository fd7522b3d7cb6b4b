"""The closed form against a whole decomposition, over ranks, in the tables, and as a recommender."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import EVENTS, ITEM_IDS, USERS
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.training import SpectralConfig
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.training.loop import train
from trec_twotower.training.model_builder import inner_model
from trec_twotower.training.spectral_initialization import Interactions, spectral_tables, spread

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)


def taken_of(matrix_UI: np.ndarray) -> Interactions:
    users, items = np.nonzero(matrix_UI)
    return Interactions(users, items, *matrix_UI.shape)


def by_whole_decomposition(matrix_UI: np.ndarray, dim: int, start: SpectralConfig) -> np.ndarray:
    """A B^T in float64 by numpy's eigenvectors of the dense item-item matrix."""
    n_U, d_I = matrix_UI.sum(1), matrix_UI.sum(0)
    normal = np.maximum(n_U, 1)[:, None] ** -start.user_power * matrix_UI * np.maximum(d_I, 1) ** -start.item_power
    square = normal.T @ normal
    values, vectors = np.linalg.eigh(square - start.diagonal_share * np.diag(np.diag(square)))
    s, v = np.sqrt(values[::-1][:dim]), vectors[:, ::-1][:, :dim] * (d_I > 0)[:, None]
    d = np.maximum(d_I, 1)[:, None]
    return (d**-start.history_power * v * (s / s[0]) ** start.spectrum_power) @ (d**start.length_power * v).T


@pytest.mark.parametrize(
    "powers",
    [
        {},
        {"user_power": 0.5, "item_power": 0.5, "history_power": 0.0, "length_power": 0.0, "spectrum_power": 1.0},
        {"diagonal_share": 0.5},
        {"diagonal_share": 0.75, "spectrum_power": 1.0, "iterations": 20},
        {"user_power": 0.0, "item_power": 0.2, "history_power": 1.0, "length_power": -0.3, "spectrum_power": 0.0},
    ],
)
def test_it_is_what_a_whole_decomposition_gives(powers, rng, lone_rank):
    matrix = (rng.random((70, 40)) < np.linspace(0.02, 0.5, 40)).astype(float)
    matrix[:, 3] = 0  # an item that nobody took
    matrix[5] = 0  # a user who took nothing
    start = SpectralConfig(history="history", **powers)
    history, item = spectral_tables(taken_of(matrix), 9, start, 0, lone_rank)
    expected = by_whole_decomposition(matrix, 9, start)
    assert np.abs((history @ item.T).numpy() - expected).max() < 2e-4 * np.abs(expected).max()
    assert not history[3].any() and not item[3].any()


@pytest.mark.parametrize("pooling", ["sum", "mean", "sqrtn"])
def test_the_spread_is_that_of_all_scores_at_once(pooling, rng, lone_rank, monkeypatch):
    matrix = (rng.random((60, 25)) < 0.2).astype(np.float64)
    matrix[4] = 0  # a user who took nothing has scores of zero
    history, item = (torch.from_numpy(rng.normal(0.2, 1, (25, 6)).astype(np.float32)) for _ in range(2))
    pooled = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) ** {"sum": 0, "mean": 1, "sqrtn": 0.5}[pooling]
    expected = (pooled @ history.double().numpy() @ item.double().numpy().T).std()
    monkeypatch.setattr("trec_twotower.training.spectral_initialization.BLOCK_ROWS", 7)
    assert spread(taken_of(matrix), history, item, pooling, lone_rank) == pytest.approx(expected, rel=1e-5)


def test_users_in_blocks_are_users_at_once(rng, lone_rank, monkeypatch):
    taken = taken_of((rng.random((50, 30)) < 0.2).astype(float))
    start = SpectralConfig(history="history")
    whole = spectral_tables(taken, 6, start, 0, lone_rank)
    monkeypatch.setattr("trec_twotower.training.spectral_initialization.BLOCK_ROWS", 7)
    parts = spectral_tables(taken, 6, start, 0, lone_rank)
    assert torch.allclose(whole[0] @ whole[1].T, parts[0] @ parts[1].T, atol=1e-5)


@pytest.mark.parametrize("name", ["events", "users"])
def test_two_ranks_make_what_one_makes(name, on_one_rank, on_two_ranks):
    rows = EVENTS if name == "events" else USERS
    pairs = {
        (row["user_id"], item) for row in rows for item in ([row["item_id"]] if name == "events" else row["positives"])
    }
    one, two = (results[0][f"spectral {name}"] for results in (on_one_rank, on_two_ranks))
    assert torch.allclose(one["scores"], two["scores"], atol=1e-4 * float(one["scores"].abs().max()))
    assert one["spread"] == pytest.approx(two["spread"], rel=1e-4) and one["spread"] > 0
    for found in (one, two):
        assert found["users"] == len({user for user, _ in pairs})
        assert found["items"] == sorted(ITEM_IDS.index(item) for _, item in pairs)


def clusters(write_dataset: Any, folder: Path) -> Path:
    """Forty users who each took three of the five items of their cluster; the other two are to be found."""
    random = np.random.default_rng(3)
    train, test = [], []
    for user in range(40):
        items = (random.permutation(5) + 5 * (user % 4) + 100).tolist()
        train.append({"user_id": user, "positives": items[:3]})
        test.append({"user_id": user, "positives": items[3:], "history": items[:3]})
    tables = {"train": train, "test": test, "valid": test, "items": [{"item_id": 100 + n} for n in range(20)]}
    return write_dataset(folder, **{name: pa.Table.from_pylist(rows) for name, rows in tables.items()})


def config(dataset: Path, run_dir: Path, **changed: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {"dataset": str(dataset), "rows": "user", "batch_size": 8},
        "tables": {name: {"buckets": 128, "dim": 4, "hashing": "modulo"} for name in ("history", "item")},
        "user": [{"name": "history", "kind": "bag", "table": "history", "pooling": "sum"}],
        "item": [{"name": "item_id", "kind": "id", "table": "item"}],
        "model": {"dim": 4, "similarity": "dot", "user_tower": {"project": False}, "item_tower": {"project": False}},
        "train": {"epochs": 0, "spectral": {"history": "history"}},
        "evaluate": {"k": [2], "best": "recall@2"},
    }
    return validate(RunConfig, {**values, **changed}, "here")


def test_without_an_epoch_it_is_a_recommender_and_training_goes_on_from_it(write_dataset, tmp_path, lone_rank, capsys):
    from trec_twotower.evaluation.evaluator import Evaluator
    from trec_twotower.inference.model_loader import load_model
    from trec_twotower.model.encode import encode_everywhere
    from trec_twotower.training.run_dir import Run

    wanted = config(clusters(write_dataset, tmp_path / "data"), tmp_path / "run")
    train(wanted, lone_rank)
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"the weights are the closed form of train.spectral; train.epochs is 0: {tmp_path / 'run'}"
    loaded = load_model(Run.open(tmp_path / "run"), lone_rank)
    model, sources = loaded.model, loaded.sources
    evaluator = Evaluator.of(sources, "test", wanted.evaluate, lone_rank)
    assert evaluator(model)["recall@2"] == 1.0  # two of two, out of seventeen that were not seen
    item_ID = encode_everywhere(model, "item", sources.catalogue.columns, lone_rank)
    _, item = spectral_tables(Interactions.read(sources, lone_rank), 4, wanted.train.spectral, 0, lone_rank)
    assert torch.allclose(item_ID, item)

    seen = []

    def measure(sources: Any) -> Any:
        def of(model: Any) -> dict[str, float]:
            seen.append(inner_model(model) if hasattr(model, "module") else model)
            return evaluator(model)

        return of

    more = config(tmp_path / "data", tmp_path / "run", train={"epochs": 2, "spectral": {"history": "history"}})
    train(more, lone_rank, measure)
    out = capsys.readouterr().out
    assert "resumed at step 0 of 10" in out and "trained 10 steps" in out
    assert len(seen) == 2
    other = config(tmp_path / "data", tmp_path / "run", train={"spectral": {"history": "history", "item_power": 1.0}})
    with pytest.raises(ConfigError, match=r"train\.spectral\.item_power was 0\.4, now 1\.0"):
        train(other, lone_rank)


def beside(dataset: Path, run_dir: Path, **changed: Any) -> RunConfig:
    """The closed form, at the end, beside four columns that are trained under cosine."""
    tower = {"project": False, "unit_length": ["own"]}
    values: dict[str, Any] = {
        "tables": {name: {"buckets": 128, "dim": 4, "hashing": "modulo"} for name in ("history", "item", "a", "b")},
        "user": [
            {"name": "history", "kind": "bag", "table": "history", "pooling": "sqrtn"},
            {"name": "own", "column": "history", "kind": "bag", "table": "a", "pooling": "sqrtn"},
        ],
        "item": [
            {"name": "own", "column": "item_id", "kind": "id", "table": "b"},
            {"name": "item_id", "kind": "id", "table": "item"},
        ],
        "model": {"dim": 8, "similarity": "dot", "user_tower": tower, "item_tower": tower},
        "train": {"epochs": 3, "spectral": {"history": "history", "when": "after_training", "score_std": 0.25}},
    }
    return config(dataset, run_dir, **{**values, **changed})


def test_at_the_end_it_stands_beside_what_was_trained(write_dataset, tmp_path, lone_rank, capsys):
    """Trained columns as without it, its own as it makes them, scaled; cut short between the two, the same again."""
    from trec_twotower.evaluation.evaluator import Evaluator
    from trec_twotower.inference.model_loader import load_model
    from trec_twotower.model.encode import encode_everywhere
    from trec_twotower.training.run_dir import Run

    wanted = beside(clusters(write_dataset, tmp_path / "data"), tmp_path / "run")
    train(wanted, lone_rank)
    out = capsys.readouterr().out
    assert "  skipped  table history: not in that run" in out and "are filled by the closed form" in out
    *_, last = out.splitlines()  # 40 rows in batches of 8, three times
    assert re.fullmatch(r"trained 15 steps in \d+s .*, then added the closed form of train\.spectral: .*/run", last)

    def vectors(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        loaded = load_model(Run.open(folder), lone_rank)
        evaluator = Evaluator.of(loaded.sources, "test", wanted.evaluate, lone_rank)
        item_ID = encode_everywhere(loaded.model, "item", loaded.sources.catalogue.columns, lone_rank)
        return np.asarray(evaluator.users(loaded.model)), np.asarray(item_ID)

    user_BD, item_ID = vectors(tmp_path / "run")
    user_trained, item_trained = vectors(tmp_path / "run" / "trained")
    assert user_BD.shape == (40, 8) and user_trained.shape == (40, 4)
    assert np.allclose(user_BD[:, 4:], user_trained, atol=1e-6) and np.allclose(item_ID[:, :4], item_trained, atol=1e-6)
    assert np.allclose(np.square(item_trained).sum(1), 1, atol=1e-5)
    sources = load_model(Run.open(tmp_path / "run"), lone_rank).sources
    taken = Interactions.read(sources, lone_rank)
    matrix = np.zeros((taken.num_users, taken.num_items))
    matrix[taken.user_P, taken.item_P] = 1
    start = wanted.train.spectral
    assert start is not None
    closed = by_whole_decomposition(matrix, 4, start)  # of an item in the history and one that is scored
    score = matrix / np.sqrt(3) @ closed
    score *= 0.25 / score.std()
    # The test's users come in the order of train's, and have taken the same three items.
    assert np.allclose(user_BD[:, :4] @ item_ID[:, 4:].T, score, atol=2e-3)

    before = beside(tmp_path / "data", tmp_path / "again").without_closed_form
    train(before, lone_rank)  # as a run that was stopped there
    again = beside(tmp_path / "data", tmp_path / "again")
    train(again, lone_rank)
    train(again, lone_rank)  # has nothing left to do
    assert all(
        np.array_equal(one, other) for one, other in zip(vectors(tmp_path / "again"), (user_BD, item_ID), strict=True)
    )
    longer = beside(tmp_path / "data", tmp_path / "again", train={**as_values(again.train), "epochs": 4})
    with pytest.raises(
        ConfigError, match=r"was trained for 3 epochs before the spectral columns .* train\.epochs is 4"
    ):
        train(longer, lone_rank)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"history": "clicks"}, "train.spectral.history is 'clicks', but the user features .* are: history, own"),
        (
            {"history": "history", "item": "brand"},
            "train.spectral.item is 'brand', but the item features .* are: own, item_id",
        ),
    ],
)
def test_names_of_no_feature_are_said_before_anything_is_trained(wrong, message, write_dataset, tmp_path, lone_rank):
    from trec_twotower.training.sharding_plan import describe_plan

    start = {"epochs": 1, "spectral": {**wrong, "when": "after_training"}}
    named = beside(clusters(write_dataset, tmp_path / "data"), tmp_path / "run", train=start)
    with pytest.raises(ConfigError, match=message):
        train(named, lone_rank)
    with pytest.raises(ConfigError, match=message):
        describe_plan(named, 2)
    assert not (tmp_path / "run" / "trained").exists()


def test_its_plan_has_all_tables_but_steps_of_what_is_trained(write_dataset, tmp_path):
    from trec_twotower.training.sharding_plan import describe_plan

    said = describe_plan(beside(clusters(write_dataset, tmp_path / "data"), tmp_path / "run"), 2)
    tables, _, sent = said.partition("planner's estimate")
    assert all(f"\n{name} " in tables for name in ("history", "item", "a", "b"))
    assert [name for name in ("history", "item", "a", "b") if f"\n{name} " in sent] == ["a", "b"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"similarity": "cosine"}, "model.similarity is cosine: set similarity: dot"),
        ({"user_tower": {"mlp": [8], "project": False}}, "model.user_tower has mlp"),
        ({"item_tower": {}}, "model.item_tower has project"),
        (
            {"user_tower": {"project": False, "unit_length": ["history", "own"]}},
            "names 'history' under feature_dropout, missing_vectors or unit_length",
        ),
    ],
)
def test_what_would_come_between_the_two_parts_is_said(model, message, tmp_path):
    tower = {"project": False, "unit_length": ["own"]}
    shown = {"dim": 8, "similarity": "dot", "user_tower": tower, "item_tower": tower, **model}
    with pytest.raises(ConfigError, match=f"train.spectral.when is after_training, .*{message}"):
        beside(tmp_path / "data", tmp_path / "run", model=shown)


def test_a_closed_form_alone_has_nothing_to_stand_beside(tmp_path):
    with pytest.raises(ConfigError, match="there is no other user feature to train"):
        config(
            tmp_path / "data", tmp_path / "run", train={"spectral": {"history": "history", "when": "after_training"}}
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"spectral": {"history": "clicks"}},
            "train.spectral.history is 'clicks', but the user features .* are: history",
        ),
        (
            {"spectral": {"history": "history", "item": "brand"}},
            "train.spectral.item is 'brand', but the item features",
        ),
        ({"dims": (4, 8)}, "needs tables of one dim, but 'history' has 4 and 'item' 8"),
        ({"shared": True}, "both look up table 'item': give each a table"),
    ],
)
def test_what_cannot_hold_it_is_said_before_the_first_step(changed, message, write_dataset, tmp_path, lone_rank):
    names = ("item",) if changed.get("shared") else ("history", "item")
    dims = dict(zip(names, changed.get("dims", (4, 4)), strict=False))
    bag = {"name": "history", "kind": "bag", "table": names[0], "pooling": "sum"}
    tables = {name: {"buckets": 128, "dim": dim, "hashing": "modulo"} for name, dim in dims.items()}
    start = {"epochs": 0, "spectral": changed.get("spectral", {"history": "history"})}
    item_tower = {"project": len(set(dims.values())) > 1}
    model = {"dim": 4, "similarity": "dot", "user_tower": {"project": False}, "item_tower": item_tower}
    folder = clusters(write_dataset, tmp_path / "data")
    wrong = config(folder, tmp_path / "run", tables=tables, user=[bag], train=start, model=model)
    with pytest.raises(ConfigError, match=message):
        train(wrong, lone_rank)


def test_a_rank_that_the_data_have_not_is_said(lone_rank):
    with pytest.raises(DataError, match="dim 9, but a matrix of 5 users and 30 items has no such rank"):
        spectral_tables(taken_of(np.ones((5, 30))), 9, SpectralConfig(history="history"), 0, lone_rank)
