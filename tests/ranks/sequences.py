"""What one rank and two ranks make of sequences: `-m tests.ranks.sequences WORLD OUT`.

The first rank writes the results to OUT/results.pt.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from trec_twotower.cli import _quiet

_quiet()

from tests.kinds import ENCODER_PARAMETERS  # noqa: E402
from tests.ranks.states import whole_state  # noqa: E402
from tests.sequences import DRAWN, RESUMED, SGD, TOGETHER, TOWERS, USERS, steps_config  # noqa: E402
from trec_twotower.config.run_config import RunConfig  # noqa: E402
from trec_twotower.distributed.ranks import Ranks, start_ranks  # noqa: E402
from trec_twotower.inference.export import export  # noqa: E402
from trec_twotower.inference.model_loader import load_model  # noqa: E402
from trec_twotower.model.encode import encode_everywhere  # noqa: E402
from trec_twotower.training import loop as training  # noqa: E402
from trec_twotower.training.run_dir import Run  # noqa: E402

warnings.filterwarnings("error", module=r"trec_twotower(\.|$)")
os.fsync = lambda _: None

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"plan {plan}": (plan, {"train": SGD}) for plan in ("table_wise", "row_wise", "column_wise")},
    **{f"encoder {kind}": ("auto", {"history": {"encoder": {"kind": kind}}}) for kind in ENCODER_PARAMETERS},
    **{
        f"tower {name}": ("auto", {"model": {"dim": 8, "user_tower": parts}, "train": SGD})
        for name, parts in TOWERS.items()
    },
    **{f"user {name}": ("auto", {**parts, "train": SGD}) for name, parts in USERS.items()},
    "together": ("auto", {**TOGETHER, "train": SGD}),
    "drawn": ("auto", {**DRAWN, "train": SGD}),
    "pipeline": ("row_wise", {"train": {**SGD, "pipeline": "sparse_dist"}}),
}


def log(config: RunConfig) -> list[dict[str, Any]]:
    assert config.run_dir is not None
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in log(config)]


def main(world: Path, out: Path, ranks: Ranks) -> None:
    results: dict[str, Any] = {}
    for name, (plan, parts) in CASES.items():
        config = steps_config(world, out / "runs" / name.replace(" ", "-"), plan, **parts)
        training.train(config, ranks)
        results[f"losses {name}"] = losses(config)
        results[f"log {name}"] = log(config)
        assert config.run_dir is not None
        loaded = load_model(Run.open(config.run_dir), ranks)
        results[f"weights {name}"] = whole_state(loaded.model, ranks)
        items = loaded.sources.catalogue.columns
        results[f"items {name}"] = encode_everywhere(loaded.model, "item", items, ranks)
        export(loaded, ranks)
    for name in RESUMED:  # six steps, with a stop in between and in one go
        plan, parts = CASES[name]
        longer = {**parts, "train": {**parts.get("train", {"log_every": 1, "optimizer": {"lr": 0.1}}), "epochs": 2}}
        for way, lengths in (("resumed", (parts, longer)), ("at once", (longer,))):
            for length in lengths:
                config = steps_config(world, out / "runs" / f"{way}-{name}".replace(" ", "-"), plan, **length)
                training.train(config, ranks)
            results[f"{way} {name}"] = losses(config)
    if ranks.is_first:
        torch.save(results, out / "results.pt")


if __name__ == "__main__":
    with start_ranks() as here:
        main(Path(sys.argv[1]), Path(sys.argv[2]), here)
