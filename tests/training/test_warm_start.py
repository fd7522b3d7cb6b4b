"""--init-from gives a model what another run has learned of the same thing, wherever that run kept it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.states import whole_state
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import to_yaml
from trec_twotower.config.run_config import RunConfig
from trec_twotower.errors import ConfigError
from trec_twotower.inference.model_loader import LoadedModel, load_model
from trec_twotower.model.encode import encode
from trec_twotower.training.checkpoints.warm_start import _rows_of_bins, _source
from trec_twotower.training.checkpoints.weight_meaning import Bins, Words
from trec_twotower.training.loop import train
from trec_twotower.training.run_dir import Run

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
BRANDS = ["a"] * 6 + ["b"] * 4 + ["c"] * 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset) -> Callable[..., Path]:
    """Twelve items, of the brands given, whose every feature differs from the others'; a month of 60 events."""

    def write(name: str, brands: list[str], prices: list[float] | None = None) -> Path:
        count = len(brands)
        items = pa.table(
            {
                "item_id": list(range(100, 100 + count)),
                "brand": brands,
                "price": prices or [1.0 + number for number in range(count)],
                "weight": [number % 5 + 0.5 for number in range(count)],
                "tags": [[f"t{number % 3}", f"t{number % 4}"] for number in range(count)],
            }
        )
        train = pa.table(
            {
                "user_id": [number % 20 for number in range(60)],
                "item_id": [100 + 7 * number % 12 for number in range(60)],
                "history": [[100 + (number + step) % 12 for step in range(number % 5)] for number in range(60)],
                "country": [["no", "se", "dk"][number % 3] for number in range(60)],
                "age": [20.0 + number for number in range(60)],
            },
        )
        return write_dataset(tmp_path_factory.mktemp("warm") / name, train=train, items=items)

    return write


@pytest.fixture(scope="module")
def month(dataset) -> Path:
    return dataset("one", BRANDS)


USER = [
    {"name": "history", "kind": "bag", "table": "item"},
    {"name": "country", "kind": "category", "buckets": 8, "dim": 4},
    {"name": "age", "kind": "number"},
]
ITEM = [
    {"name": "item_id", "kind": "id", "table": "item"},
    {"name": "brand", "kind": "category", "vocabulary": "learned", "buckets": 8, "dim": 4},
    {"name": "tags", "kind": "bag", "buckets": 16, "dim": 4},
    {"name": "price", "kind": "number", "normalize": "log1p"},
    {"name": "weight", "kind": "number"},
]
TABLES = {"item": {"buckets": 64, "dim": 4}}
MLP = {"mlp": [6]}


def config_of(dataset: Path, run_dir: Path, **parts: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": {"dataset": dataset, "batch_size": 16, "threads": 0},
        "tables": TABLES,
        "user": USER,
        "item": ITEM,
        "model": {"dim": 4, "user_tower": MLP, "item_tower": MLP},
        "loss": {"temperature": 0.2},
        "train": {"epochs": 2, "precision": "fp32", "optimizer": {"lr": 0.3, "dense_lr": 0.05}},
        "run_dir": run_dir,
    }
    return validate(RunConfig, {**values, **parts}, "the test's config")


@pytest.fixture
def run_of(lone_rank, tmp_path) -> Callable[..., Path]:
    """Trains a run and gives its folder; with `init_from`, without a step of its own."""

    def start(dataset: Path, name: str, init_from: Path | None = None, **parts: Any) -> Path:
        if init_from is not None:
            parts["train"] = {"epochs": 0, "precision": "fp32", **parts.get("train", {})}
        return train(config_of(dataset, tmp_path / name, **parts), lone_rank, init_from=init_from)

    return start


def vectors(loaded: LoadedModel, ranks: Any) -> np.ndarray:
    """Those of all items."""
    return encode(loaded.model, "item", loaded.sources.catalogue.columns, ranks).numpy()


def opened(run_dir: Path, ranks: Any) -> LoadedModel:
    return load_model(Run.open(run_dir), ranks)


def noted(run_dir: Path) -> dict[str, Any]:
    """What the run's log says of its beginning."""
    first = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["kind"], first["step"]) == ("init_from", 0)
    return first


