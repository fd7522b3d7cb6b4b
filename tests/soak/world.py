"""The world of the soak: rows that carry their own number, and the config that trains on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.ranks.worlds import MIXED, tables
from tests.soak.jobs import ROW_UNIT
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import to_yaml
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.sources.writer import DatasetWriter

NUM_ROWS, NUM_ITEMS, EPOCHS, BATCH = 60, 29, 4, 13  # 5 steps an epoch, the last of 8 rows
NUM_STEPS = 5 * EPOCHS
SAVE_EVERY = 3


def write_world(folder: Path) -> None:
    drawn = random.Random(1)
    items = [7 * number for number in range(NUM_ITEMS)]
    train = pa.table(
        {
            "user_id": list(range(NUM_ROWS)),
            "item_id": [drawn.choice(items) for _ in range(NUM_ROWS)],
            "number": [row / ROW_UNIT for row in range(NUM_ROWS)],
            "history": [drawn.choices(items, k=drawn.randrange(5)) for _ in range(NUM_ROWS)],
            "country": [drawn.choice([49, 33, 81]) for _ in range(NUM_ROWS)],
        }
    )
    catalogue = pa.table({"item_id": items, "brand": [drawn.choice("abc") for _ in items]})
    test = (
        train.slice(0, 20)
        .drop_columns(["item_id"])
        .append_column("positives", pa.array([[item] for item in items][:20]))
    )
    with DatasetWriter(folder, rows_per_group=16) as writer:
        for name, table in (("train", train), ("items", catalogue), ("test", test)):
            writer.write(name, table)
        writer.finish("the soak", {}, {})


def config(world: Path, run_dir: Path, plan: Any = MIXED, **parts: Any) -> RunConfig:
    wanted = tables(plan)
    values: dict[str, Any] = {
        "data": {"dataset": str(world), "batch_size": BATCH, "shuffle_rows": 20},
        "tables": {name: wanted[name] for name in ("item", "country", "brand")},
        "user": [
            {"name": "number", "kind": "number", "normalize": "none"},
            {"name": "history", "kind": "bag", "table": "item"},
            {"name": "country", "kind": "category", "table": "country"},
        ],
        "item": [
            {"name": "item_id", "kind": "id", "table": "item"},
            {"name": "brand", "kind": "id", "table": "brand"},
        ],
        "model": {"dim": 6, "user_tower": {"mlp": [10], "dropout": 0.2}, "item_tower": {"mlp": [9]}},
        "loss": {"temperature": 0.2, "negatives": {"in_batch": True, "sampled": 7}},
        "train": {
            "epochs": EPOCHS,
            "log_every": 1,
            "timeout_s": 30,
            "max_failures": 10_000,
            "optimizer": {"sparse": "rowwise_adagrad", "lr": 0.1, "dense_lr": 0.01, "schedule": "linear"},
        },
        "checkpoint": {"every": SAVE_EVERY},
        "run_dir": str(run_dir),
    }
    for section, settings in parts.items():
        values[section] = {**values[section], **settings}
    return validate(RunConfig, values, "the soak's config")


def write_config(path: Path, made: RunConfig) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(as_values(made)))
