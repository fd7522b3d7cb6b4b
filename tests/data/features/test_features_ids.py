"""Categories with a vocabulary, ids by two hashes, bags that fade, and sizes by rule."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.kinds import build_loss
from tests.ranks.launch import SAID_BY_TORCHREC
from tests.sequences import steps_config, write_steps
from trec_twotower.config.base import validate
from trec_twotower.config.data import DataConfig
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.loading import load_config, read_yaml
from trec_twotower.config.model import TableSpec, auto_dim
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.feature_report import OwnItems, coverage, describe_coverage, own_items
from trec_twotower.data.features.transform import check_files
from trec_twotower.data.features.hash_column import hash_column
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import transform
from trec_twotower.data.features.vocabulary import in_vocabulary, make_vocabulary, read_words, words_of_file
from trec_twotower.data.loading.batch import make_batch
from trec_twotower.data.loading.reader import UnitReader, drop_target_items
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.model.tower_inputs import Pooled, concatenate_features
from trec_twotower.training.loop import train

# Vocabularies


def brand(**changes) -> FeatureSpec:
    return build_feature(
        **{"name": "brand", "kind": "category", "vocabulary": "learned", "buckets": 5, "dim": 4} | changes
    )


WORDS = st.none() | st.sampled_from(["a", "b", "c", "d", "e", "é"])


@settings(max_examples=40)
@given(st.lists(st.lists(WORDS, max_size=6), max_size=4), st.integers(1, 3), st.integers(3, 7))
def test_a_vocabulary_is_what_stands_there_most(parts, least, buckets):
    columns = [pa.array(part, pa.string()) for part in parts]
    columns = [column.dictionary_encode() if number % 2 else column for number, column in enumerate(columns)]
    found = make_vocabulary(brand(min_count=least, buckets=buckets), pa.string(), columns)
    counts = Counter(word for part in parts for word in part if word is not None)
    expected = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if counts[word] >= least]
    assert list(found.words) == expected[: buckets - 2]
    saved = Statistics(**json.loads(json.dumps(vars(found))))  # as a run keeps it
    for column in columns:
        rows = [0 if word is None else 1 if word not in found.words else 2 + found.words.index(word)
                for word in column.to_pylist()]  # fmt: skip
        assert in_vocabulary(column, saved, "here").tolist() == rows


def test_a_vocabulary_file_is_read_line_by_line(tmp_path):
    """Of an editor that begins it with a mark and ends lines its own way; other line ends are part of a word."""
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffred\r\nlight\u2028blue\r\n".encode())
    assert read_words(str(path)) == ["red", "light\u2028blue"]


def test_a_vocabulary_of_integers(tmp_path):
    column = pa.array([2**62, -3, 7, -3, None])
    found = make_vocabulary(brand(), column.type, [column])
    assert found.words == (-3, 7, 2**62)
    assert in_vocabulary(pa.array([7, 8, None, -3]), found, "here").tolist() == [3, 1, 0, 2]
    path = tmp_path / "brands.txt"
    path.write_text("7\n-3\n")
    feature = brand(vocabulary=str(path), buckets=None)
    assert feature.buckets == 4 and feature.own_table.buckets == 4
    assert make_vocabulary(feature, column.type, []).words == (7, -3)
    assert make_vocabulary(feature, pa.string(), []).words == ("7", "-3")
    path.unlink()
    assert build_feature(**feature.model_dump()) == feature  # a run that is opened again needs no file
    path.write_text("7\nseven\n")
    with pytest.raises(ConfigError, match="is not of integers, but column 'brand' is int64"):
        make_vocabulary(feature, column.type, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read ("),
        ("a\nb\na\n", "has 'a' in lines 1 and 3: keep one"),
        ("", "is empty: write one entry per line"),
        ("a\n\nb\n", "is empty in line 2"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_with_the_config(content, message, tmp_path):
    path = tmp_path / "brands.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        words_of_file(brand(vocabulary=str(path), buckets=9))
    if content is None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            brand(vocabulary=str(path), buckets=None)


def test_a_file_with_more_words_than_rows_is_refused(tmp_path):
    path = tmp_path / "brands.txt"
    path.write_text("a\nb\nc\nd\n")
    with pytest.raises(ConfigError, match="has 4 entries, but feature 'brand' has rows for 3: remove buckets, or set"):
        make_vocabulary(brand(vocabulary=str(path)), pa.string(), [])


# Sizes by rule


def test_a_dim_by_rule_is_six_fourth_roots_in_fours():
    assert [auto_dim(buckets) for buckets in (1, 16, 10_000, 65_536, 10**6)] == [8, 12, 60, 96, 192]
    assert all(auto_dim(buckets) % 4 == 0 for buckets in range(1, 500))
    assert all(one <= other for one, other in pairwise(auto_dim(buckets) for buckets in range(1, 500)))
    assert TableSpec(buckets=10_000, dim="auto").dim == 60
    assert build_feature(name="f", kind="id", buckets=10_000, dim="auto").own_table.dim == 60


# Two hashes


def test_two_hashes_are_two_rows_of_one_table():
    """A batch has both, and the tower gets their sum."""
    table = TableSpec(buckets=50, dim=4, hashes=2)
    tags = build_feature(name="tags", kind="bag", table="t", weights="shares", max_length=2)
    item = build_feature(name="item", kind="id", table="t")
    rows = pa.table(
        {"tags": pa.array([[1, 2, 3], [], [2]]), "shares": pa.array([[1.0, 2, 3], [], [4]]), "item": [7, 8, 9]}
    )
    schema = Schema.build({"t": table}, (tags, item), (item,))
    assert schema.layout.pooled_keys == [
        "user:tags",
        "user:tags@2",
        "user:item",
        "user:item@2",
        "item:item",
        "item:item@2",
    ]
    columns = transform(schema.user, schema.tables, {}, rows, "here")
    for name in ("tags", "item"):
        one, two = columns.sparse[name], columns.sparse[f"{name}@2"]
        assert one.offsets.tolist() == two.offsets.tolist() and not np.array_equal(one.values, two.values)
    assert columns.sparse["tags"].weights.tolist() == columns.sparse["tags@2"].weights.tolist() == [2, 3, 4]
    batch = make_batch(schema, columns)
    weight = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    pooled = {}
    for name in schema.layout.pooled_keys[:4]:
        lists = columns.sparse[name.removeprefix("user:")]
        sums = [
            sum(weight[bucket] * (1 if lists.weights is None else float(lists.weights[place]))
                for place, bucket in enumerate(lists.values) if lists.rows[place] == row)
            for row in range(3)
        ]  # fmt: skip
        assert batch.sparse[name].values().tolist() == lists.values.tolist()
        pooled[name] = torch.stack(
            [torch.as_tensor(each) if torch.is_tensor(each) else torch.zeros(2) for each in sums]
        )
    looked_up = Pooled()
    for name, vector in pooled.items():
        looked_up.add(vector, {name: 2})
    found = concatenate_features(schema, looked_up, {"user": (batch.user_divisor_BF, batch.user_number_BN)})["user"]
    both = [pooled["user:tags"] + pooled["user:tags@2"], pooled["user:item"] + pooled["user:item@2"]]
    divisor = torch.tensor([[5.0], [1.0], [4.0]])  # a weighted mean
    assert torch.allclose(found, torch.cat([both[0] / divisor, both[1]], dim=1))


def test_two_hashes_keep_ids_apart_that_one_would_confuse(tmp_path, write_dataset):
    """Of 1000 ids in 500 rows most share one with another, but hardly any share both."""
    ids = np.arange(1000)
    folder = write_dataset(
        tmp_path / "d", items=pa.table({"item_id": ids}), train=pa.table({"user_id": ids, "item_id": ids})
    )
    shares = {}
    for hashes in (1, 2):
        feature = build_feature(name="item_id", kind="id", buckets=500, dim=4, hashes=hashes)
        user = build_feature(name="user_id", kind="id", buckets=9, dim=4)
        of_item = coverage(FeatureDataset(Dataset(folder), Schema.build({}, (user,), (feature,)), "event"))[1]
        assert (of_item.distinct, of_item.buckets, of_item.null) == (1000, 500, 0.0)
        shares[hashes] = of_item.collided
    assert shares[1] == pytest.approx(1 - (1 - 1 / 500) ** 999, abs=0.05) and shares[2] < 0.02


# Bags that fade


@settings(max_examples=40)
@given(st.lists(st.tuples(st.lists(st.integers(0, 10**6), max_size=4).map(sorted), st.none() | st.integers(0, 10**6))))
def test_an_element_weighs_half_for_every_half_life(rows):
    feature = build_feature(name="tags", kind="bag", table="t", times="when", until="now", half_life_days=2.0)
    table = pa.table(
        {
            "tags": pa.array([list(range(len(times))) for times, _ in rows], pa.list_(pa.int64())),
            "when": pa.array([times for times, _ in rows], pa.list_(pa.int64())),
            "now": pa.array([after if after is None else after + 10**6 for _, after in rows], pa.int64()),
        }
    )
    found = transform([feature], {"t": TableSpec(buckets=9, dim=2)}, {}, table, "here").sparse["tags"]
    expected = []
    for times, after in rows:
        end = times[-1] if after is None and times else (after or 0) + 10**6
        expected += [0.5 ** ((end - time) / (2 * 86_400)) for time in times]
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5)


def faded(**columns) -> Schema:
    columns = {"tags": [[1, 2]], "when": [[3, 4]], "now": [5]} | columns
    feature = build_feature(name="tags", kind="bag", table="t", times="when", until="now", half_life_days=2.0)
    return transform([feature], {"t": TableSpec(buckets=9, dim=2)}, {}, pa.table(columns), "here")


def test_times_that_fall_or_lie_ahead_are_refused():
    with pytest.raises(DataError, match="here, column 'tags', row 0: the times in 'when' decrease, but"):
        faded(when=[[4, 3]])
    with pytest.raises(DataError, match=r"row 0: a time in 'when' is after 'now' \(1 rows are so"):
        faded(now=[3])
    with pytest.raises(DataError, match="row 0: 2 ids but 1 values in 'when'"):
        faded(when=[[4]])


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "bag", "table": "t", "times": "when"}, "weights that decay with age need times and half_life_days"),
        ({"kind": "bag", "table": "t", "half_life_days": 2}, "need times and half_life_days"),
        ({"kind": "bag", "table": "t", "until": "now"}, "and until: now: weights that decay"),
        ({"kind": "id", "table": "t", "hashes": 2}, "has hashes: 2, a setting of its table: set it under tables.t"),
        (
            {"kind": "category", "table": "t", "vocabulary": "learned"},
            "of kind 'category' with vocabulary, which has no table: remove it",
        ),
        ({"kind": "category", "buckets": 9, "dim": 2, "min_count": 2}, "of kind 'category', which has no min_count"),
        (
            {"kind": "category", "buckets": 2, "dim": 2, "vocabulary": "learned"},
            "'buckets' is 2: input should be greater than 2",
        ),
        (
            {"kind": "category", "buckets": 10**6, "dim": 2, "vocabulary": "learned"},
            "'buckets' is 1000000: input should be less than or equal to 500000",
        ),
        ({"kind": "category", "dim": "auto"}, "has dim: auto, which is computed from `buckets`"),
    ],
)
def test_settings_that_clash_are_refused(feature, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_feature(name="f", **feature)


def test_tables_that_hash_twice_and_cannot_are_refused():
    with pytest.raises(ValidationError, match="has hashes: 2, but hashing: modulo"):
        TableSpec(buckets=9, dim=4, hashes=2, hashing="modulo")
    steps = build_feature(name="steps", kind="sequence", table="t", max_length=3)
    item = build_feature(name="item_id", kind="id", table="t")
    with pytest.raises(ConfigError, match="Table 't' has hashes: 2, but a sequence looks it up"):
        Schema.build({"t": TableSpec(buckets=9, dim=4, hashes=2)}, (steps,), (item,))
    with pytest.raises(ConfigError, match="has two rows per id, but this returns one"):
        hash_column(item, pa.array([1]), TableSpec(buckets=9, dim=4, hashes=2))


def test_a_vocabulary_is_read_with_a_config_that_is_given_and_not_with_a_saved_one(tmp_path):
    """Also where buckets stand beside it, as they do in a run's own config.yaml, whose words are kept elsewhere."""
    words, config = tmp_path / "words.txt", tmp_path / "c.yaml"

    def mistake(content: str | None, buckets: int) -> str | None:
        words.unlink(missing_ok=True)
        if content is not None:
            words.write_text(content)
        feature = f"{{name: brand, kind: category, vocabulary: {words}, buckets: {buckets}, dim: 4}}"
        item = "{name: item_id, kind: id, buckets: 9, dim: 4}"
        config.write_text(f"data: {{dataset: d}}\nuser: [{feature}]\nitem: [{item}]\n")
        try:
            loaded = load_config(config)
            check_files((*loaded.user, *loaded.item))
        except ConfigError as error:
            return str(error)
        return None

    assert mistake("a\nb\n", 4) is None
    assert f"The vocabulary {words} cannot be read" in mistake(None, 4)
    validate(RunConfig, read_yaml(config), "a run's config.yaml")
    assert "has 'a' in lines 1 and 3: keep one" in mistake("a\nb\na\n", 9)
    assert "has 3 entries, but feature 'brand' has rows for 2: remove buckets, or set" in mistake("a\nb\nc", 4)