def test_words_that_changed_their_rows_keep_their_vectors(run_of, month, dataset, lone_rank, capsys):
    """Next month "b" is the most frequent brand and "d" is new: an item's vector stays that of its brand."""
    old = run_of(month, "old")
    before = vectors(opened(old, lone_rank), lone_rank)
    later = dataset("two", ["a"] * 3 + ["b"] * 7 + ["d"] * 2)
    capsys.readouterr()
    new = opened(run_of(later, "new", init_from=old), lone_rank)
    assert list(new.sources.statistics["item:brand"].words) == ["b", "a", "d"]
    after = vectors(new, lone_rank)
    for item, brand in ((0, "a"), (7, "b")):  # of the same brand in both months
        np.testing.assert_allclose(after[item], before[item], atol=1e-6, err_msg=brand)
    assert np.abs(after[3] - before[3]).max() > 1e-3  # was "a", is "b"
    assert "table brand: 2 words; new: d; gone: c" in capsys.readouterr().out
    assert noted(new.run.folder)["mapped"] == ["table brand: 2 words; new: d; gone: c"]


PARTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "hidden layer": MLP,
    "averages": MLP,
    "missing": {"missing_vectors": ["tags", "more"], **MLP},
    "gates": {"gating": {"reduction": 2}, **MLP},
    "gates by features": {"gating": {"reduction": 2, "by": ["tags", "price"]}, **MLP},
    "crosses": {"crosses": 2},
    "short and long": {"short_term": ["brand", "tags"]},
    "experts": {"experts": {"count": 3, "width": 5}, **MLP},
    "experts behind short": {"short_term": ["tags"], "experts": {"count": 2, "width": 5}},
    "wide": {"wide": ["item_id"], **MLP},
}


@pytest.mark.parametrize("part", PARTS)
def test_features_in_another_order_give_the_same_vectors(part, run_of, month, lone_rank):
    """Each part of a tower that has rows or columns of features, with all features in another order."""
    model = {"dim": 4, "user_tower": MLP, "item_tower": PARTS[part]}
    settings = {"optimizer": {"lr": 0.3, "dense_lr": 0.05, "ema": 0.9 if part == "averages" else None}}
    features = [*ITEM, {"name": "more", "kind": "bag", "column": "tags", "buckets": 8, "dim": 4, "pooling": "sum"}]
    train = {"epochs": 2, "precision": "fp32", **settings}
    old = run_of(month, "old", item=features, model=model, train=train)
    order = [features[number] for number in (5, 4, 2, 0, 3, 1)]
    new = run_of(month, "new", old, item=order, model=model, train=settings)
    before, after = (opened(run_dir, lone_rank) for run_dir in (old, new))
    assert whole_state(before.model, lone_rank).keys() == whole_state(after.model, lone_rank).keys()
    np.testing.assert_allclose(vectors(after, lone_rank), vectors(before, lone_rank), atol=1e-6)
    assert not noted(new)["skipped"]


def test_dropout_that_moves_the_layers_does_not_keep_them_from_being_found(run_of, month, lone_rank):
    """It stands before them, so that all names in the checkpoint are others."""
    old = run_of(month, "old")
    new = run_of(month, "new", old, model={"dim": 4, "user_tower": MLP, "item_tower": {"dropout": 0.5, **MLP}})
    np.testing.assert_allclose(
        vectors(opened(new, lone_rank), lone_rank), vectors(opened(old, lone_rank), lone_rank), atol=1e-6
    )
    assert not noted(new)["skipped"] and not noted(new)["mapped"]


def test_a_new_feature_keeps_its_first_weights_and_the_others_columns_follow_their_feature(run_of, month, lone_rank):
    """With the new feature's columns at zero, the vectors are those of the old run."""
    old = run_of(month, "old", item=[each for each in ITEM if each["name"] not in ("tags", "weight")])
    new = run_of(month, "new", old)
    loaded = opened(new, lone_rank)
    state = loaded.model.state_dict()
    columns = {"item_id": (0, 4), "brand": (4, 8), "tags": (8, 12), "price": (12, 14), "weight": (14, 16)}
    weight = state["item_tower.layers.0.weight"]
    for name in ("tags", "weight"):
        first, last = columns[name]
        assert (weight[:, first:last] != 0).all()
        weight[:, first:last] = 0
    loaded.model.load_state_dict(state)
    np.testing.assert_allclose(vectors(loaded, lone_rank), vectors(opened(old, lone_rank), lone_rank), atol=1e-6)
    assert noted(new)["mapped"] == ["item tower's hidden layer 1: by feature: item_id, brand, price; new: tags, weight"]
    assert noted(new)["skipped"] == ["table tags: not in that run"]


