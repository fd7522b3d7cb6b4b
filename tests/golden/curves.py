"""Trainings whose losses are kept in losses.json: all of the engine at once, on a world of a few rows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks.worlds import MIXED, event_config, negatives, user_config
from trec_twotower.config.run_config import RunConfig
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.training import loop as training

KEPT = Path(__file__).parent / "losses.json"
LEARNED = {"learned": True, "start": 0.2, "low": 0.05, "high": 0.5}
OPTIMIZER = {"schedule": "cosine", "warmup_steps": 3, "clip_norm": 0.5, "ema": 0.9, "lr": 0.1, "dense_lr": 0.01}
TRAIN = {"epochs": 3, "log_every": 1, "optimizer": OPTIMIZER}


def configs(world: Path, out: Path) -> dict[str, RunConfig]:
    loss = {**negatives(world), "temperature": LEARNED}
    return {
        "a row per event": event_config(world, out / "events", MIXED, loss=loss, train=TRAIN),
        "a row per user": user_config(world, out / "users", loss=negatives(world, "user_id"), train=TRAIN),
    }


def curves(world: Path, out: Path, ranks: Ranks) -> dict[str, list[float]]:
    """The loss of every step, by the name of the training."""
    found = {}
    for name, config in configs(world, out).items():
        training.train(config, ranks)
        assert config.run_dir is not None
        lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        found[name] = [line["loss"] for line in lines if line["kind"] == "train"]
    return found
