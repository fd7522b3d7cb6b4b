"""A small world of ordered histories, and configs that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.base import validate
from trec_twotower.config.run_config import RunConfig

NUM_ITEMS, NUM_ROWS = 23, 90
LISTS = {"history": pa.list_(pa.int64()), "when": pa.list_(pa.int64()), "did": pa.list_(pa.string())}
TOWERS: dict[str, dict[str, Any]] = {
    "sum": {"combine": "sum"},
    "short": {"short_term": ["history"]},
    "gating": {"gating": {"reduction": 1}, "mlp": [8]},
    "gating by": {"gating": {"by": ["liked"]}},
    "crosses": {"crosses": 2},
    "experts": {"experts": {"count": 3, "width": 8}},
    "experts of few": {"experts": {"count": 3, "width": 8, "top_k": 1, "balance": 0.5}},
    "missing": {"missing_vectors": ["history", "liked"]},
    "all": {"crosses": 1, "short_term": ["history"], "gating": {}, "experts": {"count": 2, "width": 8}, "mlp": [8]},
}


SGD = {"epochs": 1, "log_every": 1, "optimizer": {"sparse": "sgd", "lr": 0.5}}
USERS: dict[str, dict[str, Any]] = {  # whose vectors are more than a point
    "routing, attention": {
        "history": {"encoder": {"kind": "routing", "interests": 3}},
        "loss": {"interests": {"score": "attention", "diversity": 0.5}, "negatives": {"sampled": 8}},
    },
    "queue": {
        "history": {"encoder": {"kind": "self_attention"}},
        "loss": {"negatives": {"sampled": 8, "cross_batch_memory": 80}},
    },
    "gaussian": {"model": {"dim": 8, "user_vector": "gaussian"}},
}


SOURCE = {"kind": "sequence", "table": "item", "column": "history", "max_length": 5}
# What no other case has, all in one: encoders side by side, each by other settings, and the parts of both towers.
TOGETHER: dict[str, Any] = {
    "user": [
        {**SOURCE, "name": "history", "encoder": {"kind": "transformer", "positions": "rotary", "causal": False}},
        {**SOURCE, "name": "levels", "encoder": {"kind": "hierarchical", "over": "transformer", "segment": 2}},
        {**SOURCE, "name": "near", "encoder": {"kind": "cnn"}, "times": "when"},
        {**SOURCE, "name": "asked", "encoder": {"kind": "attention"}},
        {**SOURCE, "name": "several", "encoder": {"kind": "self_attention", "interests": 2}, "actions": "did"},
    ],
    "model": {
        "dim": 8,
        "user_tower": {"wide": ["history", "levels"], "short_term": ["several"], "crosses": 1, "experts": {"count": 3,
                       "width": 8, "top_k": 2}},
        "item_tower": {"wide": ["item_id"], "gating": {"by": ["tags"]}, "missing_vectors": ["tags"],
                       "experts": {"count": 2, "width": 8}},
    },
}  # fmt: skip
# The same with what each rank draws for itself in training: two ranks are not one then, but each goes on as it was.
DRAWN: dict[str, Any] = {
    "user": [{**each, "encoder": {**each["encoder"], "dropout": 0.2}} for each in TOGETHER["user"]],
    "tables": {"own": {"buckets": 40, "dim": 8, "init_scale": 0}},
    "item": [
        {"name": "item_id", "kind": "id", "table": "own"},
        {"name": "tags", "kind": "bag", "table": "tag"},
    ],
    "model": {
        "dim": 8,
        "user_tower": {
            **TOGETHER["model"]["user_tower"],
            "dropout": 0.1,
            "feature_dropout": {"near": 0.3},
            "missing_vectors": ["near"],
        },
        "item_tower": {
            **TOGETHER["model"]["item_tower"],
            "feature_dropout": {"item_id": 0.3},
            "missing_vectors": ["item_id", "tags"],
        },
    },
}


RESUMED = ("plan row_wise", "encoder gru", "user routing, attention", "user gaussian", "together", "drawn")


def write_steps(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """Rows whose next item is the one behind the newest; some histories are empty, some name items of no catalogue."""
    rng = np.random.default_rng(5)
    for part, count in (("train", num_rows), ("valid", 12), ("test", 12)):
        lengths = rng.integers(0, 9, count)
        lengths[:2] = 0, 8
        histories = [rng.integers(0, NUM_ITEMS + 2, length).tolist() for length in lengths]
        next_item = [(history[-1] + 1) % NUM_ITEMS if history else 3 for history in histories]
        columns: dict[str, Any] = {
            "user_id": np.arange(count),
            "history": histories,
            "when": [np.cumsum(rng.integers(1, 10**5, length)).tolist() for length in lengths],
            "did": [rng.choice(["saw", "took"], length).tolist() for length in lengths],
        }
        columns |= {"item_id": next_item} if part == "train" else {"positives": [[item] for item in next_item]}
        _write(folder / part, columns)
    items = np.arange(NUM_ITEMS)
    tags = [[int(item % 5), int(item % 3)] if item % 4 else [] for item in items]
    _write(folder / "items", {"item_id": items, "tags": tags, "colour": items % 4})
    return folder


def _write(folder: Path, columns: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    table = pa.table({name: pa.array(values, LISTS.get(name)) for name, values in columns.items()})
    pq.write_table(table, folder / "part-0.parquet", row_group_size=40, write_page_checksum=True)


def steps_config(world: Path, run_dir: Path, sharding: str = "auto", **parts: dict[str, Any]) -> RunConfig:
    """A sequence with all that may stand beside its steps, next to a bag that shares its table."""
    history = {
        "name": "history",
        "kind": "sequence",
        "table": "item",
        "max_length": 5,
        "times": "when",
        "actions": "did",
        "attributes": ["tags", "colour"],
        "delta": True,
        **parts.pop("history", {}),
    }
    bag = {"name": "liked", "column": "history", "kind": "bag", "table": "item", "pooling": "sqrtn", "scale": 0.5}
    values: dict[str, Any] = {
        "data": {"dataset": str(world), "batch_size": 32},
        "tables": {name: {"buckets": 40, "dim": 8, "sharding": sharding} for name in ("item", "tag")},
        "user": [history, bag],
        "item": [
            {"name": "item_id", "kind": "id", "table": "item"},
            {"name": "tags", "kind": "bag", "table": "tag", "pooling": "sqrtn", "scale": 2.0},
            {"name": "colour", "kind": "category", "table": "tag"},
            {"name": "shade", "column": "colour", "kind": "category", "buckets": 6, "dim": 4},
        ],
        "model": {"dim": 8},
        "loss": {"mask_history": False, "negatives": {"sampled": 8}},
        "train": {"epochs": 1, "log_every": 1, "optimizer": {"lr": 0.1}},
        "evaluate": {"k": [5, 10], "best": "recall@5"},
        "run_dir": str(run_dir),
    }
    for name, part in parts.items():
        values[name] = {**values.get(name, {}), **part} if isinstance(part, dict) else part
    return validate(RunConfig, values, "the test")
