"""Small datasets whose every value is at hand, and the configs that train on them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.base import validate
from trec_twotower.config.run_config import RunConfig

NUM_ITEMS, NUM_EVENTS, NUM_USERS = 29, 45, 23
PLANS = ("table_wise", "row_wise", "column_wise", "data_parallel", "table_row_wise")
TABLES = ("item", "click", "country", "tag", "brand")
MIXED = {
    "item": "row_wise",
    "click": "table_wise",
    "country": "data_parallel",
    "tag": "column_wise",
    "brand": "table_wise",
}

_random = random.Random(20)
# The ends of int64 are ids like others.
ITEM_IDS = [-(2**63), 2**63 - 1, -1, 0, *_random.sample(range(10**12), NUM_ITEMS - 4)]
ITEMS: list[dict[str, Any]] = [
    {
        "item_id": item_id,
        "brand": _random.choice(["acme", "blue", "coil", "dune"]),
        "tags": [f"tag-{_random.randrange(20)}" for _ in range(_random.randrange(4))],
        "price": None if number == 5 else 10 * _random.random(),
    }
    for number, item_id in enumerate(ITEM_IDS)
]


def _bag(longest: int) -> list[int]:
    return _random.choices(ITEM_IDS, k=_random.randrange(longest + 1))


def _event(user_id: int) -> dict[str, Any]:
    history, clicks = _bag(5), _bag(4)
    return {
        "user_id": user_id,
        "item_id": _random.choice(ITEM_IDS),
        "weight": _random.choice([0.5, 1.0, 2.0]),
        "history": history,
        "clicks": clicks,
        "click_weights": [0.25 + 2 * _random.random() for _ in clicks],
        "country": _random.choice([None, 49, 33, 81]),
        "age": _random.choice([None, 20.0, 35.5, 61.0]),
    }


EVENTS: list[dict[str, Any]] = [_event(number % 11) for number in range(NUM_EVENTS)]
USERS: list[dict[str, Any]] = [
    {"user_id": number, "positives": _random.sample(ITEM_IDS, 2 + number % 5)} for number in range(NUM_USERS)
]

# Items that rows name beside those they took, in random numbers of their own.
_names = random.Random(21)
for _row in (*EVENTS, *USERS):
    _shown = None if _names.random() < 0.2 else _names.choices(ITEM_IDS, k=_names.randrange(5))
    _row["shown"] = _shown
    _row["grade"] = None if _shown is None else [_names.choice([0, 0, 1]) for _ in _shown]
LISTS: list[dict[str, Any]] = [  # of items, by item and by user
    {"item_id": item_id, "user_id": number, "negatives": _names.sample(ITEM_IDS, number % 7)}
    for number, item_id in enumerate(ITEM_IDS[:-3])
]

_ITEM_TYPES = [
    ("item_id", pa.int64()),
    ("brand", pa.string()),
    ("tags", pa.list_(pa.string())),
    ("price", pa.float64()),
]
_EVENT_TYPES = [
    ("user_id", pa.int64()),
    ("item_id", pa.int64()),
    ("weight", pa.float64()),
    ("history", pa.list_(pa.int64())),
    ("clicks", pa.list_(pa.int64())),
    ("click_weights", pa.list_(pa.float32())),
    ("country", pa.int64()),
    ("age", pa.float64()),
    ("shown", pa.list_(pa.int64())),
    ("grade", pa.list_(pa.int64())),
]
_USER_TYPES = [("user_id", pa.int64()), ("positives", pa.list_(pa.int64())), *_EVENT_TYPES[-2:]]


def write_world(folder: Path) -> Path:
    """The datasets events/ and users/ in a folder: the same items, a row an event or a row a user."""
    for name, rows, types in (("events", EVENTS, _EVENT_TYPES), ("users", USERS, _USER_TYPES)):
        for split, content, schema in (("train", rows, types), ("items", ITEMS, _ITEM_TYPES)):
            (folder / name / split).mkdir(parents=True)
            table = pa.Table.from_pylist(content, schema=pa.schema(schema))
            pq.write_table(table, folder / name / split / "part.parquet", row_group_size=16, write_page_checksum=True)
    for key, items in (("item_id", "negatives"), ("user_id", "negatives"), ("user_id", "item_ids")):
        lists = {key: [row[key] for row in LISTS], items: [row["negatives"] for row in LISTS]}
        pq.write_table(pa.table(lists), folder / f"{items}-by-{key}.parquet")
    return folder


def tables(plan: str | Mapping[str, str]) -> dict[str, Any]:
    kinds = dict.fromkeys(TABLES, plan) if isinstance(plan, str) else plan
    sizes = {"item": (37, 12), "click": (23, 8), "country": (7, 4), "tag": (16, 8), "brand": (10, 4)}
    # Shards of one width for any number of ranks: row-wise Adagrad has a state for each.
    cut = {"column_wise": {"shard_columns": 4}}
    return {
        name: {
            "buckets": sizes[name][0], "dim": sizes[name][1], "sharding": kind, "init_scale": 0.5, **cut.get(kind, {})
        }
        for name, kind in kinds.items()
    }  # fmt: skip


LEARNED = {"learned": True, "start": 0.2}
# Loss sections to train with, `temperature: null` where the loss has none.
LOSSES: dict[str, dict[str, Any]] = {
    "bce": {"kind": "bce", "negative_weight": 3.0},
    "softmax_bce": {"kind": "softmax_bce", "temperature": LEARNED},
    "bsl": {"kind": "bsl", "temperature_ratio": 2.0},
    "ccl": {"kind": "ccl", "temperature": None, "margin": 0.1, "negative_weight": 10.0},
    "bpr": {"kind": "bpr"},
    "margin": {"kind": "margin", "temperature": None, "margin": 0.5},
    "regularised": {"temperature": LEARNED, "regularization": {"norm": 0.1, "alignment": 0.2, "uniformity": 0.5}},
}


def negatives(world: Path, key: str = "item_id") -> dict[str, Any]:
    """A loss section with all kinds of negatives at once."""
    return {
        "impressions": {"column": "shown", "labels": "grade"},
        "known": world / "item_ids-by-user_id.parquet",
        "negatives": {
            "sampled": 4,
            "power": 0.75,
            "same_category": {"feature": "item_id" if key == "user_id" else "brand", "count": 3},
            "mined": {"file": world / f"negatives-by-{key}.parquet", "key": key, "count": 2, "shared": False},
            "cross_batch_memory": 70,
        },
    }


def event_config(world: Path, run_dir: Path, plan: str | Mapping[str, str] = "table_wise", **parts: Any) -> RunConfig:
    """A row per event with features of every kind; `parts` are laid over the sections."""
    return _config(
        {
            "data": {"dataset": world / "events", "batch_size": 16, "shuffle_rows": 20},
            "tables": tables(plan),
            "user": [
                {"name": "history", "kind": "bag", "table": "item"},
                {"name": "clicks", "kind": "bag", "table": "click", "weights": "click_weights"},
                {"name": "roots", "kind": "bag", "table": "click", "column": "history", "pooling": "sqrtn"},
                {
                    "name": "weighted_roots",
                    "kind": "bag",
                    "table": "item",
                    "column": "clicks",
                    "weights": "click_weights",
                    "pooling": "sqrtn",
                },
                {"name": "newest", "kind": "bag", "table": "item", "column": "history", "max_length": 2},
                {"name": "country", "kind": "category", "table": "country"},
                {"name": "age", "kind": "number"},
            ],
            "item": [
                {"name": "item_id", "kind": "id", "table": "item"},
                {"name": "brand", "kind": "id", "table": "brand"},
                {"name": "tags", "kind": "bag", "table": "tag", "pooling": "sum"},
                {"name": "price", "kind": "number", "normalize": "log1p"},
            ],
        },
        run_dir,
        parts,
    )


def user_config(world: Path, run_dir: Path, plan: str | Mapping[str, str] = "table_wise", **parts: Any) -> RunConfig:
    """A row per user, all of whose positives share one softmax."""
    wanted = tables(plan)
    return _config(
        {
            "data": {"dataset": world / "users", "rows": "user", "batch_size": 8, "shuffle_rows": 16},
            "tables": {name: wanted[name] for name in ("item", "tag")},
            "user": [{"name": "history", "kind": "bag", "table": "item"}],
            "item": [
                {"name": "item_id", "kind": "id", "table": "item"},
                {"name": "tags", "kind": "bag", "table": "tag"},
            ],
        },
        run_dir,
        parts,
    )


def _config(values: dict[str, Any], run_dir: Path, parts: Mapping[str, Any]) -> RunConfig:
    common = {
        "model": {"dim": 6, "user_tower": {"mlp": [10]}, "item_tower": {"mlp": [9]}},
        "loss": {"temperature": 0.2, "negatives": {"in_batch": True, "sampled": 7}},
        "train": {"epochs": 3, "log_every": 1, "optimizer": {"sparse": "sgd", "lr": 0.5, "dense_lr": 0.01}},
        "run_dir": run_dir,
    }
    return validate(RunConfig, _laid_over({**common, **values}, parts), "a test's config")


def _laid_over(values: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, part in parts.items():
        is_group = isinstance(part, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _laid_over(merged[name], part) if is_group else part
    return merged
