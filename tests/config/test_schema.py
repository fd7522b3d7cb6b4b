"""Features and tables: what fits together is resolved, what clashes is refused with the names in the message."""

from __future__ import annotations

import re
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
import xxhash
from pydantic import ValidationError
from torch import nn

from tests.kinds import build_loss
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import ModelConfig, TableSpec
from trec_twotower.config.schema import Schema, lookup_key
from trec_twotower.data.features.hash_column import hash_column
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.model.tower import encoder_name
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.hashing import mix

ITEM = TableSpec(buckets=100, dim=8)
HISTORY = build_feature(name="history", kind="bag", table="item")
ITEM_ID = build_feature(name="item_id", kind="id", table="item")


def test_features_share_a_table_or_bring_their_own():
    country = build_feature(name="country", kind="category", buckets=64, dim=12)
    age = build_feature(name="age", kind="number")
    schema = Schema.build({"item": ITEM}, (age, HISTORY, country), (ITEM_ID,))
    assert dict(schema.tables) == {"item": ITEM, "country": TableSpec(buckets=64, dim=12)}
    assert schema.table_of(HISTORY) is schema.table_of(ITEM_ID)
    assert schema.layout.pooled_keys == ["user:history", "user:country", "item:item_id"]
    assert schema.layout.input_width("user") == 8 + 12 + 2  # a number and its indicator
    assert schema.layout.input_width("item") == 8
    assert schema.layout.plain_numbers("user") == [age] and schema.layout.plain_numbers("item") == []
    assert not schema.layout.is_weighted


def test_one_name_on_both_sides_makes_two_keys_over_one_table():
    tags = build_feature(name="tags", kind="bag", table="tag", weights="tag_weights")
    schema = Schema.build({"tag": ITEM}, (tags,), (tags,))
    assert (
        schema.layout.pooled_keys == [lookup_key("user", tags), lookup_key("item", tags)] == ["user:tags", "item:tags"]
    )
    assert schema.layout.is_weighted


def test_a_feature_reads_the_column_of_its_name_unless_told_otherwise():
    assert HISTORY.source_column == "history"
    assert build_feature(name="home", kind="id", table="country", column="country").source_column == "country"


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
            [build_feature(name="item", kind="id", **OWN)],
            [ITEM_ID],
            "user feature 'item' would make a table 'item', which exists already",
        ),
        (
            {},
            [build_feature(name="tag", kind="bag", **OWN)],
            [build_feature(name="tag", kind="bag", **OWN)],
            "item feature 'tag' would make a table 'tag', which exists already: share it with table: tag",
        ),
        (
            {"item": TableSpec(buckets=100, dim=6)},
            [HISTORY],
            [ITEM_ID],
            "Table 'item' has dim 6, but the kernels read a table's rows in steps of 4 numbers: set dim to 4 or 8.",
        ),
        (
            {"item": ITEM},
            [HISTORY, build_feature(name="age", kind="number", bins=3, dim=3)],
            [ITEM_ID],
            "Feature 'age' has a table of its own, which has dim 3, but the kernels read a table's rows in steps of 4 "
            "numbers: set dim to 4.",
        ),
        (
            {"a.b": ITEM, "item": ITEM},
            [build_feature(name="x", kind="id", table="a.b")],
            [ITEM_ID],
            "Table 'a.b' cannot have that name, because torch keeps tables by name",
        ),
        (
            {"item": ITEM},
            [HISTORY],
            [ITEM_ID, build_feature(name="type", kind="category", **OWN)],
            "Feature 'type' has a table of its own, which cannot have that name, because torch keeps tables by name, "
            "without dots, next to attributes of its own: rename the feature, and set column: type.",
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
        ({"kind": "number", "table": "t"}, "is of kind 'number', which has no table: remove it"),
        ({"kind": "number", "buckets": 5, "dim": 5}, "is of kind 'number', which has no buckets: remove it"),
        ({"kind": "number", "max_length": 5}, "is of kind 'number', which has no max_length"),
        ({"kind": "id", "table": "t", "max_length": 5}, "of kind 'id', which has no max_length"),
        ({"kind": "category", "table": "t", "weights": "w"}, "of kind 'category', which has no weights"),
    ],
)
def test_a_feature_takes_only_what_its_kind_has(feature, message):
    with pytest.raises(ConfigError, match=rf"'f'.*{re.escape(message)}"):
        build_feature(name="f", **feature)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        ITEM.dim = 9


# Hashing offline


