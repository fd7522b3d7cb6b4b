"""A world with a column for every kind of feature, and what ranks make of it: `-m tests.ranks.bazaar WORLD OUT`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_USERS, NUM_ITEMS, NUM_EVENTS = 24, 15, 90

TABLES: dict[str, Any] = {"item": {"buckets": 64, "dim": 4}}
USER: list[dict[str, Any]] = [
    {"name": "history", "kind": "bag", "table": "item"},
    {"name": "spent", "kind": "number", "normalize": "quantile", "clip": [0, 80]},
    {"name": "age", "kind": "number", "bins": 4, "dim": 4},
    {"name": "country_and_device", "kind": "cross", "columns": ["country", "device"], "buckets": 50, "dim": 4},
    {"name": "hour", "kind": "time", "column": "timestamp", "part": "hour", "zone": "Europe/Oslo", "dim": 4},
    {"name": "since", "kind": "time", "column": "last", "part": "age", "until": "timestamp", "normalize": "log1p"},
    {"name": "country", "kind": "category", "vocabulary": "learned", "buckets": 4, "dim": 4},
    {"name": "recent", "kind": "bag", "column": "history", "times": "history_times", "until": "timestamp",
     "half_life_days": 60, "buckets": 40, "dim": 4, "hashes": 2},
    {"name": "query", "kind": "text", "buckets": 64, "dim": 4, "words": 2, "characters": [3, 4]},
    {"name": "taste", "kind": "vector", "size": 3, "dim": 4, "unit_length": True},
    {"name": "spent_waves", "kind": "number", "column": "spent", "frequencies": 3, "dim": 4, "default": 10.0},
]  # fmt: skip
ITEM: list[dict[str, Any]] = [
    {"name": "item_id", "kind": "id", "table": "item"},
    {"name": "price", "kind": "number", "bins": 5, "soft": True, "dim": 4},
    {"name": "weight", "kind": "number", "bins": [1, 2.5, 10], "dim": 4},
    {"name": "released", "kind": "time", "part": "age", "at": "2024-01-01", "bins": 3, "soft": True, "dim": 4},
    {"name": "title", "kind": "text", "buckets": 64, "dim": 4, "max_length": 2},
    {"name": "image", "kind": "vector", "size": 3, "nan": "missing"},
]
WORDS = ["red", "blue", "old", "new", "shoe", "hat", "book"]


TITLES: dict[str, Any] = {"title_read": 1, "title_frozen": "frozen", "title_all": "all"}  # by how much is trained


def titles_read_by(model: Path) -> list[dict[str, Any]]:
    """The title again, through a language model, of which the last layer, none or all are trained."""
    read = {"kind": "text", "column": "title", "folder": str(model), "dim": 4, "max_length": 16}
    return [{**read, "name": name, "tune": tune} for name, tune in TITLES.items()]


def write_model(folder: Path, *, layers: int = 2) -> Path:
    """A tiny language model with random weights, and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=layers, **sizes, **quiet)).save_pretrained(folder)
    return folder


