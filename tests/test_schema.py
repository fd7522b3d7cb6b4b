"""Features and tables: what fits together is resolved, what clashes is refused with the names in the message."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from trec_twotower.errors import ConfigError
from trec_twotower.schema import FeatureSpec, Schema, TableSpec, key

ITEM = TableSpec(buckets=100, dim=8)
HISTORY = FeatureSpec(name="history", kind="bag", table="item")
ITEM_ID = FeatureSpec(name="item_id", kind="id", table="item")


def test_features_share_a_table_or_bring_their_own():
    country = FeatureSpec(name="country", kind="category", buckets=64, dim=3)
    age = FeatureSpec(name="age", kind="number")
    schema = Schema.build({"item": ITEM}, (age, HISTORY, country), (ITEM_ID,))
    assert dict(schema.tables) == {"item": ITEM, "country": TableSpec(buckets=64, dim=3)}
    assert schema.table_of(HISTORY) is schema.table_of(ITEM_ID)
    assert schema.keys() == ["user:history", "user:country", "item:item_id"]
    assert schema.width("user") == 8 + 3 + 2  # a number and its indicator
    assert schema.width("item") == 8
    assert schema.numbers("user") == [age] and schema.numbers("item") == []
    assert not schema.is_weighted


def test_one_name_on_both_sides_makes_two_keys_over_one_table():
    tags = FeatureSpec(name="tags", kind="bag", table="tag", weights="tag_weights")
    schema = Schema.build({"tag": ITEM}, (tags,), (tags,))
    assert schema.keys() == [key("user", tags), key("item", tags)] == ["user:tags", "item:tags"]
    assert schema.is_weighted


def test_a_feature_reads_the_column_of_its_name_unless_told_otherwise():
    assert HISTORY.reads == "history"
    assert FeatureSpec(name="home", kind="id", table="country", column="country").reads == "country"


def test_weights_start_within_one_over_the_root_of_the_dim():
    assert TableSpec(buckets=1, dim=16).start_scale == 0.25
    assert TableSpec(buckets=1, dim=16, init_scale=0.1).start_scale == 0.1


OWN = {"buckets": 10, "dim": 4}


@pytest.mark.parametrize(
    ("tables", "user", "item", "message"),
    [
        ({"item": ITEM}, [], [ITEM_ID], "The user tower has no features"),
        ({"item": ITEM}, [HISTORY], [], "The item tower has no features"),
        ({}, [HISTORY], [ITEM_ID], "user feature 'history' looks up table 'item', which is not under `tables`"),
        ({"items": ITEM}, [HISTORY], [ITEM_ID], "(nearest: 'items')"),
        ({"item": ITEM}, [HISTORY, HISTORY], [ITEM_ID], "Two user features are named 'history'"),
        (
            {"item": ITEM},
            [FeatureSpec(name="item", kind="id", **OWN)],
            [ITEM_ID],
            "user feature 'item' would make a table 'item', which exists already",
        ),
        (
            {},
            [FeatureSpec(name="tag", kind="bag", **OWN)],
            [FeatureSpec(name="tag", kind="bag", **OWN)],
            "item feature 'tag' would make a table 'tag', which exists already: share it with table: tag",
        ),
        ({"item": ITEM, "idle": ITEM}, [HISTORY], [ITEM_ID], "Table 'idle' is declared under `tables` but no feature"),
    ],
)
def test_what_clashes_is_refused_by_name(tables, user, item, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Schema.build(tables, tuple(user), tuple(item))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "id", "table": "t", "buckets": 5}, "names table 't' and also gives buckets or dim"),
        ({"kind": "id", "table": "t", "dim": 5}, "names table 't' and also gives buckets or dim"),
        ({"kind": "id"}, "needs `table` (one declared under tables), or both `buckets` and `dim`"),
        ({"kind": "bag", "buckets": 5}, "needs `table` (one declared under tables), or both `buckets` and `dim`"),
        ({"kind": "number", "table": "t"}, "is a number, which has no table: remove that"),
        ({"kind": "number", "buckets": 5, "dim": 5}, "is a number, which has no buckets, dim: remove that"),
        ({"kind": "number", "max_length": 5}, "is a number, which has no max_length"),
        ({"kind": "id", "table": "t", "max_length": 5}, "of kind 'id'; max_length and weights belong to a bag"),
        ({"kind": "category", "table": "t", "weights": "w"}, "of kind 'category'; max_length and weights belong"),
    ],
)
def test_a_feature_takes_only_what_its_kind_has(feature, message):
    with pytest.raises(ValidationError, match=rf"'f'.*{re.escape(message)}"):
        FeatureSpec(name="f", **feature)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        ITEM.dim = 9