def test_a_feature_hashes_a_column_as_training_does():
    """Against the definition of the hash, value by value: nulls, dictionaries, cut lists and a shared table."""
    user = build_feature(name="user_id", kind="id", buckets=1000, dim=4)
    assert hash_column(user, pa.array([5, -7, 5])).to_pylist() == [slow_bucket(key, 1000) for key in (5, -7, 5)]
    country = build_feature(name="country", kind="category", buckets=64, dim=4)
    words = pa.array(["NO", None, "SE"])
    keys = [xxhash.xxh3_64_intdigest(word) for word in (b"NO", b"SE")]
    expected = [1 + slow_bucket(keys[0], 63), 0, 1 + slow_bucket(keys[1], 63)]
    assert (
        hash_column(country, words).to_pylist()
        == hash_column(country, words.dictionary_encode()).to_pylist()
        == expected
    )
    history = build_feature(name="history", kind="bag", table="item", max_length=2, weights="shares")
    seeded = TableSpec(buckets=50, dim=8, seed=3)
    found = hash_column(history, pa.array([[1, 2, None, 3], None, [], [4]]), seeded).to_pylist()
    assert found == [[slow_bucket(2, 50, 3), slow_bucket(3, 50, 3)], [], [], [slow_bucket(4, 50, 3)]]


def slow_bucket(key: int, num_buckets: int, seed: int = 0) -> int:
    return (mix(key % 2**64 ^ mix(seed)) >> 32) * num_buckets >> 32


@pytest.mark.parametrize(
    ("feature", "table", "word"),
    [
        (build_feature(name="age", kind="number"), None, "is a number"),
        (HISTORY, None, "names table 'item': give its"),
        (build_feature(name="user_id", kind="id", buckets=9, dim=4), ITEM, "has a table of its own"),
    ],
)
def test_a_feature_that_cannot_be_hashed_says_why(feature, table, word):
    with pytest.raises(ConfigError, match=word):
        hash_column(feature, pa.array([1]), table)


def test_hashing_a_column_of_another_kind_names_what_is_needed():
    with pytest.raises(DataError, match="lists of integers or strings"):
        hash_column(HISTORY, pa.array([1.5]), ITEM)


def test_every_name_that_torch_has_for_itself_is_refused_for_a_table():
    """What torch's ModuleDict says: it refuses to keep anything under a name that it has as an attribute.

    Asked in a process of its own: libraries that other tests load give modules more attributes.
    """
    words = "from torch import nn; print(*[name for name in dir(nn.ModuleDict()) if not name.startswith('_')])"
    names = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout.split()
    assert "items" in names and "forward" in names
    for name in names:
        with pytest.raises(KeyError):
            nn.ModuleDict()[name] = nn.Identity()
        with pytest.raises(ConfigError, match=f"Table '{name}' cannot have that name"):
            feature = build_feature(name="x", kind="id", table=name)
            Schema.build({name: ITEM}, (feature,), (feature,))


def test_a_whole_table_on_every_rank_may_have_any_dim():
    tables = {"item": ITEM, "t": TableSpec(buckets=9, dim=6, sharding="data_parallel")}
    schema = Schema.build(tables, (HISTORY, build_feature(name="country", kind="id", table="t")), (ITEM_ID,))
    assert schema.layout.part_widths("user") == (8, 6)


@pytest.mark.parametrize("name", ["items", "values", "type", "pop", "keys", "training"])
def test_a_feature_with_layers_of_its_own_may_have_any_name_without_dot(name):
    """The tower keeps its encoder beside those names of torch's."""
    past = build_feature(name=name, kind="sequence", table="item", max_length=3)
    image = build_feature(name=name, kind="vector", size=3)
    schema = Schema.build({"item": ITEM}, (past,), (ITEM_ID, image))
    model = TwoTower(schema, ModelConfig(dim=4), build_loss(), Ranks(0, 1, torch.device("cpu")))
    for tower in (model.user_tower, model.item_tower):
        [encoder] = tower.encoders.values()
        assert tower.encoders[encoder_name(name)] is encoder
    number = torch.arange(8.0).reshape(2, 4)
    assert model.item_tower.encode(name, number).equal(number[:, :3] * (number[:, 3:] <= 0))
    with pytest.raises(ConfigError, match=r"'a.b': has a dot in its name.* name it 'a_b', and set column: c"):
        build_feature(name="a.b", kind="number", column="c")


@pytest.mark.parametrize("tune", [0, -1, True, 1.5, "some"])
def test_what_cannot_be_tuned_is_refused_with_the_choice(tune):
    values = {"name": "title", "kind": "text", "folder": "m", "dim": 4, "tune": tune}
    with pytest.raises(ConfigError, match=rf"'tune' is {tune!r}: input should be frozen, all, or the number of"):
        build_feature(**values)


def test_a_cross_of_a_column_with_itself_is_refused():
    with pytest.raises(ConfigError, match=r"'c': crosses columns \['country', 'device', 'country'\]: name different"):
        build_feature(name="c", kind="cross", columns=("country", "device", "country"), buckets=9, dim=4)