# What the data hold


@pytest.fixture
def leaky(tmp_path, write_dataset) -> Path:
    """Three train rows, of which the second has its own item in its history twice; one test row, with a new item."""
    lists = {"history": pa.array([["a"], ["b", "a", None, "b"], None]), "share": pa.array([[1.0], [1.0, 2, 3, 4], []])}
    train = pa.table({"user_id": [1, 2, 3], "item_id": ["b", "b", "a"], "brand": ["x", None, "y"], **lists})
    test = pa.table(
        {"user_id": [1], "item_id": ["a"], "brand": ["z"], "history": pa.array([["b", "c"]]), "share": [[1.0, 1]]}
    )
    return write_dataset(tmp_path / "d", items=pa.table({"item_id": ["a", "b", "c"]}), train=train, test=test)


HISTORY = build_feature(name="history", kind="bag", buckets=1000, dim=4, weights="share")


def test_what_the_data_hold_is_told_by_feature(leaky):
    item = build_feature(name="item_id", kind="id", buckets=1000, dim=4)
    schema = Schema.build(
        {}, (HISTORY, brand(buckets=3), build_feature(name="user_id", kind="id", buckets=1, dim=4)), (item,)
    )
    sources = FeatureDataset(Dataset(leaky), schema, "event")
    history, of_brand, user, of_item = coverage(sources)
    assert (history.null, history.distinct, history.collided, history.new) == (pytest.approx(1 / 3), 2, 0.0, 0.5)
    assert (of_brand.null, of_brand.distinct, of_brand.buckets) == (pytest.approx(1 / 3), 2, 3)
    assert (of_brand.unknown, of_brand.new) == (0.5, 1.0)  # a row for one of x and y alone
    assert (user.used, user.collided, user.new) == (1.0, 1.0, 0.0)
    assert (of_item.distinct, of_item.new) == (2, 1.0)  # c was never taken
    assert own_items(sources) == OwnItems(1, 2, ["history"])
    said = describe_coverage(sources)
    assert (
        "user brand" in said
        and "33.33% of the rows of train/ have their target item" in said
        and "target_in_history: drop" in said
    )


