"""Every kind of feature goes all the way: trained, resumed and exported by one rank and two, asked for an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.ranks.bazaar import ITEM, NUM_ITEMS, TITLES, USER, bazaar_config, losses_of, work, write_bazaar
from tests.ranks.launch import SAID_BY_TORCHREC
from trec_twotower.errors import DataError

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID_BY_TORCHREC]


@pytest.fixture(scope="module")
def bazaar(tmp_path_factory) -> Path:
    return write_bazaar(tmp_path_factory.mktemp("bazaar") / "world")


@pytest.fixture(scope="module")
def one(bazaar, lone_rank) -> tuple[dict[str, Any], Path]:
    """What one rank made, and its run."""
    run = bazaar.parent / "one"
    return work(bazaar, run, lone_rank), run


def test_two_ranks_make_of_every_kind_what_one_makes(bazaar, one, forked):
    """The losses of all steps, before and after the resume, and the vectors of all items and users."""
    out = bazaar.parent / "two"
    out.mkdir()
    code, said = forked(2, "tests.ranks.bazaar", bazaar, out)
    assert code == 0, said
    first, second = one[0], json.loads((out / "results.json").read_text())
    assert len(first["losses"]) == 12 and first["item_ids"] == second["item_ids"]
    for name in ("losses", "items", "users"):
        np.testing.assert_allclose(first[name], second[name], rtol=2e-5, atol=2e-6)


def test_a_resumed_run_is_one_that_never_stopped(bazaar, one, lone_rank):
    from trec_twotower.training.loop import train

    whole = bazaar.parent / "whole"
    train(bazaar_config(bazaar, whole), lone_rank)
    assert losses_of(whole) == one[0]["losses"]


@pytest.fixture(scope="module")
def retriever(one, lone_rank, cli):
    from trec_twotower.serving.retriever import Retriever

    said = cli("index", one[1])
    assert said.code == 0, said.err
    return Retriever.open(one[1], lone_rank, "newest")


def test_every_kind_is_evaluated_and_recommended(one, retriever, lone_rank):
    from trec_twotower.evaluation.evaluator import evaluate_run

    assert "through the index" in evaluate_run(retriever.loaded.run, lone_rank, checkpoint="newest", through_index=True)
    (answer,) = retriever.recommend([103], k=3)
    assert len({item.item_id for item in answer.items}) == 3
    assert len(one[0]["items"]) == NUM_ITEMS


def test_a_user_given_as_a_dict_gets_what_the_same_row_gets(bazaar, retriever):
    state = newest(bazaar, 103, retriever.loaded.sources.user_columns())
    assert retriever.recommend_now([state], k=4) == retriever.recommend([103], k=4)


def newest(bazaar: Path, user: int, columns: list[str]) -> dict[str, Any]:
    """The user's row of test/ with its own item, at its own time, at the end of the history."""
    (row,) = pq.read_table(bazaar / "test", filters=[("user_id", "==", user)]).to_pylist()
    history, times = [*row["history"], row["item_id"]], [*row["history_times"], row["timestamp"]]
    return {
        name: value for name, value in (row | {"history": history, "history_times": times}).items() if name in columns
    }


def test_a_state_may_be_of_a_user_whom_users_does_not_know(bazaar, retriever):
    """Where his age is given he gets what the one gets who has it in users/, id or none; without it what null gets."""
    about = pq.read_table(bazaar / "users").to_pylist()
    user = next(row for row in about if row["age"] is not None and row["age"] < 40)
    state = newest(bazaar, user["user_id"], retriever.loaded.sources.user_columns())
    [known] = retriever.recommend([user["user_id"]], k=4)
    older, nothing = ({**state, "age": value} for value in (99, None))
    nobody = {name: value for name, value in state.items() if name != "user_id"}
    strangers = [{**state, "user_id": 7, "age": user["age"]}, *({**nobody, "age": each} for each in (user["age"], 99))]
    answers = retriever.recommend_now([*strangers, nobody, older, nothing], k=4)
    assert [answer.items for answer in answers[:2]] == [known.items] * 2
    assert answers[2].items == answers[4].items != known.items
    assert answers[3].items == answers[5].items != known.items
    with pytest.raises(DataError, match="state 0 does not have the types of"):
        retriever.recommend_now([{"user_id": 2**70}])


def test_features_tells_of_every_kind(one, cli):
    said = cli("features", one[1] / "config.yaml")
    assert said.code == 0, said.err
    told = {line.split()[1] for line in said.out.splitlines() if line.startswith(("user ", "item "))}
    assert told == {feature["name"] for feature in [*USER, *ITEM]} | set(TITLES)


def test_statistics_are_learned_once_and_not_from_what_is_asked_for(bazaar, one, lone_rank, monkeypatch):
    """A run that is opened again reads what it has learned; no column is looked through anew."""
    from trec_twotower.data.feature_dataset import FeatureDataset
    from trec_twotower.training.run_dir import Run

    def never(*_: Any) -> None:
        raise AssertionError("learned again")

    begun = Run.open(one[1]).open_dataset(lone_rank).statistics
    monkeypatch.setattr(FeatureDataset, "learn", never)
    assert Run.open(one[1]).open_dataset(lone_rank).statistics == begun
    assert len(begun["user:spent"].points) > 2 and begun["user:spent"].high == 80
