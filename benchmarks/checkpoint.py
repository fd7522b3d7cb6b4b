"""What a checkpoint costs a training, and how long it takes to go on from one.

    python benchmarks/checkpoint.py [--rows 1000000 20000000] [--dim 16] [--saves 3] [--json FILE]

A user table of that many rows with row-wise Adagrad, and the rest of the log of benchmarks/loading.py, one rank and one
thread; each size in processes of its own. Figures carry the table's rows in millions (save_stall_s_1m and so on).

save_stall_s       how long the training stands still for a save: its shards are copied, and written meanwhile
save_cost_s        by how much steps that run beside the writing are late in all, the standstill included
plain_save_s       the same state by torch.distributed.checkpoint.save, which knows no digests and no fsync
stall_vs_plain     plain_save_s over save_stall_s
resume_import_s    a new process until the package and its libraries are imported
resume_build_s     the model until its tables are filled with their first weights
resume_load_s      the newest checkpoint, digests verified
resume_step_s      the first step, with the reading of its rows
bytes              of the checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START = time.perf_counter()

from loading import ROOT, batches_of, config_of, generate  # noqa: E402
from machine import headline, write_figures  # noqa: E402

LOG_ROWS = 300_000


class Job:
    """A model with its optimizer, checkpoints and rows, as a run has them."""

    def __init__(self, folder: Path, rows: int, dim: int, ranks: Any) -> None:
        from trec_twotower.config.base import validate
        from trec_twotower.training.checkpoints.checkpoint import Checkpoints
        from trec_twotower.training.model_builder import build_model
        from trec_twotower.training.optimizer import RunOptimizer

        config = config_of(folder / "log")
        changed = {"tables": {**config.model_dump()["tables"], "user": {"buckets": rows, "dim": dim}}}
        config = validate(type(config), {**config.model_dump(exclude_unset=True), **changed}, "benchmark")
        started = time.perf_counter()
        self.model = build_model(config, ranks)
        self.optimizer = RunOptimizer(self.model, config.train.optimizer)
        self.optimizer.set_rates(0, 1)
        self.build_s = time.perf_counter() - started
        self.model.train()
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.checkpoints = Checkpoints(folder / "checkpoints", ranks, 2, in_background=True)

    def step(self, batch: Any) -> float:
        started = time.perf_counter()
        loss = self.model(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started


def saving(job: Job, folder: Path, saves: int) -> dict[str, float]:
    """Saves in the background with steps beside them, and plain ones, in turn."""
    import torch.distributed.checkpoint as dcp

    from trec_twotower.training.checkpoints.checkpoint import state_of

    batches = list(batches_of(folder / "log", threads=0).iter_from(0, 20))
    usual_s = statistics.median([job.step(batch) for batch in batches][4:])
    stalls, costs, plain = [], [], []
    for number in range(saves + 1):
        started = time.perf_counter()
        job.checkpoints.save(number + 1, job.model, job.optimizer, {})
        stall_s = time.perf_counter() - started
        steps = 0
        while job.checkpoints._save is not None and job.checkpoints._save.is_alive():
            job.step(batches[steps % len(batches)])
            steps += 1
        took = time.perf_counter() - started
        job.checkpoints.wait()
        by = folder / "plain"
        shutil.rmtree(by, ignore_errors=True)
        started = time.perf_counter()
        dcp.save(state_of(job.model, job.optimizer), checkpoint_id=by, no_dist=True)
        plain_s = time.perf_counter() - started
        shutil.rmtree(by)
        if number:  # the first one makes the copy's memory
            stalls.append(stall_s)
            costs.append(took - steps * usual_s)
            plain.append(plain_s)
    newest = job.checkpoints.complete()[-1]
    figures = {
        "save_stall_s": statistics.median(stalls),
        "save_cost_s": statistics.median(costs),
        "plain_save_s": statistics.median(plain),
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
    }
    return {**figures, "stall_vs_plain": figures["plain_save_s"] / figures["save_stall_s"]}


def resuming(job: Job, folder: Path, import_s: float) -> dict[str, float]:
    """The way of a new process to its first step."""
    started = time.perf_counter()
    newest = job.checkpoints.newest()
    assert newest is not None
    job.checkpoints.load(newest, job.model, job.optimizer)
    load_s = time.perf_counter() - started
    started = time.perf_counter()
    job.step(next(batches_of(folder / "log", threads=0).iter_from(7, 8)))
    step_s = time.perf_counter() - started
    return {
        "resume_import_s": import_s,
        "resume_build_s": job.build_s,
        "resume_load_s": load_s,
        "resume_step_s": step_s,
    }


def inside(what: str, folder: Path, rows: int, dim: int, saves: int) -> dict[str, float]:
    """What one process measures."""
    import trec_twotower.training.loop  # noqa: F401
    from trec_twotower.distributed.ranks import start_ranks

    import_s = time.perf_counter() - START
    with start_ranks(threads=1) as ranks:
        job = Job(folder, rows, dim, ranks)
        return saving(job, folder, saves) if what == "save" else resuming(job, folder, import_s)


def alone(what: str, folder: Path, rows: int, options: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, "-W", "ignore", __file__, "--inside", what, "--folder", folder, "--rows", rows]
    words += ["--dim", options.dim, "--saves", options.saves]
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 20_000_000], help="of the user table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files go meanwhile (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(options.inside, options.folder, options.rows[0], options.dim, options.saves)))
        return
    print(headline(), flush=True)
    figures: dict[str, float] = {}
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            generate(folder / "log", LOG_ROWS)
            found = {**alone("save", folder, rows, options), **alone("resume", folder, rows, options)}
        for name, value in found.items():
            figures[f"{name}_{rows // 1_000_000}m"] = value
            print(f"{name + f'_{rows // 1_000_000}m':<28}{value:>18,.3f}", flush=True)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