def test_a_history_without_the_rows_own_item(leaky):
    table = Dataset(leaky).train.table(["item_id", "history", "share"])
    found = drop_target_items(table, ["history", "share"], "here", refuses=False)
    assert found["history"].to_pylist() == [["a"], ["a", None], []]
    assert found["share"].to_pylist() == [[1.0], [2.0, 3.0], []]
    with pytest.raises(DataError, match=r"here, row 1: its history holds the item that the row predicts \(as in 1 rows"):
        drop_target_items(table, ["history", "share"], "here", refuses=True)


@pytest.mark.parametrize(("target_in_history", "lengths"), [("keep", [1, 3, 0]), ("drop", [1, 1, 0])])
def test_own_items_are_left_out_where_rows_are_read(leaky, target_in_history, lengths):
    schema = Schema.build({}, (HISTORY,), (build_feature(name="item_id", kind="id", buckets=9, dim=4),))
    sources = FeatureDataset(Dataset(leaky), schema, "event")
    data = DataConfig(dataset=leaky, target_in_history=target_in_history)
    reader = UnitReader(sources, data, build_loss(mask_history=False), 0, 1)
    [group] = sources.dataset.train.row_groups
    assert next(reader._blocks(group, 0, 3))[1].user.sparse["history"].lengths.tolist() == lengths
    refusing = UnitReader(sources, data.model_copy(update={"target_in_history": "error"}), build_loss(), 0, 1)
    with pytest.raises(DataError, match="its history holds the item that the row predicts"):
        next(refusing._blocks(group, 0, 3))
    with pytest.raises(ValidationError, match="the history never holds a target"):
        DataConfig(dataset="d", rows="user", target_in_history="drop")


