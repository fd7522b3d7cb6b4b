"""Numbers in the data that no float32 training survives are named, rather than the learning rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

FEATURES: dict[str, Any] = {
    "user": [{"name": "history", "kind": "bag", "table": "item", "weights": "w", "pooling": "sum"}],
    "item": [
        {"name": "item_id", "kind": "id", "table": "item"},
        {"name": "size", "kind": "number", "normalize": "none"},
        {"name": "image", "kind": "vector", "size": 2},
        {"name": "price", "kind": "number", "normalize": "none"},
    ],
}


@pytest.fixture
def train(tmp_path, write_dataset, cli):
    """Trains on 32 rows with these weights in their histories, these prices and these images; gives what was said."""

    def run(weight: float = 1.0, price: float = 1.0, image: float = 1.0, ranks=None):
        ids = [n % 8 for n in range(32)]
        folder = write_dataset(
            tmp_path / "data",
            train=pa.table({"user_id": ids, "item_id": ids, "history": [[each] for each in ids], "w": [[weight]] * 32}),
            items=pa.table(
                {"item_id": list(range(8)), "size": [1.0] * 8, "price": [price] * 8,
                 "image": pa.array([[image, 1.0]] * 8, pa.list_(pa.float32()))}),
        )  # fmt: skip
        config = Path(tmp_path / "config.yaml")
        config.write_text(json.dumps({
            "data": {"dataset": str(folder), "batch_size": 8, "threads": 0},
            "tables": {"item": {"buckets": 16, "dim": 8}}, **FEATURES, "model": {"dim": 8, "similarity": "dot"},
            "train": {"epochs": 3, "precision": "fp32"}, "run_dir": str(tmp_path / "run"),
        }))  # fmt: skip
        return (ranks or cli)("train", config)

    return run


@pytest.mark.parametrize(
    ("values", "suspect"),
    [
        ({"price": 1e30}, "numbers of the item feature 'price' reach 1e+30"),
        ({"image": 3e38}, "numbers of the item feature 'image' reach 3e+38"),
        ({"weight": 1e30}, "weights of the user feature 'history' reach 1e+30"),
    ],
)
def test_values_that_are_too_large_are_named_when_the_loss_is_not_finite(train, values, suspect):
    said = train(**values)
    assert said.code == 1
    assert f"the {suspect}: scale such values down in the data" in said.mistake
    assert "train.optimizer.lr" not in said.mistake and "'size'" not in said.mistake


def test_ranks_that_hold_no_such_value_name_it_too(train, on_forked_ranks):
    said = train(price=1e30, ranks=on_forked_ranks)
    assert said.code == 1 and "numbers of the item feature 'price' reach 1e+30" in said.err
