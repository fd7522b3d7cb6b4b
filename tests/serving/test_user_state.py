"""Serving knows a user as of after the newest row: its history with its own positives at the end."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.features.test_features_serving import same
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.hash_column import hash_column
from trec_twotower.serving.user_state import newest_state, with_interactions

ITEM = build_feature(name="item_id", kind="id", buckets=64, dim=4)
IDS = pa.array(["x", "y"])


def feature(**settings: Any) -> FeatureSpec:
    return build_feature(
        **{"name": "history", "kind": "sequence", "max_length": 9, "buckets": 64, "dim": 4, **settings}
    )


def rows_of(feature: FeatureSpec, lists: pa.Array) -> pa.Array:
    """Return the table rows of all elements."""
    return hash_column(feature, lists).flatten()


def utc(second: float) -> datetime:
    return datetime.fromtimestamp(second, UTC)


# ---------------------------------------------------------------- columns aligned with the history

STAMPS = pa.list_(pa.timestamp("us", "UTC"))
ALIGNED: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[Any]]] = {
    "times: the row's timestamp": (
        {"times": "history_times"},
        {"history_times": [10, 20], "timestamp": 25},
        "history_times",
        [10, 20, 25, 25],
    ),
    "times: a timestamp of another unit": (
        {"times": "history_times"},
        {"history_times": pa.array([[10, 20]], pa.list_(pa.float64())), "timestamp": utc(25.5)},
        "history_times",
        [10, 20, 25.5, 25.5],
    ),
    "times: a number beside timestamps": (
        {"times": "history_times"},
        {"history_times": pa.array([[utc(10), utc(20)]], STAMPS), "timestamp": 25},
        "history_times",
        [utc(10), utc(20), utc(25), utc(25)],
    ),
    "times: milliseconds beside a timestamp": (
        {"times": "history_times", "unit": "ms"},
        {"history_times": [10_000, 20_000], "timestamp": utc(25.5)},
        "history_times",
        [10_000, 20_000, 25_500, 25_500],
    ),
    "times: a number is in milliseconds as well": (
        {"times": "history_times", "unit": "ms"},
        {"history_times": [10_000, 20_000], "timestamp": 25_500},
        "history_times",
        [10_000, 20_000, 25_500, 25_500],
    ),
    "times: nanoseconds do not fall": (
        {"times": "history_times"},
        {
            "history_times": pa.array([[1_700_000_000_123_456_789]], pa.list_(pa.timestamp("ns"))),
            "timestamp": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        },
        "history_times",
        [datetime(2023, 11, 14, 22, 13, 20, 123456)] * 3,  # to the microsecond, in which times are compared
    ),
    "times: a date": (
        {"times": "history_times"},
        {"history_times": [10, 20], "timestamp": datetime(1970, 1, 2).date()},
        "history_times",
        [10, 20, 86400, 86400],
    ),
    "times: never before the newest interaction": (
        {"times": "history_times"},
        {"history_times": [10, 20], "timestamp": 15},
        "history_times",
        [10, 20, 20, 20],
    ),
    "times: none in the row": (
        {"times": "history_times"},
        {"history_times": [10, 20]},
        "history_times",
        [10, 20, 20, 20],
    ),
    "times: null in the row": (
        {"times": "history_times"},
        {"history_times": [10, 20], "timestamp": pa.array([None], pa.int64())},
        "history_times",
        [10, 20, 20, 20],
    ),
    "times: the column that the bag looks back from": (
        {"kind": "bag", "max_length": None, "times": "history_times", "until": "now", "half_life_days": 1.0},
        {"history_times": [10, 20], "now": 30, "timestamp": 99},
        "history_times",
        [10, 20, 30, 30],
    ),
    "weights: the row's own": (
        {"kind": "bag", "max_length": None, "weights": "history_dwell"},
        {"history_dwell": [1.0, 2.0], "dwell": 7.5},
        "history_dwell",
        [1.0, 2.0, 7.5, 7.5],
    ),
    "weights: the mean": (
        {"kind": "bag", "max_length": None, "weights": "dwell"},
        {"dwell": [1.0, 4.0]},
        "dwell",
        [1.0, 4.0, 2.5, 2.5],
    ),
    "weights: decimals": (
        {"kind": "bag", "max_length": None, "weights": "dwell"},
        {"dwell": pa.array([[Decimal("1.00"), Decimal("2.50")]], pa.list_(pa.decimal128(5, 2)))},
        "dwell",
        [Decimal("1.00"), Decimal("2.50"), Decimal("1.75"), Decimal("1.75")],
    ),
    "actions: the row's own": (
        {"actions": "history_actions"},
        {"history_actions": ["view", "buy"], "action": "rent"},
        "history_actions",
        ["view", "buy", "rent", "rent"],
    ),
    "actions: the newest": (
        {"actions": "history_actions"},
        {"history_actions": ["view", "buy"]},
        "history_actions",
        ["view", "buy", "buy", "buy"],
    ),
    "actions: one of another type is not meant": (
        {"actions": "history_actions"},
        {"history_actions": ["view", "buy"], "actions": 3},
        "history_actions",
        ["view", "buy", "buy", "buy"],
    ),
}


def row_of(history: Any, **columns: Any) -> pa.Table:
    arrays = {name: value if isinstance(value, pa.Array) else pa.array([value]) for name, value in columns.items()}
    return pa.table({"user_id": [1], "history": history, **arrays})


@pytest.mark.parametrize("case", ALIGNED)
def test_an_aligned_column_is_given_a_value_for_each_appended_item(case):
    settings, columns, name, expected = ALIGNED[case]
    length = len(expected) - 2
    row = row_of(pa.array([["a", "b"][:length]]), **columns)
    longer = with_interactions(row, IDS, [feature(**settings)])
    assert longer["history"].to_pylist() == [[*["a", "b"][:length], "x", "y"]]
    found = longer[name].combine_chunks().flatten()
    if pa.types.is_timestamp(found.type) and found.type.unit == "ns":
        found = found.cast(pa.timestamp("us"), safe=False)
    assert found.to_pylist() == expected
    untouched = {*row.column_names} - {"history", name}
    assert all(longer[each].equals(row[each]) for each in untouched)


def test_the_first_interactions_of_a_user_have_values_too():
    spec = feature(times="history_times", actions="history_actions")
    empty = {
        "history_times": pa.array([[]], pa.list_(pa.int64())),
        "history_actions": pa.array([None], pa.list_(pa.string())),
    }
    longer = with_interactions(row_of(pa.array([None], pa.list_(pa.string())), **empty), IDS, [spec])
    assert longer["history"].to_pylist() == [["x", "y"]] and longer["history_times"].to_pylist() == [[0, 0]]
    assert longer["history_actions"].to_pylist() == [[None, None]]  # as a category, null has a table row
    weighted = row_of(pa.array([[]], pa.list_(pa.string())), dwell=pa.array([[]], pa.list_(pa.float32())))
    assert with_interactions(weighted, IDS, [feature(kind="bag", max_length=None, weights="dwell")])[
        "dwell"
    ].to_pylist() == [[1.0, 1.0]]


def test_dictionaries_and_large_lists_are_extended():
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(["a", "b"]))
    history = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), words)
    large = pa.array([["view", "buy"]], pa.large_list(pa.large_string()))
    longer = with_interactions(row_of(history, acts=large), IDS, [feature(actions="acts")])
    assert longer["history"].to_pylist() == [["a", "b", "x", "y"]]
    assert longer["acts"].to_pylist() == [["view", "buy", "buy", "buy"]]


# ---------------------------------------------------------------- states of a dataset


def sources(folder: Path, *user: FeatureSpec, rows: str = "event") -> FeatureDataset:
    return FeatureDataset(Dataset(folder), Schema.build({}, user, (ITEM,)), rows)


def items_of(found: FeatureDataset, row_lists: Any) -> list[str]:
    return found.catalogue.ids.take(pa.array(row_lists.values)).to_pylist()


ITEMS = pa.table({"item_id": list("abcdefgh")})
TRAIN = pa.table(
    {
        "user_id": [1, 1, 2, 2, 3],
        "item_id": ["b", "c", "a", "b", "d"],
        "history": [["a"], ["a", "b"], ["h"], ["h", "a"], []],
        "timestamp": [2, 3, 2, 3, 9],
        "history_times": [[1], [1, 2], [1], [1, 2], []],
    }
)
VALID = pa.table(
    {"user_id": [1, 2], "positives": [["d"], ["c", "e"]], "history": [["a", "b", "c"], ["h", "a", "b"]],
     "timestamp": [4, 4], "history_times": [[1, 2, 3], [1, 2, 3]]}
)  # fmt: skip
TEST = pa.table(
    {"user_id": [1], "positives": [["e", "gone"]], "history": [["a", "b", "c", "d"]], "timestamp": [5],
     "history_times": [[1, 2, 3, 4]]}
)  # fmt: skip
SPEC = feature(times="history_times", max_length=4)
TIME = build_feature(name="hour", column="timestamp", kind="time", part="hour", dim=4)


@pytest.mark.parametrize(
    ("user", "history", "times", "seen"),
    [
        (1, ["a", "b", "c", "d", "e", "gone"], [1, 2, 3, 4, 5, 5], "abcde"),  # of test/; "gone" is in no catalogue
        (2, ["h", "a", "b", "c", "e"], [1, 2, 3, 4, 4], "habce"),  # of valid/
        (3, ["d"], [9], "d"),  # of train/ alone
    ],
)
def test_the_newest_state_has_the_held_out_interactions(write_dataset, tmp_path, user, history, times, seen):
    """The features are those of a row that was written with the whole history."""
    folder = write_dataset(tmp_path / "d", train=TRAIN, valid=VALID, test=TEST, items=ITEMS)
    found = sources(folder, SPEC, TIME)
    state = newest_state(found, user)
    assert items_of(found, state.seen) == list(seen)
    row = next(t for t in (TEST, VALID, TRAIN) if user in t["user_id"].to_pylist()).filter(
        pa.compute.field("user_id") == user
    )
    written = pa.table(
        {
            "user_id": [user],
            "history": [history],
            "history_times": [times],
            "timestamp": row["timestamp"].slice(len(row) - 1),
        }
    )
    same(state.features, found.user_features(written, "a row"))


def test_a_dataset_without_held_out_rows_serves_the_newest_train_row(write_dataset, tmp_path):
    found = sources(write_dataset(tmp_path / "d", train=TRAIN, items=ITEMS), SPEC)
    assert items_of(found, newest_state(found, 1).seen) == list("abc")
    assert items_of(found, newest_state(found, 2).seen) == list("hab")


def test_the_row_of_serving_counts_first(write_dataset, tmp_path):
    """A part of whole histories, for datasets of which nothing is held out."""
    serving = TEST.drop_columns(["positives"]).append_column("positives", pa.array([[]], pa.list_(pa.string())))
    found = sources(write_dataset(tmp_path / "d", train=TRAIN, serving=serving, items=ITEMS), SPEC, TIME)
    state = newest_state(found, 1)
    assert items_of(found, state.seen) == list("abcd")
    same(state.features, found.user_features(serving, "a row"))
    assert items_of(found, newest_state(found, 2).seen) == list("hab")  # who has no row there


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_per_user_has_all_positives_in_its_state(write_dataset, tmp_path, split):
    bag = build_feature(name="history", kind="bag", buckets=64, dim=4)
    train = pa.table({"user_id": [1, 2], "positives": [["a", "b"], ["c"]]})
    test = pa.table({"user_id": [1], "positives": [["d"]], "history": [["a", "b"]]})
    parts = {"train": train, "items": ITEMS} | ({"test": test} if split == "test" else {})
    found = sources(write_dataset(tmp_path / "d", **parts), bag, rows="user")
    state = newest_state(found, "1")
    expected = list("ab") + ["d"] * (split == "test")
    assert items_of(found, state.seen) == expected
    np.testing.assert_array_equal(state.features.sparse["history"].values, rows_of(bag, pa.array([expected])))


def test_features_of_other_lists_keep_the_row_as_it_is(write_dataset, tmp_path):
    """`clicks` shares its times with the history, which alone is extended."""
    clicks = {"clicks": [["b"], ["b", "c"], ["c"], ["c", "c"], []]}
    train = TRAIN.append_column("clicks", pa.array(clicks["clicks"]))
    other = build_feature(name="clicks", kind="sequence", max_length=9, buckets=64, dim=4, times="history_times")
    found = sources(write_dataset(tmp_path / "d", train=train, items=ITEMS), SPEC, other)
    state = newest_state(found, 1)
    np.testing.assert_array_equal(state.features.sparse["clicks"].values, rows_of(other, pa.array([["b", "c"]])))
    np.testing.assert_array_equal(state.features.sparse["history"].values, rows_of(SPEC, pa.array([list("abc")])))


def test_a_tower_without_history_still_leaves_out_seen_items(write_dataset, tmp_path):
    user = build_feature(name="user_id", kind="id", buckets=8, dim=4)
    drop = ["history", "history_times"]
    tables = {"train": TRAIN.drop_columns(drop), "test": TEST.drop_columns(drop), "items": ITEMS}
    found = sources(write_dataset(tmp_path / "d", **tables), user)
    assert items_of(found, newest_state(found, 1).seen) == ["e"]
    assert items_of(found, newest_state(found, 2).seen) == ["b"]