def test_averages_that_the_old_run_had_not_begin_at_its_weights(run_of, month, lone_rank):
    """Else the first evaluations would be of a mean of random weights."""
    old = run_of(month, "old")
    new = run_of(month, "new", old, train={"optimizer": {"ema": 0.99}})
    state = whole_state(opened(new, lone_rank).model, lone_rank)
    assert torch.equal(state["item_tower.average_0_weight"], state["item_tower.layers.0.weight"])
    np.testing.assert_allclose(
        vectors(opened(new, lone_rank), lone_rank), vectors(opened(old, lone_rank), lone_rank), atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tables": {"item": {"buckets": 64, "dim": 4, "seed": 5}}}, "table item: seed was 0, now 5"),
        (
            {"tables": {"item": {"buckets": 64, "dim": 4, "hashing": "modulo"}}},
            "table item: hashing was mix, now modulo",
        ),
        ({"tables": {"item": {"buckets": 64, "dim": 4, "hashes": 2}}}, "table item: hashes was 1, now 2"),
        ({"tables": {"item": {"buckets": 65, "dim": 4}}}, "table item: buckets was 64, now 65"),
        ({"tables": {"item": {"buckets": 64, "dim": 8}}}, "table item: 64 x 4 there, 64 x 8 here"),
        (
            {"item": [*ITEM[:2], {**ITEM[2], "kind": "text", "column": "brand"}, *ITEM[3:]]},
            "table tags: its rows were ids, now words: 1, characters: None",
        ),
        (
            {"item": [ITEM[0], {**ITEM[1], "vocabulary": None}, *ITEM[2:]]},
            "table brand: its rows were words of a vocabulary, now category (row 0 is null's)",
        ),
        (
            {"model": {"dim": 4, "user_tower": MLP, "item_tower": {"mlp": [6, 6]}}},
            "item tower's last layer: input was hidden layer 1, now hidden layer 2",
        ),
        (
            {"loss": {"temperature": {"learned": True, "start": 0.2}}},
            "the learned temperature: not in that run",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_means_something_else_is_skipped_and_the_reason_is_reported(
    change, reason, run_of, month, lone_rank, capsys
):
    """It keeps its first weights, bit for bit."""
    old = run_of(month, "old")
    fresh = run_of(month, "fresh", **{"train": {"epochs": 0, "precision": "fp32"}, **change})
    capsys.readouterr()
    new = run_of(month, "new", old, **change)
    said = capsys.readouterr().out
    assert f"  {reason}" in said and reason in noted(new)["skipped"]
    drawn, begun = (whole_state(opened(run_dir, lone_rank).model, lone_rank) for run_dir in (fresh, new))
    labels = {
        "table item": "tables.embedding_bags.item.weight",
        "table tags": "tables.embedding_bags.tags.weight",
        "table brand": "tables.embedding_bags.brand.weight",
        "item tower's last layer": "item_tower.layers.4.weight",
        "the learned temperature": "temperature.position",
    }
    name = labels[reason.partition(":")[0]]
    assert torch.equal(drawn[name], begun[name])
    assert not torch.equal(drawn["user_tower.layers.2.weight"], begun["user_tower.layers.2.weight"])


def test_a_number_that_is_normalised_otherwise_is_a_new_input(run_of, month):
    old = run_of(month, "old")
    new = run_of(month, "new", old, item=[*ITEM[:3], {"name": "price", "kind": "number"}, ITEM[4]])
    assert noted(new)["mapped"] == [
        "item tower's hidden layer 1: by feature: item_id, brand, tags, weight; of another kind: price"
    ]


def test_rows_of_a_sequences_ages_are_those_of_the_same_age(run_of, month, lone_rank):
    """An encoder with weights for each age: longer histories add older steps."""

    def user(longest: int) -> list[dict[str, Any]]:
        encoder = {"kind": "heads", "heads": 2}
        return [{"name": "history", "kind": "sequence", "table": "item", "max_length": longest, "encoder": encoder}]

    old = run_of(month, "old", user=user(3))
    new = run_of(month, "new", old, user=user(5))
    name = "user_tower.encoders.of_history.encoder.log_weight_AH"
    before, after = (whole_state(opened(run_dir, lone_rank).model, lone_rank)[name] for run_dir in (old, new))
    assert before.shape == (3, 2) and torch.equal(after[:3], before)
    assert noted(new)["mapped"] == ["layers of user feature history: the 3 newest steps"]


def test_an_encoder_of_another_kind_keeps_its_first_weights(run_of, month):
    def user(heads: int) -> list[dict[str, Any]]:
        encoder = {"kind": "transformer", "heads": heads}
        return [{"name": "history", "kind": "sequence", "table": "item", "max_length": 4, "encoder": encoder}]

    old = run_of(month, "old", user=user(1))
    new = run_of(month, "new", old, user=user(2))
    assert noted(new)["skipped"] == ["layers of user feature history: encoder.heads was 1, now 2"]


def test_a_run_that_was_trained_on_two_ranks_gives_its_words_to_two_ranks(
    run_of, month, dataset, lone_rank, tmp_path, on_forked_ranks
):
    """Tables cut by rows: each rank takes the old rows that belong to its own. As one rank does it."""
    later = dataset("three", ["c"] * 6 + ["e"] * 4 + ["a"] * 2)
    old = run_of(month, "old")
    alone = run_of(later, "alone", old)
    config = config_of(later, tmp_path / "two", train={"epochs": 0, "precision": "fp32"})
    (tmp_path / "two.yaml").write_text(to_yaml(as_values(config)))
    said = on_forked_ranks("train", tmp_path / "two.yaml", "--init-from", old)
    assert said.code == 0, said.err
    one, two = (whole_state(opened(run_dir, lone_rank).model, lone_rank) for run_dir in (alone, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert noted(alone)["mapped"] == noted(tmp_path / "two")["mapped"]


def test_a_run_that_lost_what_it_learned_is_refused(run_of, month):
    """Its rows could be those of any words."""
    old = run_of(month, "old")
    (old / "statistics.json").unlink()
    with pytest.raises(ConfigError, match=r"old has no statistics\.json, the statistics of its features"):
        run_of(month, "new", old)


def test_a_run_that_has_nothing_in_common_is_refused_with_the_reasons(run_of, month, lone_rank, tmp_path):
    old = run_of(month, "old")
    config = config_of(
        month,
        tmp_path / "new",
        tables={"other": {"buckets": 64, "dim": 8}},
        user=[{"name": "seen", "kind": "bag", "table": "other", "column": "history"}],
        item=[{"name": "id", "kind": "id", "table": "other", "column": "item_id"}],
        model={"dim": 8},
    )
    with pytest.raises(ConfigError, match=r"(?s)has no weight that fits this model:.*table other: not in that run"):
        train(config, lone_rank, init_from=old)


# The rows of bins and words, by hand


def test_a_bin_begins_with_the_row_of_the_bin_that_holds_its_middle():
    """Old bins: below 10, 10 to 20, from 20. New: below 5, 5 to 14, 14 to 30, from 30; row 0 is null's."""
    old = Bins((10.0, 20.0), False, 4)
    rows = _rows_of_bins(Bins((5.0, 14.0, 30.0), False, 5), old)
    assert rows.tolist() == [0, 1, 1, 3, 3]
    assert _source(old, Bins((10.0, 20.0), False, 4)) is None
    soft = _rows_of_bins(Bins((1.0, 9.0, 21.0), True, 4), Bins((0.0, 10.0, 20.0), True, 4))
    assert soft.tolist() == [0, 1, 2, 3]
    assert _rows_of_bins(Bins((), False, 3), old).tolist() == [0, -1, -1]


def test_a_word_begins_with_its_own_row_and_rows_of_no_word_with_none():
    source = _source(Words(("x", 7, "y"), 7), Words((7, "z", "x"), 6))
    assert source is not None and source.tolist() == [0, 1, 4, 2, -1, -1, -1]
    assert _source(Words(("7",), 3), Words((7,), 3)).tolist() == [0, 1, -1]  # text is not the number
