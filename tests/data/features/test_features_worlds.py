"""Worlds that only one part can solve: new items known by text or picture, tastes that a pair or a bin decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.ranks.bazaar import WORDS, write_model
from tests.ranks.launch import SAID_BY_TORCHREC

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID_BY_TORCHREC]
TOPICS, WARM, COLD, EVENTS = 5, 60, 40, 960
TASTE = {"name": "taste", "kind": "category", "buckets": 64, "dim": 8}


@pytest.fixture(scope="module")
def topics(tmp_path_factory, write_dataset) -> Path:
    """100 items of five topics, of which 40 are new; a title of a word of the topic and two of any, and a picture.

    Who has taste t, and whose a and b add up to t modulo 5, takes items of topic t.
    """
    rng = np.random.default_rng(11)
    topic_I = np.arange(WARM + COLD) % TOPICS
    titles = [" ".join(rng.permutation([WORDS[topic], *rng.choice(WORDS[TOPICS:], 2)])) for topic in topic_I]
    pictures = np.eye(TOPICS)[topic_I] + rng.normal(0, 0.2, (len(topic_I), TOPICS))
    a, b = rng.integers(0, TOPICS, (2, EVENTS))
    taste = (a + b) % TOPICS
    warm_of = [np.flatnonzero(topic_I[:WARM] == topic) for topic in range(TOPICS)]
    folder = tmp_path_factory.mktemp("topics") / "world"
    items = {"item_id": np.arange(len(topic_I)), "title": titles, "picture": pictures.tolist(), "shelf": topic_I}
    taken = [int(rng.choice(warm_of[topic])) for topic in taste]
    train = {"user_id": np.arange(EVENTS), "item_id": taken, "taste": taste, "a": a, "b": b}
    # What else tells the taste: a number and an hour, neither in order; what was seen of late, behind older things.
    order = np.array([2, 0, 4, 1, 3])
    train["size"] = order[taste] + 5 * rng.integers(0, 2, EVENTS) + rng.uniform(0.1, 0.9, EVENTS)
    train["when"] = (rng.integers(19_000, 19_700, EVENTS) * 24 + 4 * order[taste] + rng.integers(0, 4, EVENTS)) * 3600
    old = rng.integers(0, TOPICS, EVENTS)
    train["seen"] = [[int(rng.choice(warm_of[each])) for each in (o, o, o, t)] for o, t in zip(old, taste, strict=True)]
    train["seen_when"] = [[0, 1, 2, 90 * 86_400]] * EVENTS
    train["kept"] = [rng.choice(warm_of[topic], 2).tolist() for topic in taste]
    write_dataset(folder, items=pa.table(items), train=pa.table(train))
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def right(topics, lone_rank) -> Any:
    """Trains towers of these features, and says which share of the ten best of the new items has the user's topic."""

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small: threads would wait for each other most of the time

    def measure(
        user: list[dict[str, Any]], item: list[dict[str, Any]], tables: dict[str, Any] | None = None, **model: Any
    ) -> float:
        from trec_twotower.config.base import validate
        from trec_twotower.config.run_config import RunConfig
        from trec_twotower.inference.model_loader import load_model
        from trec_twotower.model.encode import encode
        from trec_twotower.training.loop import train
        from trec_twotower.training.run_dir import Run

        number = len(list(topics.parent.glob("run-*")))
        values = {
            "data": {"dataset": topics, "batch_size": 64},
            "tables": tables or {},
            "user": user,
            "item": item,
            "model": {"dim": 8, **model},
            "loss": {"temperature": 0.2},
            "train": {"epochs": 4, "optimizer": {"lr": 0.2, "dense_lr": 0.03}},
            "checkpoint": {"every": 1000},
            "run_dir": topics.parent / f"run-{number}",
        }
        run = train(validate(RunConfig, values, "the world"), lone_rank)
        loaded = load_model(Run.open(run), lone_rank, "newest")
        item_CD = encode(loaded.model, "item", loaded.sources.catalogue.columns.slice(WARM, WARM + COLD), lone_rank)
        split = loaded.sources.dataset.train
        rows = split.table(loaded.sources.user_columns())
        user_BD = encode(loaded.model, "user", loaded.sources.user_features(rows, "the test"), lone_rank)
        best = (user_BD @ item_CD.T).topk(COLD // TOPICS, dim=1).indices.numpy()
        taste = split.table(["taste"])["taste"].to_numpy()
        return float(((best + WARM) % TOPICS == taste[:, None]).mean())

    yield measure
    torch.set_num_threads(threads)


ITEM_ID = {"name": "item_id", "kind": "id", "buckets": 512, "dim": 8}


@pytest.fixture(scope="module")
def by_id(right) -> float:
    return right([TASTE], [ITEM_ID])


@pytest.mark.parametrize(
    "about",
    [
        {"name": "title", "kind": "text", "buckets": 512, "dim": 8},
        {"name": "title", "kind": "text", "buckets": 512, "dim": 8, "words": 0, "characters": [3, 3]},
        {"name": "title", "kind": "text", "folder": "model", "tune": "all", "dim": 8, "max_length": 16},
        {"name": "picture", "kind": "vector", "size": TOPICS, "dim": 8},
    ],
    ids=["words", "characters", "language model", "picture"],
)
def test_new_items_are_found_by_what_is_known_of_them(about, topics, right, by_id):
    """An id that was never trained says nothing: a fifth of what it finds is right, by chance."""
    if "folder" in about:
        about = {**about, "folder": str(topics / about["folder"])}
    found = right([TASTE], [about])
    assert by_id < 0.4 and found > 0.8 and found > by_id + 0.5, (by_id, found)


@pytest.mark.parametrize("wide", [(), ("a_and_b",)])
def test_a_cross_knows_what_its_columns_do_not(wide, right):
    """Without layers the sum of two tables cannot tell (a + b) modulo 5; a row for each pair can, also past them."""
    item = [{"name": "title", "kind": "text", "buckets": 512, "dim": 8}]
    alone = [{"name": name, "kind": "category", "buckets": 64, "dim": 8} for name in "ab"]
    pair = {"name": "a_and_b", "kind": "cross", "columns": ["a", "b"], "buckets": 512, "dim": 8}
    apart, crossed = right(alone, item), right([*alone, pair], item, user_tower={"wide": list(wide)})
    assert apart < 0.6 and crossed > 0.9 and crossed > apart + 0.3, (apart, crossed)


SHELF = {"name": "shelf", "kind": "category", "buckets": 64, "dim": 8}
SIZE = {"name": "size", "kind": "number"}
WHEN = {"name": "when", "kind": "time"}
SEEN = {"name": "seen", "kind": "bag", "buckets": 512, "dim": 8}
NOTHING = {"buckets": 1, "dim": 8}  # of ids that say nothing


@pytest.mark.parametrize(
    ("without", "with_it"),
    [
        (SIZE, {**SIZE, "bins": 20, "dim": 8}),
        (SIZE, {**SIZE, "bins": 20, "dim": 8, "soft": True}),
        ({**WHEN, "part": "weekday", "dim": 8}, {**WHEN, "part": "hour", "dim": 8}),
        (SEEN, {**SEEN, "times": "seen_when", "half_life_days": 7}),
    ],
    ids=["bins", "soft bins", "hour", "decay"],
)
def test_a_setting_of_a_feature_knows_what_the_feature_without_it_does_not(without, with_it, right):
    """No line through a number turns back to a taste that has two stretches of it; a weekday says nothing of the hour;
    most of what was seen is old, and only the newest tells.
    """
    plain, found = (right([each], [SHELF]) for each in (without, with_it))
    assert found > 0.85 and found > plain + 0.25, (found, plain)


def test_attributes_of_steps_know_items_whose_ids_say_nothing(right):
    """All ids share one row; what the catalogue says of each step's item still tells what it was."""
    kept = {"name": "kept", "kind": "sequence", "table": "nothing", "max_length": 2}
    plain, found = (
        right([{**kept, "attributes": names}], [SHELF], tables={"nothing": NOTHING}) for names in ([], ["shelf"])
    )
    assert plain < 0.4 and found > 0.85, (found, plain)
