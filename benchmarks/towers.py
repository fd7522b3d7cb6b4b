"""Every encoder and every part of a tower beside the plain tower: how well it ranks, how large and how fast it is.

    python benchmarks/towers.py [--worlds planted amazon-beauty] [--data FOLDER] [--epochs 2] [--only NAME ...]
        [--rates-only | --no-rates] [--json FILE]

The plain tower: the mean of a history, the item's id and attributes side by side, a layer each, dim 64. Contenders
change one thing of it, but for two that need more. "short and long" has the newest steps by heads beside the history,
and is to be judged by "history and recent", which has the same two side by side. "id drop" has an id table of its own
that starts at zero, of which "id of its own" and "id of its own, from zero" are the steps; "user id drop" likewise.

All are trained alike, and rank the whole catalogue for the test users, items already taken left out. Rates are of
training steps without the reader, contenders taking turns with the plain tower, medians; on the first world. FOLDER
holds Amazon Beauty as `prepare amazon-beauty` takes it (default: $TREC_TT_DATA/amazon-beauty).
`cold` is of the planted world with a fifth of the items taken out of train/: recall@10 of test items that are among
these, ranked against all items, and against one another alone. `cold users` is of the planted world with a fifth of the
users taken out of train/, who are known by their history alone: recall@10 of these, and of the others.

WORLD_NAME_recall, WORLD_NAME_ndcg    at 10
WORLD_NAME_parameters                 of the towers, tables left out
NAME_rate                             rows/s relative to the plain tower
cold_NAME, cold_NAME_among            recall@10 of cold items among all items, and among cold ones
cold_users_NAME, cold_users_NAME_others  recall@10 of cold users, and of those that train/ has
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import headline, write_figures

ROOT = Path(__file__).resolve().parent.parent
DIM, BATCH = 64, 1024
PLANTED = ("users=8000", "items=3000", "clusters=40")
ROUNDS, STEPS = 5, 6  # of the rates
RECENT = {"name": "recent", "column": "history", "kind": "sequence", "table": "item", "max_length": 5}


def encoder(kind: str, **settings: Any) -> dict[str, Any]:
    return {"history": {"encoder": {"kind": kind, **settings}}}


CONTENDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads": encoder("heads"),
    "gru": encoder("gru"),
    "cnn": encoder("cnn"),
    "transformer": encoder("transformer"),
    "transformer, rotary": encoder("transformer", positions="rotary"),
    "attention": encoder("attention"),
    "hierarchical": encoder("hierarchical"),
    "routing, 4 vectors": encoder("routing"),
    "self_attention, 4 vectors": encoder("self_attention"),
    "self_attention by attention": {**encoder("self_attention"), "loss": {"interests": {"score": "attention"}}},
    "gaussian user": {"model": {"user_vector": "gaussian"}},
    "history and recent": {"recent": {"encoder": {"kind": "heads"}}},
    "short and long": {"recent": {"encoder": {"kind": "heads"}}, "model": {"user_tower": {"short_term": ["recent"]}}},
    "mlp": {"model": {"user_tower": {"mlp": [128]}, "item_tower": {"mlp": [128]}}},
    "gating": {"model": {"item_tower": {"gating": {}}}},
    "crosses": {"model": {"item_tower": {"crosses": 2}}},
    "experts": {"model": {"item_tower": {"experts": {"count": 4, "width": 64}}}},
    "experts, best 2": {"model": {"item_tower": {"experts": {"count": 4, "width": 64, "top_k": 2}}}},
    "id of its own": {"id_scale": DIM**-0.5},
    "id of its own, from zero": {"id_scale": 0},
    "id drop": {
        "id_scale": 0,
        "model": {"item_tower": {"feature_dropout": {"item_id": 0.3}, "missing_vectors": ["item_id"]}},
    },
}
CONTENDERS |= {
    "user id": {"user_scale": DIM**-0.5},
    "user id drop": {
        "user_scale": 0,
        "model": {"user_tower": {"feature_dropout": {"user_id": 0.3}, "missing_vectors": ["user_id"]}},
    },
}
COLD_USERS = ("plain", "user id", "user id drop")
COLD = ("plain", "id of its own", "id of its own, from zero", "id drop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", nargs="+", default=["planted", "amazon-beauty"], choices=["planted", "amazon-beauty"]
    )
    parser.add_argument("--data", type=Path, help="the folder of Amazon Beauty's files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), help="contenders by name")
    parser.add_argument("--rates-only", action="store_true", help="measure no quality")
    parser.add_argument("--no-rates", action="store_true", help="measure no speed")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    if unknown := set(options.only) - set(CONTENDERS):
        raise SystemExit(f"no contender {', '.join(unknown)}: there are {', '.join(CONTENDERS)}")
    print(headline(), flush=True)
    from trec_twotower.distributed.ranks import start_ranks

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, start_ranks() as ranks:
        place = Path(temporary)
        for world in options.worlds:
            prepare(world, place / world, options.data)
        if not options.no_rates:
            figures |= rates(place / options.worlds[0], options.worlds[0], options.only, ranks)
        if not options.rates_only:
            for world in options.worlds:
                figures |= quality(place, world, options.only, options.epochs, ranks)
            if "planted" in options.worlds:
                figures |= cold(place, [name for name in COLD if name in options.only], options.epochs, ranks)
                names = [name for name in COLD_USERS if name in options.only]
                figures |= cold_users(place, names, options.epochs, ranks)
    write_figures(options.json, figures)


def prepare(world: str, folder: Path, data: Path | None) -> None:
    given = PLANTED
    if world == "amazon-beauty":
        if data is None and "TREC_TT_DATA" not in os.environ:
            raise SystemExit("amazon-beauty wants its files: give --data FOLDER, or set TREC_TT_DATA.")
        given = (f"data_dir={(data or Path(os.environ['TREC_TT_DATA']) / 'amazon-beauty').resolve()}",)
    source = "synthetic" if world == "planted" else world
    words = [sys.executable, "-m", "trec_twotower", "prepare", source, "--out", str(folder), *given]
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def config_of(dataset: Path, world: str, changes: Mapping[str, Any], run_dir: Path, epochs: int) -> Any:
    from trec_twotower.config.base import validate
    from trec_twotower.config.run_config import RunConfig

    about = ["category", "tags"] if world == "planted" else ["attributes"]
    kinds = {"category": "category", "tags": "bag", "attributes": "bag"}
    item: dict[str, Any] = {"buckets": 1 << 15, "dim": DIM, "hashing": "modulo"}
    history = {"name": "history", "kind": "sequence", "table": "item", "max_length": 50, **changes.get("history", {})}
    user = [history, *([{**RECENT, **changes["recent"]}] if "recent" in changes else [])]
    own = {}  # an id's table of its own, where it is to start elsewhere than the history's
    if "id_scale" in changes:
        own["item_itself"] = {**item, "init_scale": changes["id_scale"]}
    if "user_scale" in changes:
        own["user_itself"] = {**item, "init_scale": changes["user_scale"]}
        user.append({"name": "user_id", "kind": "id", "table": "user_itself"})
    return validate(
        RunConfig,
        {
            "data": {"dataset": str(dataset), "batch_size": BATCH},
            "tables": {"item": item, "about": {"buckets": 4096, "dim": DIM}, **own},
            "user": user,
            "item": [
                {"name": "item_id", "kind": "id", "table": "item_itself" if "item_itself" in own else "item"},
                *({"name": name, "kind": kinds[name], "table": "about"} for name in about),
            ],
            "model": {"dim": DIM, **changes.get("model", {})},
            "loss": {"temperature": 0.08, "negatives": {"sampled": 512, "power": 0.5}, **changes.get("loss", {})},
            "train": {"epochs": epochs, "optimizer": {"lr": 0.05, "dense_lr": 2e-3, "schedule": "linear"}},
            "evaluate": {"k": [10], "best": "recall@10"},
            "run_dir": str(run_dir),
        },
        "the benchmark",
    )


def quality(place: Path, world: str, names: list[str], epochs: int, ranks: Any) -> dict[str, float]:
    """Recall and NDCG at 10 of every contender, trained alike."""
    figures = {}
    print(f"\n{world:<30}{'Recall@10':>10}{'NDCG@10':>10}{'parameters':>12}{'CPU s':>8}", flush=True)
    for name in names:
        began = time.process_time()
        loaded, config = trained(place / world, world, name, place / f"run-{world}-{_word(name)}", epochs, ranks)
        took = time.process_time() - began
        from trec_twotower.evaluation.evaluator import Evaluator

        found = Evaluator.of(loaded.sources, "test", config.evaluate, ranks)(loaded.model)
        towers = (loaded.model.user_tower, loaded.model.item_tower)
        count = sum(weight.numel() for tower in towers for weight in tower.parameters())
        print(f"{name:<30}{found['recall@10']:>10.4f}{found['ndcg@10']:>10.4f}{count:>12,}{took:>8.1f}", flush=True)
        start = f"{_word(world)}_{_word(name)}"
        figures |= {f"{start}_recall": found["recall@10"], f"{start}_ndcg": found["ndcg@10"]}
        figures[f"{start}_parameters"] = count
    return figures


def trained(dataset: Path, world: str, name: str, run_dir: Path, epochs: int, ranks: Any) -> tuple[Any, Any]:
    from contextlib import redirect_stdout
    from io import StringIO

    from trec_twotower.inference.model_loader import load_model
    from trec_twotower.training.loop import train
    from trec_twotower.training.run_dir import Run

    config = config_of(dataset, world, CONTENDERS[name], run_dir, epochs)
    with redirect_stdout(StringIO()):
        train(config, ranks)
    return load_model(Run.open(run_dir), ranks, "newest"), config


def cold(place: Path, names: list[str], epochs: int, ranks: Any) -> dict[str, float]:
    """Recall at 10 of test items that no row of train/ has."""
    from trec_twotower.evaluation.evaluator import Evaluator, exactly
    from trec_twotower.evaluation.metrics import Hits
    from trec_twotower.index import exact_search

    dataset = place / "cold"
    without_cold(place / "planted", dataset)
    figures = {}
    print(f"\n{'cold items':<30}{'Recall@10':>10}{'among them':>12}", flush=True)
    for name in names:
        loaded, config = trained(dataset, "planted", name, place / f"run-cold-{_word(name)}", epochs, ranks)
        evaluator = Evaluator.of(loaded.sources, "test", config.evaluate, ranks)
        item_ID, user_BD = evaluator.items(loaded.model), evaluator.users(loaded.model)
        is_cold_I = is_cold(np.asarray(loaded.sources.catalogue.ids))
        cold_rows = np.flatnonzero(is_cold_I)
        of_all = evaluator.rankings(user_BD, exactly(item_ID, ranks))
        of_cold = cold_rows[exact_search(item_ID[cold_rows], user_BD, 10)[1]]
        start = f"cold_{_word(name)}"
        for key, ranked in ((start, of_all), (f"{start}_among", of_cold)):
            hits = Hits.of(ranked, evaluator.held_out.positives)
            figures[key] = float(np.mean(hits.metrics_among(ranked, is_cold_I, (10,))["recall@10"]))
        print(f"{name:<30}{figures[start]:>10.4f}{figures[start + '_among']:>12.4f}", flush=True)
    return figures


def cold_users(place: Path, names: list[str], epochs: int, ranks: Any) -> dict[str, float]:
    """Recall at 10 of test users of whom train/ has no row."""
    from trec_twotower.evaluation.evaluator import Evaluator, exactly
    from trec_twotower.evaluation.metrics import Hits

    dataset = place / "cold-users"
    shutil.copytree(place / "planted", dataset)
    for path in sorted((dataset / "train").glob("*.parquet")):
        table = pq.read_table(path)
        table = table.filter(pa.array(~is_cold(table["user_id"].to_numpy())))
        pq.write_table(table, path, write_page_checksum=True)
    (dataset / "dataset.yaml").unlink(missing_ok=True)  # which has the counts of the whole
    figures = {}
    print(f"\n{'cold users':<30}{'Recall@10':>10}{'of others':>12}", flush=True)
    for name in names:
        loaded, config = trained(dataset, "planted", name, place / f"run-cold-users-{_word(name)}", epochs, ranks)
        evaluator = Evaluator.of(loaded.sources, "test", config.evaluate, ranks)
        ranked = evaluator.rankings(evaluator.users(loaded.model), exactly(evaluator.items(loaded.model), ranks))
        recall_B = Hits.of(ranked, evaluator.held_out.positives).metrics((10,))["recall@10"]
        is_cold_B = is_cold(evaluator.held_out.user_ids.to_numpy(zero_copy_only=False))
        start = f"cold_users_{_word(name)}"
        figures |= {start: float(recall_B[is_cold_B].mean()), f"{start}_others": float(recall_B[~is_cold_B].mean())}
        print(f"{name:<30}{figures[start]:>10.4f}{figures[f'{start}_others']:>12.4f}", flush=True)
    return figures


def is_cold(ids: np.ndarray) -> np.ndarray:
    """A fifth of the items or users, by their ids."""
    return (ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32) < np.uint64((1 << 32) // 5)


def without_cold(source: Path, folder: Path) -> None:
    """The dataset without rows that take a cold item, and without these in histories."""
    for path in sorted(source.rglob("*.parquet")):
        table = pq.read_table(path)
        if path.parent.name == "train":
            table = table.filter(pa.array(~is_cold(table["item_id"].to_numpy())))
        if "history" in table.column_names:
            lists = table["history"].combine_chunks()
            kept = [[item for item in items if not is_cold(np.array([item]))[0]] for items in lists.to_pylist()]
            at = table.column_names.index("history")
            table = table.set_column(at, "history", pa.array(kept, lists.type))
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / path.parent.name / path.name, write_page_checksum=True)


def rates(dataset: Path, world: str, names: list[str], ranks: Any) -> dict[str, float]:
    """Rows/s of each contender's steps against the plain tower's, by turns."""
    import torch

    figures = {}
    plain = Stepper(config_of(dataset, world, {}, dataset / "unused", 1), ranks)
    print(f"\n{'relative rows/s':<30}{'':>10}", flush=True)
    for name in names:
        torch.manual_seed(0)
        other = Stepper(config_of(dataset, world, CONTENDERS[name], dataset / "unused", 1), ranks)
        ratios = []
        for round_number in range(ROUNDS):
            took = [each.take(STEPS) for each in ((plain, other) if round_number % 2 else (other, plain))]
            ratios.append(took[0] / took[1] if round_number % 2 else took[1] / took[0])
        figures[f"{_word(name)}_rate"] = statistics.median(ratios[1:])
        print(f"{name:<30}{figures[f'{_word(name)}_rate']:>10.2f}", flush=True)
    return figures


class Stepper:
    """A model that takes steps on batches that are there already."""

    def __init__(self, config: Any, ranks: Any) -> None:
        from itertools import islice

        from trec_twotower.data.dataset import Dataset
        from trec_twotower.data.feature_dataset import FeatureDataset
        from trec_twotower.data.loading.loader import TrainBatches
        from trec_twotower.training.model_builder import build_model
        from trec_twotower.training.optimizer import RunOptimizer

        sources = FeatureDataset(Dataset(config.data.dataset), config.feature_schema, config.data.rows)
        batches = TrainBatches(sources, config.data, config.loss, sources.item_counts(), (0, 1))
        self.batches = list(islice(batches.iter_from(0, STEPS * 4), STEPS * 4))
        self.model = build_model(config, ranks)
        self.optimizer = RunOptimizer(self.model, config.train.optimizer)
        self.model.train()
        self.at = 0

    def take(self, steps: int) -> float:
        """Seconds of so many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            loss = self.model(self.batches[self.at % len(self.batches)])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.at += 1
        return time.perf_counter() - began


def _word(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    main()
