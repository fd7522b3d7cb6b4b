"""The training loop: batches in, checkpoints out."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.checkpoint import Checkpoints
from trec_twotower.config import RunConfig, config_hash
from trec_twotower.data.batch import Batch
from trec_twotower.data.features import Sources
from trec_twotower.data.hashing import mix
from trec_twotower.data.interactions import TrainBatches
from trec_twotower.distributed import Ranks
from trec_twotower.errors import TrainingError
from trec_twotower.files import write_json
from trec_twotower.model.embedding import fill_tables
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.optimizer import RunOptimizer, fuse_table_updates
from trec_twotower.run import Run, RunLog
from trec_twotower.sharding import shard

Evaluate = Callable[[TwoTower], dict[str, float]]


def build_model(config: RunConfig, ranks: Ranks) -> DistributedModelParallel:
    """The sharded model with its first weights, which depend on the seed alone."""
    schema = config.feature_schema
    torch.manual_seed(config.train.seed)
    model = TwoTower(schema, config.model, config.loss, ranks)
    model.user_tower.to(ranks.device)
    model.item_tower.to(ranks.device)
    fuse_table_updates(model, config.train.optimizer)
    sharded = shard(model, schema, ranks, config.data.batch_size // ranks.num_ranks + 1)
    fill_tables(sharded, schema, config.train.seed)
    return sharded


def towers(model: DistributedModelParallel) -> TwoTower:
    """The TwoTower inside, for encoding without gradients."""
    inner = model.module
    assert isinstance(inner, TwoTower)
    return inner


def train(config: RunConfig, ranks: Ranks, evaluate: Callable[[Sources], Evaluate] | None = None) -> Path:
    """Fit the two towers; return the run folder. The same call resumes a run that was cut short."""
    run = Run.join(config, ranks)
    sources = run.sources(ranks)
    share = (ranks.rank, ranks.num_ranks)
    on_gpu = ranks.device.type == "cuda"
    batches = TrainBatches(sources, config.data, config.loss, run.item_counts(), share, pin_memory=on_gpu)
    measure = evaluate(sources) if evaluate is not None else None
    model = build_model(config, ranks)
    optimizer = RunOptimizer(model, config.train.optimizer)
    checkpoints = Checkpoints(run.folder / "checkpoints", ranks, config.checkpoint.keep)
    progress = Progress(config, ranks, run, batches, checkpoints)
    progress.resume(model, optimizer)

    model.train()
    for batch in progress.waiting_for(batches.since(progress.step, progress.num_steps)):
        optimizer.set_rates(progress.step, progress.num_steps)
        seed_step(config.train.seed, progress.step, ranks.rank)
        loss = model(batch.to(ranks.device, non_blocking=True))
        progress.took(loss)  # looks at the loss first: the backward pass updates the tables at once
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.done()
        if measure is not None and progress.evaluates:
            progress.evaluated(measure(towers(model)), model, optimizer)
        if progress.saves:
            progress.save(model, optimizer)
    progress.finish()
    return run.folder


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what a step draws (dropout) a function of these three, so that a resumed run draws the same."""
    torch.manual_seed(mix(mix(mix(seed) ^ step) ^ rank))


