"""`init` writes a config that fits a dataset: every column becomes a feature, or a comment with the reason."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from trec_twotower.config.loading import load_config
from trec_twotower.data.starter_config import starter_config
from trec_twotower.errors import DataError

ROWS = 300


def features_of(config, side):
    return {each.name: each.model_dump(exclude_defaults=True, exclude={"name"}) for each in getattr(config, side)}


@pytest.fixture
def odd_shop(tmp_path, write_dataset):
    """Columns of every type; expected features follow from the values by hand."""
    numbers = range(ROWS)
    items = pa.table(
        {
            "item_id": list(numbers),
            "title": [f"Model {number} of a chair" for number in numbers],
            "sku": [f"SKU-{number:05}" for number in numbers],
            "colour": [("red", "green", "blue")[number % 3] for number in numbers],
            "size": [number % 5 for number in numbers],
            "stock": [number * 7 for number in numbers],
            "balance": [number - 100.5 for number in numbers],
            "labels": [[f"l{number % 20}", "sale"] for number in numbers],
            "embedding": pa.array([[0.5, 1.0, 2.0]] * ROWS, pa.list_(pa.float32())),
            "released": pa.array([datetime.date(2026, 1, 1)] * ROWS),
            "nothing": pa.nulls(ROWS, pa.string()),
            "brand_id": [1000 + number for number in numbers],
            "gap": [float("nan") if number % 7 == 0 else float(number) for number in numbers],
            "uneven": [[0.5] * (1 + number % 2) for number in numbers],
            "parts": [[{"a": 1}] for _ in numbers],
            "is_new": [number % 2 == 0 for number in numbers],
            "null": ["x" if number % 2 else "y" for number in numbers],
            "maker.name": ["x" if number % 2 else "y" for number in numbers],
            "item": [("big", "small")[number % 2] for number in numbers],
            "country": [("NO", "SE")[number % 2] for number in numbers],
        }
    )
    train = pa.table(
        {
            "user_id": [number % 50 for number in numbers],
            "item_id": list(numbers),
            "history": [[number, (number + 1) % ROWS] for number in numbers],
            "timestamp": list(numbers),
            "history_rating": [[1.0, 2.0]] * ROWS,
            "hour of day": [number % 24 for number in numbers],
            "shown": [[number, 7] for number in numbers],
        }
    )
    users = pa.table({"user_id": list(range(50)), "country": ["NO", "SE"] * 25})
    return write_dataset(tmp_path / "odd", train=train, items=items, users=users)


def test_each_column_becomes_a_feature_by_its_type_and_values(odd_shop, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(text := starter_config(odd_shop))
    config = load_config(path)
    assert features_of(config, "item") == {
        "item_id": {"table": "item_ids"},
        "title": {"buckets": 65536, "dim": 32},
        "colour": {"buckets": 64, "dim": 8},
        "size": {"buckets": 128, "dim": 8},
        "stock": {"normalize": "log1p"},
        "balance": {"normalize": "log1p"},
        "labels": {"buckets": 512, "dim": 8},
        "embedding": {"size": 3},
        "brand_id": {"buckets": 8192, "dim": 16},
        "gap": {"normalize": "log1p", "nan": "missing"},
        "null": {"buckets": 32, "dim": 8},
        "maker_name": {"column": "maker.name", "buckets": 32, "dim": 8},
        "item": {"buckets": 32, "dim": 8},
        "item_country": {"column": "country", "buckets": 32, "dim": 8},
    }
    assert list(features_of(config, "user")) == ["history", "hour of day", "country"]
    for column, why in {
        "sku": "nearly every row",
        "released": "a time",
        "nothing": "all values are null",
        "uneven": "vectors of several",
        "parts": "no feature reads list",
        "is_new": "no feature reads bool",
        "shown": "a list: add it",
    }.items():
        assert f"  # {column}: {why}" in text
    assert '"hour of day", kind: category, buckets: 512, dim: 8}  # must be known before the interaction' in text
    assert config.data.dataset == str(odd_shop) and config.tables["item_ids"].buckets == 8192


def test_the_config_of_every_type_of_column_trains(odd_shop, cli, tmp_path):
    path = tmp_path / "odd.yaml"
    assert cli("init", odd_shop, "--out", path).code == 0
    said = cli("train", path, f"run_dir={tmp_path / 'run'}", "train.epochs=1", "loss.negatives.sampled=20")
    assert said.code == 0, said.err


def test_a_table_of_few_rows_has_a_batch_that_fits(tmp_path, write_dataset, cli):
    rows = pa.table({"user_id": ["a", "b", "a"], "item_id": [1, 2, 3]})
    folder = write_dataset(tmp_path / "few", train=rows, items=pa.table({"item_id": [1, 2, 3]}))
    assert cli("init", folder, "--out", tmp_path / "few.yaml").code == 0
    assert load_config(tmp_path / "few.yaml").data.batch_size == 3
    said = cli("train", tmp_path / "few.yaml", f"run_dir={tmp_path / 'run'}", "train.epochs=1")
    assert said.code == 0, said.err


def test_without_histories_users_are_known_by_their_id(tmp_path, write_dataset):
    rows = pa.table({"user_id": ["a", "b", "a"], "item_id": [1, 2, 3]})
    folder = write_dataset(tmp_path / "plain", train=rows, items=pa.table({"item_id": [1, 2, 3]}))
    (tmp_path / "plain.yaml").write_text(starter_config(folder))
    config = load_config(tmp_path / "plain.yaml")
    assert (
        [each.kind for each in config.user] == ["id"]
        and config.evaluate.k == (1,)
        and config.evaluate.best == "recall@1"
    )


def test_a_row_per_user_has_a_history_of_its_own_items(tmp_path, write_dataset):
    rows = pa.table({"user_id": ["a", "b"], "positives": [[1, 2], [2, 3]]})
    folder = write_dataset(tmp_path / "users", train=rows, items=pa.table({"item_id": [1, 2, 3]}))
    (tmp_path / "users.yaml").write_text(starter_config(folder))
    config = load_config(tmp_path / "users.yaml")
    assert config.data.rows == "user" and [each.name for each in config.user] == ["history"]


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="is no dataset"):
        starter_config(tmp_path)


@pytest.mark.timeout(300)
def test_the_config_trains_and_a_second_init_is_refused(shop, cli, tmp_path):
    path, run = tmp_path / "first.yaml", tmp_path / "run"
    said = cli("init", shop.dataset, "--out", path)
    assert said.code == 0 and f"trec-twotower train {path}" in said.out, said.err
    said = cli("train", path, f"run_dir={run}", "train.epochs=1")
    assert said.code == 0, said.err
    assert (run / "status.json").is_file()
    before = path.read_text()
    said = cli("init", shop.dataset, "--out", path)
    assert said.code == 2 and "exists" in said.mistake and path.read_text() == before
    assert cli("init", shop.dataset, "--out", path, "--overwrite").code == 0
