"""What training reads of a row is what serving makes of the same user, given as a dict: for every kind of feature."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kinds import FEATURE_KINDS, build_loss
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.loading.reader import UnitReader
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.serving.user_state import state_table

ITEMS = [f"item-{number}" for number in range(6)]
TABLES = {"item": TableSpec(buckets=64, dim=4), "twice": TableSpec(buckets=32, dim=4, hashes=2)}
OF_STEPS = {"times": "history_times", "actions": "history_actions", "attributes": ("colour",)}
USER = tuple(
    build_feature(**feature)
    for feature in (
        {"name": "user_id", "kind": "id", "table": "twice"},
        {"name": "country", "kind": "category", "buckets": 9, "dim": 4},
        {"name": "known", "column": "country", "kind": "category", "vocabulary": "learned", "buckets": 4, "dim": 4},
        {"name": "tags", "kind": "bag", "table": "twice", "weights": "shares", "max_length": 2, "pooling": "sqrtn"},
        {"name": "recent", "column": "history", "kind": "bag", "buckets": 16, "dim": 4, "times": "history_times",
         "until": "timestamp", "half_life_days": 3.0},
        {"name": "steps", "column": "history", "kind": "sequence", "table": "item", "max_length": 2, **OF_STEPS},
        {"name": "spent", "kind": "number", "normalize": "quantile", "nan": "missing", "default": 1.0},
        {"name": "bins", "column": "spent", "kind": "number", "bins": 3, "soft": True, "dim": 4, "nan": "missing"},
        {"name": "spent_waves", "column": "spent", "kind": "number", "frequencies": 2, "dim": 4, "nan": "missing"},
        {"name": "pair", "kind": "cross", "columns": ("country", "device"), "buckets": 50, "dim": 4},
        {"name": "hour", "column": "timestamp", "kind": "time", "part": "hour", "zone": "Europe/Oslo", "dim": 4},
        {"name": "since", "column": "last", "kind": "time", "part": "age", "until": "timestamp", "normalize": "log1p"},
        {"name": "query", "kind": "text", "buckets": 99, "dim": 4, "words": 2, "characters": (2, 3), "max_length": 3},
        {"name": "taste", "kind": "vector", "size": 2, "dim": 4, "unit_length": True, "nan": "missing"},
    )
)  # fmt: skip
STATIC = tuple(
    build_feature(**feature)
    for feature in (
        {"name": "city", "kind": "category", "vocabulary": "learned", "buckets": 4, "dim": 4},
        {"name": "age", "kind": "number", "normalize": "quantile"},
        {"name": "likes", "kind": "bag", "table": "twice", "pooling": "sum"},
        {"name": "where_and_how", "kind": "cross", "columns": ("city", "plan"), "buckets": 50, "dim": 4},
        {"name": "face", "kind": "vector", "size": 2, "dim": 4},
    )
)
LEARNED = [f"user:{feature.name}" for feature in (*USER, *STATIC) if feature.learns_from_data]
COLOUR = {"name": "colour", "kind": "category", "buckets": 9, "dim": 4}
ITEM = tuple(build_feature(**each) for each in ({"name": "item_id", "kind": "id", "table": "item"}, COLOUR))
SCHEMA = Schema.build(TABLES, USER, ITEM)
WITH_STATIC = Schema.build(TABLES, (*USER, *STATIC), ITEM)
OF_USERS = {
    "user_id": pa.int64(),
    "city": pa.string(),
    "plan": pa.int32(),
    "age": pa.float64(),
    "likes": pa.list_(pa.string()),
    "face": pa.list_(pa.float32(), 2),
}
TYPES = {
    "user_id": pa.int64(),
    "item_id": pa.string(),
    "country": pa.string(),
    "device": pa.int32(),
    "tags": pa.list_(pa.string()),
    "shares": pa.list_(pa.float32()),
    "history": pa.list_(pa.string()),
    "history_times": pa.list_(pa.int64()),
    "history_actions": pa.list_(pa.string()),
    "spent": pa.float64(),
    "timestamp": pa.timestamp("us", "UTC"),
    "last": pa.int64(),
    "query": pa.string(),
    "taste": pa.list_(pa.float32(), 2),
}


def test_all_kinds_are_here():
    assert {feature.kind for feature in USER} == set(FEATURE_KINDS)


@st.composite
def users(draw: Any) -> dict[str, Any]:
    def some(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | values)

    history = draw(st.lists(st.sampled_from([*ITEMS, "gone"]), max_size=4))
    tags = draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=3))
    times = st.lists(st.integers(10**9, 10**9 + 10**6), min_size=len(history), max_size=len(history))
    number = st.floats(allow_nan=True, width=32)
    return {
        "user_id": draw(st.integers(-(2**63), 2**63 - 1)),
        "item_id": draw(st.sampled_from(ITEMS)),
        "country": some(st.sampled_from(["NO", "SE", "FI", "DK", "Ö"])),
        "device": some(st.integers(0, 3)),
        "tags": tags or some(st.just([])),
        "shares": [0.5 + place for place in range(len(tags))],
        "history": history,
        "history_times": sorted(draw(times)),
        "history_actions": [draw(st.sampled_from(["view", "buy"])) for _ in history],
        "spent": some(number),
        "timestamp": draw(st.datetimes(datetime(2002, 1, 1), datetime(2030, 1, 1))).replace(tzinfo=UTC),
        "last": some(st.integers(0, 2**31)),
        "query": some(st.text(max_size=12)),
        "taste": some(st.lists(number, min_size=2, max_size=2)),
    }


@st.composite
def profiles(draw: Any) -> dict[str, Any]:
    """A row of users/, less its id."""
    number = st.floats(-100, 100, width=32)
    return {
        "city": draw(st.none() | st.sampled_from(["Oslo", "Bergen", "Hamar", "Moss"])),
        "plan": draw(st.none() | st.integers(0, 3)),
        "age": draw(st.none() | number),
        "likes": draw(st.none() | st.lists(st.sampled_from(["a", "b", "c"]), max_size=3)),
        "face": draw(st.none() | st.lists(number, min_size=2, max_size=2)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_dataset) -> Path:
    items = pa.table({"item_id": ITEMS, "colour": ["red", "blue", None, "red", "green", "blue"]})
    return write_dataset(tmp_path_factory.mktemp("serving") / "d", items=items, train=pa.table({"user_id": [1]}))


def same(one: Columns, other: Columns) -> None:
    assert one.sparse.keys() == other.sparse.keys() and one.numbers.keys() == other.numbers.keys()
    for name, lists in one.sparse.items():
        there = other.sparse[name]
        for part in ("offsets", "values", "weights"):
            np.testing.assert_array_equal(getattr(lists, part), getattr(there, part), err_msg=f"{part} of {name}")
    for name, number in one.numbers.items():
        np.testing.assert_array_equal(number, other.numbers[name], err_msg=name)


def rewrite(folder: Path, **parts: tuple[list[dict[str, Any]], dict[str, pa.DataType]]) -> None:
    """Other rows for some parts of a dataset; users/ goes where it is not among them."""
    for name in {"users", *parts}:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name, (rows, kinds) in parts.items():
        (folder / name).mkdir()
        table = pa.table({column: pa.array([row[column] for row in rows], kind) for column, kind in kinds.items()})
        pq.write_table(table, folder / name / "part-0.parquet")


@settings(max_examples=20)
@given(st.lists(users(), min_size=1, max_size=3))
def test_a_row_that_is_trained_on_is_the_same_user_served(folder, rows):
    """Statistics and vocabularies are learned from the rows; serving takes them as the run has kept them."""
    rewrite(folder, train=(rows, TYPES))
    trained = FeatureDataset(Dataset(folder), SCHEMA, "event")
    reader = UnitReader(trained, DataConfig(dataset=folder), build_loss(), 0, 1)
    [group] = trained.dataset.train.row_groups
    read = next(reader._blocks(group, 0, len(rows)))[1].user
    assert set(read.sparse) | set(read.numbers) >= {feature.name for feature in USER}
    served = FeatureDataset(Dataset(folder), SCHEMA, "event", trained.statistics)
    columns = served.user_columns()
    for number, row in enumerate(rows):
        state = {name: row[name] for name in columns if row[name] is not None}
        asked = served.user_features(state_table(served, state, "the state"), "the state")
        same(read.take(np.array([number])), asked)


@settings(max_examples=10)
@given(st.lists(users(), min_size=1, max_size=3), st.lists(profiles(), min_size=4, max_size=4), st.data())
def test_what_users_says_of_a_user_may_be_given_or_is_looked_up(folder, rows, about, data):
    """As training reads the user: of one whom users/ knows, of one whom it does not, and of one who has moved."""
    ids = {row["user_id"]: {"user_id": row["user_id"], **about[number]} for number, row in enumerate(rows)}
    rewrite(folder, train=(rows, TYPES), users=(list(ids.values()), OF_USERS))
    trained = FeatureDataset(Dataset(folder), WITH_STATIC, "event")
    row = data.draw(st.sampled_from(rows))
    state = {name: row[name] for name in trained.user_columns()}
    profile = {name: value for name, value in ids[row["user_id"]].items() if name != "user_id"}
    expected = read_as_trained(trained, rows.index(row))
    same(expected, asked(trained, state))
    same(expected, asked(trained, {**state, **profile}))
    # Some columns given at request time, the others as users/ has them.
    new = {name: about[3][name] for name in data.draw(st.sets(st.sampled_from(sorted(profile)), min_size=1))}
    moved = asked(trained, {**state, **new})
    # The same user in a users/ that does not know him; what is then not said is null.
    stranger = {"user_id": row["user_id"] ^ 1, **dict.fromkeys(profile)}
    rewrite(folder, train=(rows, TYPES), users=([stranger], OF_USERS))
    elsewhere = FeatureDataset(Dataset(folder), WITH_STATIC, "event", trained.statistics)
    same(expected, asked(elsewhere, {**state, **profile}))
    unknown = asked(elsewhere, {**state, **new})
    # Both as training reads it where users/ says so itself.
    for found, base in ((moved, profile), (unknown, dict.fromkeys(profile))):
        rewrite(folder, train=(rows, TYPES), users=([{"user_id": key, **base, **new} for key in ids], OF_USERS))
        there = FeatureDataset(Dataset(folder), WITH_STATIC, "event", trained.statistics)
        same(read_as_trained(there, rows.index(row)), found)


def read_as_trained(sources: FeatureDataset, number: int) -> Columns:
    reader = UnitReader(sources, DataConfig(dataset=sources.dataset.folder), build_loss(), 0, 1)
    [group] = sources.dataset.train.row_groups
    return next(reader._blocks(group, 0, group.num_rows))[1].user.take(np.array([number]))


def asked(sources: FeatureDataset, state: dict[str, Any]) -> Columns:
    return sources.state_features(state_table(sources, state, "the state"), "the state")


def test_a_state_that_does_not_fit_is_refused_in_words(folder):
    row = dict.fromkeys(TYPES) | {"user_id": 7, "item_id": ITEMS[0]}
    profile = dict.fromkeys(OF_USERS) | {"user_id": 7}
    rewrite(folder, train=([row], TYPES), users=([profile], OF_USERS))
    sources = FeatureDataset(Dataset(folder), WITH_STATIC, "event", {name: Statistics() for name in LEARNED})
    for state in ({"user_id": 2**64}, {"user_id": -(2**63) - 1}, {"device": 2**31}, {"plan": 2**31}, {"city": 3}):
        with pytest.raises(DataError, match="the state does not have the types of"):
            state_table(sources, state, "the state")
    with pytest.raises(ConfigError, match=r"the state has a column 'cty', which no user feature reads.*'city'"):
        state_table(sources, {"cty": "Oslo"}, "the state")
    with pytest.raises(DataError, match="null"):  # the id is a feature here
        asked(sources, {"city": "Oslo"})