class Progress:
    """Where a run stands: what is logged, evaluated and saved when, and the line that says so."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, run: Run, batches: TrainBatches, checkpoints: Checkpoints
    ) -> None:
        self.config, self.ranks, self.run, self.checkpoints = config, ranks, run, checkpoints
        self.steps_per_epoch = batches.steps_per_epoch
        self.num_steps = batches.steps_per_epoch * config.train.epochs
        self.num_rows = batches.num_rows
        self.step = 0
        self.saved_step = -1
        self.best = -math.inf
        self.train_s = self.evaluate_s = self.logged_s = self.waiting_s = 0.0
        self.losses: list[float] = []

    def resume(self, model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        newest = self.checkpoints.newest()
        if newest is not None:
            manifest = self.checkpoints.load(newest, model, optimizer)
            self.step = self.saved_step = manifest["step"]
            self.train_s, self.evaluate_s = manifest["train_s"], manifest["evaluate_s"]
            self.losses, self.logged_s = manifest["losses"], manifest["logged_s"]
            best = self.checkpoints.best()
            self.best = best["value"] if best is not None and best["step"] <= self.step else -math.inf
            self.say(f"resumed at step {self.step:,} of {self.num_steps:,} from {newest}")
        self.log = RunLog(self.run, self.ranks, self.step)
        self.logged_step = self.step - len(self.losses)
        self._started = time.perf_counter()

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that passes until each is there added up."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waiting_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def took(self, loss: torch.Tensor) -> None:
        value = self.ranks.mean(loss)
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss of step {self.step + 1:,} is {value}; nothing was updated by it. The newest checkpoint is "
                f"of step {max(self.saved_step, 0):,}. Lower train.optimizer.lr or raise loss.temperature, in a new "
                "run_dir."
            )
        self.losses.append(value)

    def done(self) -> None:
        self.step += 1
        now = time.perf_counter()
        self.train_s += now - self._started
        self._started = now
        if self.step % self.config.train.log_every == 0 or self.step == self.num_steps:
            self._log()

    def _log(self) -> None:
        passed_s = max(self.train_s - self.logged_s, 1e-9)
        steps = self.step - self.logged_step
        rows_per_s = steps * self.num_rows / self.steps_per_epoch / passed_s
        loss = sum(self.losses) / len(self.losses)
        left_s = (self.num_steps - self.step) * passed_s / steps
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        self.say(
            f"step {self.step:>6,}/{self.num_steps:,}  epoch {epoch}/{self.config.train.epochs}  loss {loss:.4f}  "
            f"{rows_per_s:>9,.0f} rows/s  {clock(left_s)} left"
        )
        self.log.write(self.step, "train", {"loss": loss, "rows_per_s": rows_per_s, "train_s": self.train_s})
        self.losses, self.logged_step, self.logged_s = [], self.step, self.train_s

    @property
    def evaluates(self) -> bool:
        return (
            self.step % (self.config.train.evaluate_every or self.steps_per_epoch) == 0 or self.step == self.num_steps
        )

    @property
    def saves(self) -> bool:
        is_due = self.step % (self.config.checkpoint.every or self.steps_per_epoch) == 0 or self.step == self.num_steps
        return is_due and self.saved_step != self.step

    def evaluated(self, metrics: dict[str, float], model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        model.train()
        now = time.perf_counter()
        self.evaluate_s += now - self._started
        self._started = now
        self.log.write(self.step, "valid", metrics)
        name = self.config.evaluate.best
        is_best = metrics[name] > self.best
        self.say(f"step {self.step:>6,}  valid {name} {metrics[name]:.4f}" + ("  (best so far)" if is_best else ""))
        if is_best:
            self.best = metrics[name]
            self.save(model, optimizer)
            self.checkpoints.mark_best(self.step, name, self.best)

    def save(self, model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        if self.saved_step != self.step:
            facts = {
                "config": config_hash(self.config),
                "seed": self.config.data.seed,
                "train_s": self.train_s,
                "evaluate_s": self.evaluate_s,
                "losses": self.losses,  # since the last logged step
                "logged_s": self.logged_s,
            }
            self.checkpoints.save(self.step, model, optimizer, facts)
            self.saved_step = self.step
            self.checkpoints.sweep()
        self._started = time.perf_counter()

    def finish(self) -> None:
        peak_bytes = max(self.ranks.sizes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        self.log.close()
        if self.ranks.is_first:
            status = {
                "state": "finished",
                "step": self.step,
                "best": self.checkpoints.best(),
                "train_s": round(self.train_s, 3),
                "waiting_s": round(self.waiting_s, 3),  # of train_s, for data, since the last start
                "evaluate_s": round(self.evaluate_s, 3),
                "rows_per_s": round(self.step * self.num_rows / self.steps_per_epoch / max(self.train_s, 1e-9), 1),
                "peak_rank_bytes": peak_bytes,
                "num_ranks": self.ranks.num_ranks,
            }
            write_json(self.run.folder / "status.json", status)
        took = f"{clock(self.train_s)} (and {clock(self.evaluate_s)} of evaluation)"
        self.say(f"trained {self.step:,} steps in {took}: {self.run.folder}")

    def say(self, line: str) -> None:
        if self.ranks.is_first:
            print(line, flush=True)


def clock(seconds: float) -> str:
    """90 -> "1m30s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
