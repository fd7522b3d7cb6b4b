"""`demo`: every stage in turn on a synthetic dataset, each with the command that a user would type."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from trec_twotower.commands.next_step import VARIABLE as NEXT_VARIABLE
from trec_twotower.errors import ConfigError
from trec_twotower.storage.atomic import read_json
from trec_twotower.storage.package_files import package_file

CONFIG = package_file("configs/demo.yaml")


def default_num_ranks() -> int:
    """Return two with two or more GPUs, else one: on a CPU, two ranks train half as fast as one rank with all cores."""
    import torch

    return 2 if torch.cuda.device_count() > 1 else 1


def run_demo(folder: Path, num_ranks: int | None = None) -> int:
    """Run every stage from prepare to report; return the exit code of the first that fails."""
    if num_ranks is None:
        num_ranks = default_num_ranks()
    if num_ranks < 1:
        raise ConfigError(f"--ranks is {num_ranks}: give 1 or more.")
    dataset, run = folder / "data" / "demo", folder / "runs" / "demo"
    _remove_earlier_run(run)
    started = time.perf_counter()
    alone = [sys.executable, "-m", "trec_twotower"]
    torchrun = [*alone, "launch", "--ranks", str(num_ranks)]
    stages = [
        [*alone, "prepare", "synthetic", "--out", str(dataset), "--overwrite"],
        [*torchrun, "train", str(CONFIG), f"data.dataset={dataset}", f"run_dir={run}"],
        [*torchrun, "export", str(run)],
        [*alone, "index", str(run)],
        [*torchrun, "evaluate", str(run), "--index"],
    ]
    for stage in stages:
        if code := _stage(stage):
            return code
    last = (["recommend", str(run), "--user", _some_user(dataset)], ["report", str(run)])
    for words in last:
        if code := _stage([*alone, *words]):
            return code
    status = read_json(run / "status.json")
    ranks = "1 rank" if status["num_ranks"] == 1 else f"{status['num_ranks']} ranks"
    print(
        f"\nTotal {time.perf_counter() - started:.0f} s (training {status['train_s']:.0f} s, "
        f"{status['rows_per_s']:,.0f} rows/s on {ranks}, peak RSS "
        f"{status['peak_rank_bytes'] / 2**20:,.0f} MiB per rank)."
    )
    print(f"dataset  {dataset}")
    print(f"run      {run}  (config.yaml, metrics.jsonl, checkpoints/, export/, index/, evaluation.json, report.html)")
    return 0


def _stage(command: list[str]) -> int:
    """Run one command with its output shown, under the line a user would type."""
    shown = ["trec-twotower", *("demo" if word == str(CONFIG) else word for word in command[3:])]
    shown = [
        os.path.relpath(word) if os.path.isabs(word) and Path(word).is_relative_to(Path.cwd()) else word
        for word in shown
    ]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    return subprocess.run(command, env={**os.environ, NEXT_VARIABLE: "0"}).returncode


def _remove_earlier_run(run: Path) -> None:
    """Remove the run of an earlier demo. Other directories are not removed."""
    if (run / "config.yaml").is_file():
        shutil.rmtree(run)


def _some_user(dataset: Path) -> str:
    """Return the first user of test/."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(sorted((dataset / "test").glob("*.parquet"))[0])
    return str(next(file.iter_batches(1, columns=["user_id"]))["user_id"][0].as_py())
