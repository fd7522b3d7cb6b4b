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

from trec_twotower.config import DataConfig, LossConfig
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.features import Sources
from trec_twotower.data.reader import UnitReader
from trec_twotower.data.transforms import Columns
from trec_twotower.schema import SETTINGS, FeatureSpec, Schema, TableSpec
from trec_twotower.serve import state_table

ITEMS = [f"item-{number}" for number in range(6)]
TABLES = {"item": TableSpec(buckets=64, dim=4), "twice": TableSpec(buckets=32, dim=4, hashes=2)}
OF_STEPS = {"times": "history_times", "actions": "history_actions", "attributes": ("colour",)}
USER = tuple(
    FeatureSpec(**feature)
    for feature in (
        {"name": "user_id", "kind": "id", "table": "twice"},
        {"name": "country", "kind": "category", "buckets": 9, "dim": 4},
        {"name": "known", "column": "country", "kind": "category", "vocabulary": "learned", "buckets": 4, "dim": 4},
        {"name": "tags", "kind": "bag", "table": "twice", "weights": "shares", "max_length": 2, "pooling": "sqrtn"},
        {"name": "recent", "column": "history", "kind": "bag", "buckets": 16, "dim": 4, "times": "history_times",
         "until": "timestamp", "half_life_days": 3.0},
        {"name": "steps", "column": "history", "kind": "sequence", "table": "item", "max_length": 2, **OF_STEPS},
        {"name": "spent", "kind": "number", "normalise": "quantile", "nan": "missing", "default": 1.0},
        {"name": "bins", "column": "spent", "kind": "number", "bins": 3, "soft": True, "dim": 4, "nan": "missing"},
        {"name": "spent_waves", "column": "spent", "kind": "number", "frequencies": 2, "dim": 4, "nan": "missing"},
        {"name": "pair", "kind": "cross", "columns": ("country", "device"), "buckets": 50, "dim": 4},
        {"name": "hour", "column": "timestamp", "kind": "time", "part": "hour", "zone": "Europe/Oslo", "dim": 4},
        {"name": "since", "column": "last", "kind": "time", "part": "age", "until": "timestamp", "normalise": "log1p"},
        {"name": "query", "kind": "text", "buckets": 99, "dim": 4, "words": 2, "characters": (2, 3), "max_length": 3},
        {"name": "taste", "kind": "vector", "size": 2, "dim": 4, "unit_length": True, "nan": "missing"},
    )
)  # fmt: skip
COLOUR = {"name": "colour", "kind": "category", "buckets": 9, "dim": 4}
ITEM = tuple(FeatureSpec(**each) for each in ({"name": "item_id", "kind": "id", "table": "item"}, COLOUR))
SCHEMA = Schema.build(TABLES, USER, ITEM)
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
    assert {feature.kind for feature in USER} == set(SETTINGS)


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


@settings(max_examples=20)
@given(st.lists(users(), min_size=1, max_size=3))
def test_a_row_that_is_trained_on_is_the_same_user_served(folder, rows):
    """Statistics and vocabularies are learned from the rows; serving takes them as the run has kept them."""
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in TYPES.items()})
    pq.write_table(table, folder / "train" / "part-0.parquet")
    trained = Sources(Dataset(folder), SCHEMA, "event")
    reader = UnitReader(trained, DataConfig(dataset=folder), LossConfig(), 0, 1)
    [group] = trained.dataset.train.row_groups
    read = next(reader._blocks(group, 0, len(rows)))[1].user
    assert set(read.sparse) | set(read.numbers) >= {feature.name for feature in USER}
    served = Sources(Dataset(folder), SCHEMA, "event", trained.statistics)
    columns = served.user_columns()
    for number, row in enumerate(rows):
        state = {name: row[name] for name in columns if row[name] is not None}
        asked = served.user_features(state_table(served, state, "the state"), "the state")
        same(read.take(np.array([number])), asked)
