"""The file of all users has for each what `recommend --user` answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.features.test_features_serving import same
from trec_twotower.config.features import build_feature
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.serving import all_users
from trec_twotower.serving.all_users import find_newest_rows, write_all
from trec_twotower.serving.retriever import Retriever
from trec_twotower.serving.user_state import find_user, newest_state, newest_states, state_columns
from trec_twotower.storage.atomic import replacing

ROUNDING = 1e-6  # of scores up to 1: a batch is multiplied in another order than one user, also on other ranks


def rows_of(path: Path) -> dict[Any, tuple[list[Any], list[float]]]:
    table = pq.read_table(path)
    assert table.column_names == ["user_id", "item_ids", "scores"]
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    rows = {row["user_id"]: (row["item_ids"], row["scores"]) for row in table.to_pylist()}
    assert len(rows) == len(table)  # one row per user
    return rows


@pytest.fixture(scope="module")
def retriever(shop) -> Retriever:
    return Retriever.alone(shop.run)


def check_equal(found: dict[Any, tuple[list[Any], list[float]]], answers: list[Any]) -> None:
    """Every answer of `recommend` is in the file, with its items in order and its scores."""
    assert found.keys() == {answer.user_id for answer in answers}
    for answer in answers:
        item_ids, scores = found[answer.user_id]
        assert item_ids == [item.item_id for item in answer.items]
        np.testing.assert_allclose(scores, [item.score for item in answer.items], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("batch_users", [7, 16384])
def test_all_users_get_what_each_gets_alone(retriever, shop_tables, tmp_path, monkeypatch, batch_users):
    monkeypatch.setattr(all_users, "BATCH_USERS", batch_users)
    monkeypatch.setattr(all_users, "BLOCK_ROWS", 11)
    reports: list[tuple[int, int]] = []
    out = tmp_path / "new" / "all.parquet"
    num_users = write_all(retriever, out, 9, progress=lambda *report: reports.append(report))
    users = shop_tables["test"]["user_id"].to_pylist()
    assert num_users == len(users) == 80
    check_equal(rows_of(out), retriever.recommend(users, 9))
    assert reports == [
        (min(done, 80), 80) for done in range(min(batch_users, 80), 80 + min(batch_users, 80), batch_users)
    ]
    groups = pq.read_metadata(out)
    assert max(groups.row_group(number).num_rows for number in range(groups.num_row_groups)) == min(batch_users, 80)


def test_a_filter_holds_for_all_users(retriever, shop_tables, tmp_path):
    allowed = retriever.allow(where={"colour": ["red"]}, without=["red-3"])
    write_all(retriever, tmp_path / "red.parquet", 10, allowed=allowed)
    found = rows_of(tmp_path / "red.parquet")
    check_equal(found, retriever.recommend(shop_tables["test"]["user_id"].to_pylist(), 10, allowed=allowed))
    lengths = {len(item_ids) for item_ids, _ in found.values()}
    # Nine red items are allowed. Lovers of red have four of ten left, or three where red-3 is one of the four.
    assert lengths == {3, 4, 9}
    assert {item for item_ids, _ in found.values() for item in item_ids} == {f"red-{n}" for n in range(10) if n != 3}


def test_the_command_writes_the_file_once(cli, shop, shop_tables, tmp_path):
    out = tmp_path / "all.parquet"
    said = cli("recommend", shop.run, "--all", "--out", out, "--k", "3")
    assert (said.code, said.err) == (0, "80 of 80 users\n")
    assert said.out == f"{out}: recommendations for 80 users, up to 3 items each\n"
    first = out.read_bytes()
    said = cli("recommend", shop.run, "--all", "--out", out)
    assert said.code == 2 and "exists already" in said.mistake and "--overwrite" in said.mistake
    assert out.read_bytes() == first
    assert cli("recommend", shop.run, "--all", "--out", out, "--overwrite", "--where", "colour=blue").code == 0
    assert all(item.startswith("blue") for item_ids, _ in rows_of(out).values() for item in item_ids)
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]


@pytest.mark.timeout(200)
def test_two_ranks_write_one_file(cli, on_forked_ranks, shop, tmp_path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert cli("recommend", shop.run, "--all", "--out", one).code == 0
    said = on_forked_ranks("recommend", shop.run, "--all", "--out", two)
    assert said.code == 0, said.err
    expected, found = rows_of(one), rows_of(two)
    assert list(expected) == list(found)
    for user, (item_ids, scores) in expected.items():
        assert found[user][0] == item_ids
        np.testing.assert_allclose(found[user][1], scores, rtol=0, atol=ROUNDING)


def test_a_stopped_command_leaves_the_old_file(retriever, tmp_path, monkeypatch):
    out = tmp_path / "all.parquet"
    out.write_text("before")
    monkeypatch.setattr(all_users, "BATCH_USERS", 50)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_all(retriever, out, 3, overwrite=True, progress=stop)
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def test_an_error_of_the_disk_names_the_file_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="no space") as raised, replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError(28, "no space")
    assert raised.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the newest rows

ITEMS = pa.table({"item_id": list("abcdefgh")})
TRAIN = pa.table(
    {
        "user_id": pa.array([1, 2, 1, 4, 2, 3, None, 3], pa.int32()),
        "item_id": ["b", "a", "c", "a", "b", "d", "a", "e"],
        "history": [["a"], ["h"], ["a", "b"], None, ["h", "a"], [], ["b"], ["d", None]],
    }
)
VALID = pa.table({"user_id": [2, 1], "positives": [["c", None, "e"], ["d"]], "history": [["h", "a", "b"], list("abc")]})
TEST = pa.table({"user_id": [1, 5], "positives": [["e", "gone"], None], "history": [["a", "b", "c", "d"], ["f"]]})


@pytest.fixture
def sources(write_dataset, tmp_path) -> FeatureDataset:
    parts = {"train": [TRAIN.slice(0, 5), TRAIN.slice(5)], "valid": VALID, "test": TEST, "items": ITEMS}
    folder = write_dataset(tmp_path / "d", row_group_size=2, **parts)
    bag = build_feature(name="history", kind="bag", max_length=4, buckets=64, dim=4)
    item = build_feature(name="item_id", kind="id", buckets=64, dim=4)
    return FeatureDataset(Dataset(folder), Schema.build({}, (bag,), (item,)), "event")


@pytest.mark.parametrize("batch_users", [1, 2, 100])
def test_the_newest_row_of_each_user_is_that_of_a_single_user(sources, batch_users):
    found: dict[int, pa.Table] = {}
    for part in find_newest_rows(sources):
        for table in part.batches(list(part.split.columns), batch_users):
            assert 1 <= len(table) <= batch_users
            for row in range(len(table)):
                user = table["user_id"][row].as_py()
                assert user not in found
                found[user] = table.slice(row, 1)
    assert sorted(found) == [1, 2, 3, 4, 5]
    for user, row in found.items():
        assert row.to_pylist() == find_user(sources, user)[0].to_pylist()


def test_the_states_of_many_users_are_those_of_each(sources):
    """Histories that are null, hold nulls or unknown items; positives of every number."""
    count = 0
    for part in find_newest_rows(sources):
        for table in part.batches(state_columns(sources, part.split), 100):
            features, seen = newest_states(sources, table, part.split)
            for row, user in enumerate(table["user_id"].to_pylist()):
                alone = newest_state(sources, user)
                same(features.take(np.array([row])), alone.features)
                assert seen.take(np.array([row])).values.tolist() == alone.seen.values.tolist()
                count += 1
    assert count == 5


def test_many_users_of_a_row_per_user_have_their_positives(write_dataset, tmp_path):
    bag = build_feature(name="history", kind="bag", buckets=64, dim=4)
    item = build_feature(name="item_id", kind="id", buckets=64, dim=4)
    train = pa.table({"user_id": [1, 2, 3], "positives": [["a", "b"], ["c"], ["d", None, "e"]]})
    folder = write_dataset(tmp_path / "d", train=train, items=ITEMS)
    found = FeatureDataset(Dataset(folder), Schema.build({}, (bag,), (item,)), "user")
    [part] = find_newest_rows(found)
    [table] = part.batches(state_columns(found, part.split), 100)
    features, seen = newest_states(found, table, part.split)
    for row, user in enumerate((1, 2, 3)):
        alone = newest_state(found, user)
        same(features.take(np.array([row])), alone.features)
        assert seen.take(np.array([row])).values.tolist() == alone.seen.values.tolist()


def test_seen_keys_are_found_whatever_their_order():
    rng = np.random.default_rng(0)
    known, reference = all_users._KeySet(), set()
    for size in (5, 1, 300, 2, 2, 50, 700):
        keys = np.unique(rng.integers(-500, 500, size))
        is_known = known.contain(keys)
        assert is_known.tolist() == [int(key) in reference for key in keys]
        known.add(keys[~is_known])
        reference |= set(keys.tolist())
    assert sum(map(len, known._runs)) == len(reference)


def test_the_user_ids_have_the_type_of_all_parts(sources):
    schema = all_users._schema(sources, find_newest_rows(sources))
    assert schema.field("user_id").type == pa.int64()  # train/ has int32