def write_bazaar(folder: Path) -> Path:
    """24 users, 15 items, 90 events in four row groups, and a row a user in valid/ and test/."""
    rng = np.random.default_rng(5)
    items = [f"item-{number}" for number in range(NUM_ITEMS)]

    def some(values: list[Any]) -> list[Any]:
        """Every fifth or so null."""
        return [None if rng.random() < 0.2 else value for value in values]

    def rows(users: np.ndarray) -> dict[str, Any]:
        histories = [rng.permutation(NUM_ITEMS)[: rng.integers(0, 5)].tolist() for _ in users]
        times = [np.sort(rng.integers(1_690_000_000, 1_700_000_000, len(history))).tolist() for history in histories]
        return {
            "user_id": users + 100,
            "history": pa.array([[items[item] for item in history] for history in histories], pa.list_(pa.string())),
            "history_times": pa.array(times, pa.list_(pa.int64())),
            "query": pa.array(some([" ".join(rng.choice(WORDS, 3)) for _ in users]), pa.string()),
            "taste": pa.array(some(rng.normal(size=(len(users), 3)).tolist()), pa.list_(pa.float32())),
            "country": pa.array(some(rng.choice(["NO", "SE", "DK"], len(users)).tolist()), pa.string()),
            "device": pa.array(some(rng.integers(0, 3, len(users)).tolist()), pa.int64()),
            "timestamp": rng.integers(1_700_000_000, 1_710_000_000, len(users)),
            "last": pa.array(some(rng.integers(1_600_000_000, 1_700_000_000, len(users)).tolist()), pa.int64()),
            "spent": pa.array(some(rng.gamma(1.0, 40.0, len(users)).round(2).tolist()), pa.float64()),
        }

    everybody = np.arange(NUM_USERS)
    parts = {
        "train": {**rows(rng.integers(0, NUM_USERS, NUM_EVENTS)), "item_id": rng.choice(items, NUM_EVENTS).tolist()},
        "valid": {**rows(everybody), "item_id": rng.choice(items, NUM_USERS).tolist()},
        "test": {**rows(everybody), "item_id": rng.choice(items, NUM_USERS).tolist()},
        "users": {
            "user_id": everybody + 100,
            "age": pa.array(some(rng.integers(18, 80, NUM_USERS).tolist()), pa.int64()),
        },
        "items": {
            "item_id": items,
            "price": pa.array(some(rng.lognormal(2.0, 1.0, NUM_ITEMS).round(2).tolist()), pa.float64()),
            "released": pa.array(some(rng.integers(1_600_000_000, 1_700_000_000, NUM_ITEMS).tolist()), pa.int64()),
            "title": pa.array(some([" ".join(rng.choice(WORDS, 4)) for _ in items]), pa.string()),
            "image": pa.array(some(rng.normal(size=(NUM_ITEMS, 3)).tolist()), pa.list_(pa.float64(), 3)),
            "weight": pa.array(some(rng.gamma(2.0, 2.0, NUM_ITEMS).round(3).tolist()), pa.float64()),
        },
    }
    for name, columns in parts.items():
        (folder / name).mkdir(parents=True)
        table = pa.table(columns)
        pq.write_table(table, folder / name / "part-0.parquet", row_group_size=25 if name == "train" else None)
    write_model(folder / "model")
    return folder


def bazaar_config(folder: Path, run_dir: Path, **changes: Any) -> Any:
    """A run over all kinds of features."""
    from trec_twotower.config.base import validate
    from trec_twotower.config.run_config import RunConfig

    values: dict[str, Any] = {
        "data": {"dataset": folder, "batch_size": 16, "shuffle_rows": 60},
        "tables": TABLES,
        "user": USER,
        "item": [*ITEM, *titles_read_by(folder / "model")],
        "model": {"dim": 4, "user_tower": {"mlp": [8]}, "item_tower": {"mlp": [8]}},
        "loss": {"temperature": 0.2, "negatives": {"in_batch": True, "sampled": 5}},
        "train": {"epochs": 2, "log_every": 1, "optimizer": {"sparse": "sgd", "lr": 0.5, "dense_lr": 0.01}},
        "index": {"k": 5},
        "evaluate": {"k": [5, 10], "best": "recall@5"},
        "run_dir": run_dir,
    }
    values["train"] |= changes
    return validate(RunConfig, values, "the bazaar")


def work(world: Path, out: Path, ranks: Any) -> dict[str, Any]:
    """One epoch, the second after a resume, and the export: the losses by step and every item's and user's vector."""
    from trec_twotower.inference.export import export, read_export
    from trec_twotower.inference.model_loader import load_model
    from trec_twotower.training import loop as training
    from trec_twotower.training.run_dir import Run

    for epochs in (1, 2):
        training.train(bazaar_config(world, out, epochs=epochs), ranks)
    made = read_export(export(load_model(Run.open(out), ranks, "newest"), ranks))
    return {
        "losses": losses_of(out),
        "items": made.item_ID.tolist(),
        "users": made.user_QD.tolist(),
        "item_ids": made.item_ids.to_pylist(),
    }


def losses_of(run: Path) -> list[float]:
    """The loss of every step that the log has."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def main() -> None:
    from trec_twotower.cli import _quiet
    from trec_twotower.distributed.ranks import start_ranks

    _quiet()
    os.fsync = lambda _: None  # these runs outlive no power cut
    world, out = map(Path, sys.argv[1:])
    with start_ranks() as ranks:
        results = work(world, out / "run", ranks)
        if ranks.is_first:
            (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