def test_every_list_of_items_is_looked_through_for_the_rows_own(tmp_path, write_dataset):
    """Clicks share the item id's table, tags do not; what is left of each by hand."""
    train = pa.table(
        {
            "user_id": [1, 1, 2],
            "item_id": ["a", "b", "c"],
            "history": pa.array([["a", "b"], [], ["b"]], pa.list_(pa.string())),
            "clicks": [["b", "a"], ["c", "b", "b"], ["a"]],
            "when": [[5, 6], [1, 2, 3], [7]],
            "tags": [["a"], ["b"], ["c"]],
        }
    )
    users = pa.table({"user_id": [1, 2], "liked": [["a"], ["b"]]})
    items = pa.table({"item_id": ["a", "b", "c"]})
    dataset = Dataset(write_dataset(tmp_path / "d", train=train, users=users, items=items))
    clicks = build_feature(name="clicks", kind="sequence", table="item", max_length=3, times="when")
    tags = build_feature(name="tags", kind="bag", buckets=9, dim=4)
    liked = build_feature(name="liked", kind="bag", table="item")
    tables, item = {"item": TableSpec(buckets=64, dim=4)}, build_feature(name="item_id", kind="id", table="item")
    sources = FeatureDataset(dataset, Schema.build(tables, (clicks, tags), (item,)), "event")
    [group] = dataset.train.row_groups

    def reader(target_in_history: str, sources: FeatureDataset = sources) -> UnitReader:
        return UnitReader(
            sources, DataConfig(dataset=dataset.folder, target_in_history=target_in_history), build_loss(), 0, 1
        )

    kept, left = (next(reader(word)._blocks(group, 0, 3))[1] for word in ("keep", "drop"))
    expected = hash_column(clicks, pa.array([["b"], ["c"], ["a"]]), tables["item"]).to_pylist()
    sparse = left.user.sparse
    assert [part.tolist() for part in np.split(sparse["clicks"].values, sparse["clicks"].offsets[1:-1])] == expected
    assert sparse["clicks@gap"].lengths.tolist() == [1, 1, 1]
    assert sparse["tags"].values.tolist() == kept.user.sparse["tags"].values.tolist()
    assert left.history.lengths.tolist() == [1, 0, 1] and kept.history.lengths.tolist() == [2, 0, 1]
    found = own_items(sources)
    assert found == OwnItems(rows=2, elements=4, columns=["history", "clicks"])
    assert found.describe.startswith(
        "data.target_in_history: drop removes 4 elements from history, clicks, in 2 rows of train/"
    )
    with pytest.raises(DataError, match="row 0: its history holds the item that the row predicts"):
        next(reader("error")._blocks(group, 0, 3))
    with pytest.raises(DataError, match=r"row 0: its clicks holds the item that the row predicts \(as in 2 rows"):
        drop_target_items(dataset.train.table(["item_id", "clicks", "when"]), ["clicks", "when"], "here", refuses=True)
    with_liked = FeatureDataset(dataset, Schema.build(tables, (clicks, tags, liked), (item,)), "event")
    with pytest.raises(ConfigError, match=r"user feature 'liked' reads lists of items in .*users, which has one list for all"):
        reader("drop", with_liked)
    assert "in their history or clicks" in describe_coverage(with_liked)
    reader("keep", with_liked)


@pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
def test_a_run_says_how_many_elements_it_left_out(tmp_path, lone_rank, capsys):
    """In words when it begins and when it goes on, and in its status; counted in the rows by hand."""
    world = write_steps(tmp_path / "world")
    rows = Dataset(world).train.table(["item_id", "history"]).to_pylist()
    counts = [row["history"].count(row["item_id"]) for row in rows]
    elements, having = sum(counts), sum(map(bool, counts))
    assert elements > having > 3
    for epochs in (1, 2):
        config = {"data": {"target_in_history": "drop"}, "train": {"epochs": epochs}}
        train(steps_config(world, tmp_path / "run", **config), lone_rank)
        assert f"drop removes {elements} elements from history, in {having} rows" in capsys.readouterr().out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["own_items"] == {"rows": having, "elements": elements, "columns": ["history"]}


def test_collisions_are_those_of_the_rows_that_are_looked_up(tmp_path, write_dataset):
    """Categories leave the first row to null: what collides is told of the rows behind it."""
    words = [f"word-{number}" for number in range(40)]
    items = pa.table({"item_id": list(range(40)), "colour": words})
    train = pa.table({"user_id": [1] * 40, "item_id": list(range(40))})
    folder = write_dataset(tmp_path / "d", items=items, train=train)
    colour = build_feature(name="colour", kind="category", buckets=30, dim=4)
    user = build_feature(name="user_id", kind="id", buckets=9, dim=4)
    sources = FeatureDataset(Dataset(folder), Schema.build({}, (user,), (colour,)), "event")
    row = transform([colour], {"colour": colour.own_table}, {}, items, "here").sparse["colour"].values
    shared = sum(np.count_nonzero(row == each) > 1 for each in row)
    assert coverage(sources)[1].collided == pytest.approx(shared / 40)


def test_a_drawn_history_is_the_same_items_by_both_hashes(tmp_path, write_dataset):
    """With a row a user, what is input is drawn anew: of both rows of an id or of none."""
    items = list(range(30))
    train = pa.table({"user_id": [1, 2], "positives": [items[:20], items[10:]]})
    folder = write_dataset(tmp_path / "d", items=pa.table({"item_id": items}), train=train)
    table = TableSpec(buckets=1 << 20, dim=4, hashes=2)
    history = build_feature(name="history", kind="bag", table="t")
    item = build_feature(name="item_id", kind="id", table="t")
    sources = FeatureDataset(Dataset(folder), Schema.build({"t": table}, (history,), (item,)), "user")
    reader = UnitReader(sources, DataConfig(dataset=folder, rows="user"), build_loss(), 0, 1)
    [group] = sources.dataset.train.row_groups
    rows = reader._split_inputs(next(reader._blocks(group, 0, 2))[1], 0, 0)
    of_item = sources.catalogue.columns.sparse
    for name in ("history", "history@2"):
        drawn = rows.user.sparse[name]
        row_of = {bucket: row for row, bucket in enumerate(of_item[name.replace("history", "item_id")].values.tolist())}
        found = [[row_of[bucket] for bucket in drawn.slice(row, row + 1).values.tolist()] for row in range(2)]
        for row, taken in enumerate((items[:20], items[10:])):
            asked = rows.positives.slice(row, row + 1).values.tolist()
            assert found[row] and sorted(found[row] + asked) == taken
