"""The training loop: batches in, checkpoints out."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.config.compatibility import binding, config_hash
from trec_twotower.config.run_config import TRAINED, RunConfig
from trec_twotower.data.feature_dataset import Sources
from trec_twotower.data.feature_report import OwnItems
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.loading.streaming import Epochs, Passes, Stream
from trec_twotower.distributed.host_memory import peak_resident_bytes, resident_bytes
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.distributed.signals import STOPPING, StopSignals
from trec_twotower.distributed.watchdog import Heartbeat
from trec_twotower.errors import ConfigError, Stopped, TrainingError
from trec_twotower.model.cpu.embedding_update import quicken_updates
from trec_twotower.model.embeddings import fill_tables
from trec_twotower.model.finite_check import NotFinite
from trec_twotower.model.step_diagnostics import Histogram
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.hashing import mix
from trec_twotower.storage.atomic import MANIFEST, read_json, write_json
from trec_twotower.storage.fault_point import fault_point
from trec_twotower.storage.lock import RunLock
from trec_twotower.training.checkpoints.checkpoint import Checkpoints, versions
from trec_twotower.training.checkpoints.warm_start import Report, begin_with
from trec_twotower.training.checkpoints.weight_meaning import Meaning
from trec_twotower.training.collapse_guard import CollapseGuard, Finding, HasBaseline, baseline_name
from trec_twotower.training.diagnostics.crash_guard import (
    DIVERGED,
    Attempts,
    dead_vectors,
    dead_weights,
    describe_step,
    suspects,
)
from trec_twotower.training.hard_negatives import Neighbours, Refresh
from trec_twotower.training.optimizer import RunOptimizer, check_optimizer, fuse_table_updates
from trec_twotower.training.pipeline import Steps, Trace
from trec_twotower.training.run_dir import OWN_ITEMS, STATUS, Run, RunLog
from trec_twotower.training.sharding import placements, shard
from trec_twotower.training.spectral_initialization import check_start, start_spectral

Evaluate = Callable[[TwoTower], dict[str, float]]


def build_model(config: RunConfig, ranks: Ranks) -> DistributedModelParallel:
    """The sharded model with its first weights, which depend on the seed alone."""
    schema = config.feature_schema
    torch.manual_seed(config.train.seed)
    model = TwoTower(schema, config.model, config.loss, ranks)
    model.user_tower.to(ranks.device)
    model.item_tower.to(ranks.device)
    for tower in (model.user_tower, model.item_tower):
        tower.trains_as(config.train, ranks)
    check_optimizer(config.train.optimizer, schema, ranks.device.type)
    if config.train.start is not None:
        check_start(schema, config.train.start)
    fuse_table_updates(model, config.train.optimizer)
    sharded = shard(model, schema, ranks, config.data.batch_size // ranks.num_ranks + 1)
    quicken_updates(sharded)
    fill_tables(sharded, schema, config.train.seed)
    return sharded


def towers(model: DistributedModelParallel) -> TwoTower:
    """The TwoTower inside, for encoding without gradients."""
    inner = model.module
    assert isinstance(inner, TwoTower)
    return inner


def train(
    config: RunConfig,
    ranks: Ranks,
    evaluate: Callable[[Sources], Evaluate] | None = None,
    init_from: Path | None = None,
    neighbours: Neighbours | None = None,
) -> Path:
    """Fit the two towers; return the run folder. The same call resumes a run that was cut short.

    `init_from` is a run whose best weights a new run begins with, where they fit; `neighbours` is the index package's,
    for loss.negatives.refresh. Raises Stopped when a signal ended
    the training after a step, which is then saved; TrainingError when it cannot go on.
    """
    assert config.run_dir is not None
    lock = RunLock(config.run_dir)
    with Heartbeat(ranks) as heartbeat:
        ranks.once(lock.acquire)
        try:
            with StopSignals() as signals:
                fault_point("start:locked")
                if config.ends_in_closed_form:
                    assert config.train.start is not None
                    check_start(config.feature_schema, config.train.start)
                    ranks.once(lambda: _check_epochs(config))
                    before = config.without_closed_form
                    init_from = _train(before, ranks, evaluate, init_from, neighbours, heartbeat, signals, lock)
                return _train(config, ranks, evaluate, init_from, neighbours, heartbeat, signals, lock)
        finally:
            lock.release()


def _train(
    config: RunConfig,
    ranks: Ranks,
    evaluate: Callable[[Sources], Evaluate] | None,
    init_from: Path | None,
    neighbours: Neighbours | None,
    heartbeat: Heartbeat,
    signals: StopSignals,
    lock: RunLock,
) -> Path:
    run = Run.join(config, ranks)
    sources = run.sources(ranks, trains=True)
    passes = passes_of(run, sources, ranks)
    measure = Measure(evaluate, passes)
    fault_point("start:read")
    model = build_model(config, ranks)
    optimizer = RunOptimizer(model, config.train.optimizer)
    fault_point("start:built")
    checkpoints = Checkpoints(
        run.folder / "checkpoints",
        ranks,
        config.checkpoint.keep,
        binding(config),
        in_background=config.checkpoint.in_background,
        check=lock.check,
    )
    ranks.once(checkpoints.recover)
    progress = Progress(config, ranks, run, passes, checkpoints, heartbeat, signals, lock)
    is_new = checkpoints.newest() is None
    progress.resume(model, optimizer, init_from)
    if config.train.start is not None and is_new and (init_from is None or config.ends_in_closed_form):
        heartbeat.doing = "its closed form"
        start_spectral(model, config.feature_schema, config.train.start, sources, config.train.seed, ranks)
    progress.own_items = ranks.once(run.own_items)
    if progress.own_items is not None:
        progress.say(progress.own_items.in_words)
    if config.loss.negatives.refresh is not None:
        passes.lists_at = Refresh(run, ranks, towers(model), neighbours, progress.step, progress.say).at
    if progress.owes_evaluation:
        progress.look(measure, model, optimizer)

    steps = Steps.of(config.train, model, optimizer, ranks)
    measure.pause = progress.pause = steps.pause

    def forward(batch: Batch) -> torch.Tensor:
        progress.begins()
        optimizer.set_rates(progress.step, progress.num_steps)
        seed_step(config.train.seed, progress.step, ranks.rank)
        towers(model).watch.is_wanted = progress.is_logged_next
        loss = model(batch)
        progress.took(loss, batch)  # looks at the loss first: the backward pass updates the tables at once
        return loss

    model.train()
    try:
        with Trace(config.train.profile_steps, run.folder, ranks) as trace:
            for _ in steps.taken(progress.waiting_for(passes.since(progress.step)), forward):
                progress.done()
                trace.step_is_done()
                progress.stop_if_told(model, optimizer)
                progress.look(measure, model, optimizer)
        progress.stop_if_told(model, optimizer)
        progress.look(measure, model, optimizer)  # a stream ends when no more steps have come: only now is it known
        progress.finish()
    except NotFinite as found:  # on all ranks, before that update
        progress.refuse(str(found))
    finally:
        checkpoints.close()
    return run.folder


def _check_epochs(config: RunConfig) -> None:
    """Raises ConfigError where a closed form stands beside what was trained, which is now to be trained further."""
    assert config.run_dir is not None
    if any((config.run_dir / "checkpoints").glob(f"step-*/{MANIFEST}")):
        had = Run.open(config.run_dir).config.train.epochs
        if had != config.train.epochs:
            raise ConfigError(
                f"{config.run_dir} was trained for {had} epochs before its closed form was set beside it, now "
                f"train.epochs is {config.train.epochs}: train in a folder of its own (run_dir=...)."
            )


def passes_of(run: Run, sources: Sources, ranks: Ranks) -> Passes:
    """The run's batches: of its dataset so many times over, or of a folder that grows."""
    config, on_gpu = run.config, ranks.device.type == "cuda"
    ranks.once(run.check_files)
    generations = run.generations(ranks)
    if generations is not None:
        return Stream(generations, sources, config.data, config.loss, run.folder, ranks, pin_memory=on_gpu)
    share = (ranks.rank, ranks.num_ranks)
    batches = TrainBatches(sources, config.data, config.loss, run.counts(), share, pin_memory=on_gpu)
    return Epochs(batches, 0 if config.ends_in_closed_form else config.train.epochs)


class Measure:
    """What `evaluate` makes of the data, and makes again when items or users have come."""

    def __init__(self, evaluate: Callable[[Sources], Evaluate] | None, passes: Passes) -> None:
        self.evaluate = evaluate
        self.passes = passes
        self.pause: Callable[[], None] = lambda: None  # is called before the model is used
        self._begin()

    def _begin(self) -> None:
        self.sources = self.passes.sources
        self.of_data = self.evaluate(self.sources) if self.evaluate is not None else None
        self._popularity: dict[str, float] | None = None

    def popularity(self) -> dict[str, float] | None:
        """Return the metrics of ranking by popularity, computed once for the data; None where they cannot be."""
        evaluate: object = self.of_data
        count_I = self.passes.item_counts
        if self._popularity is None and count_I is not None and isinstance(evaluate, HasBaseline):
            self._popularity = evaluate.popularity(count_I)
        return self._popularity

    def __call__(self, model: TwoTower) -> dict[str, float] | None:
        """The metrics; None where there is nothing to measure by."""
        now = self.passes.sources
        if now.catalogue is not self.sources.catalogue or now.users is not self.sources.users:
            self._begin()
        if self.of_data is None:
            return None
        self.pause()
        return self.of_data(model)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what a step draws (dropout) a function of these three, so that a resumed run draws the same."""
    torch.manual_seed(mix(mix(mix(seed) ^ step) ^ rank))


class Progress:
    """Where a run stands: what is logged, evaluated and saved when, and the line that says so."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        run: Run,
        passes: Passes,
        checkpoints: Checkpoints,
        heartbeat: Heartbeat,
        signals: StopSignals,
        lock: RunLock,
    ) -> None:
        self.config, self.ranks, self.run, self.checkpoints = config, ranks, run, checkpoints
        self.passes, self.heartbeat, self.signals, self.lock = passes, heartbeat, signals, lock
        if isinstance(passes, Stream):
            passes.is_stopped = self.agrees_to_stop
        self.told_to_stop: signal.Signals | None = None  # what all ranks have agreed on
        self.owes_evaluation = False  # of the checkpoint it began with
        self.valid: dict[str, Any] = {}  # what was measured after this step
        self.attempts = Attempts(run.folder, ranks, config.train.max_failures)
        self.guard = CollapseGuard(config)
        self.follows = config.data.follow is not None
        self.own_items: OwnItems | None = None  # that are left out, of the rows that the run began with
        self.step = 0
        self.saved_step = self.evaluated_step = self.checked_step = -1
        self.best = -math.inf
        self.train_s = self.evaluate_s = self.logged_s = self.waiting_s = self.logged_waiting_s = 0.0
        self.losses: list[float] = []

    @property
    def num_steps(self) -> int:
        """Of a stream, as far as is known."""
        return self.passes.num_steps

    def resume(self, model: DistributedModelParallel, optimizer: RunOptimizer, init_from: Path | None = None) -> None:
        self.heartbeat.doing = "the load of its checkpoint"
        newest = self.checkpoints.newest()
        if newest is not None:
            manifest = self.checkpoints.load(newest, model, optimizer)
            if not self.follows and manifest["step"] > self.num_steps:
                raise ConfigError(
                    f"{newest} is of step {manifest['step']:,}, but train.epochs = {self.config.train.epochs} are only "
                    f"{self.num_steps:,} steps: set it to as many as are done, or more, or train in a folder of its "
                    "own (run_dir=...)."
                )
            self.ranks.once(self.run.keep_config)
            self.step = self.saved_step = self.evaluated_step = manifest["step"]
            self.train_s, self.evaluate_s = manifest["train_s"], manifest["evaluate_s"]
            self.losses, self.logged_s = manifest["losses"], manifest["logged_s"]
            self.owes_evaluation = manifest["owes_evaluation"]
            if self.owes_evaluation:
                self.evaluated_step = -1
            best = self.ranks.once(self.checkpoints.best)
            label = self.config.evaluate.best_label
            self.best = best["value"] if best is not None and best["metric"] == label else -math.inf
            self.say(f"resumed at step {self.step:,} of {self.num_steps:,} from {newest}")
        report = self._begin_with(init_from, model) if newest is None and init_from is not None else None
        self.attempts.begin(self.step, self.passes)
        self.log = RunLog(self.run, self.ranks, self.step)
        self.guard.resume(self.ranks.once(self.log.warnings_and_last_validation))
        if report is not None:
            self.log.note(self.step, "init_from", report.facts)
        self.model, self.optimizer = towers(model), optimizer
        self.logged_step = self.step - len(self.losses)
        self._started = time.perf_counter()

    def _begin_with(self, init_from: Path, model: DistributedModelParallel) -> Report:
        """Take the weights of another run that mean the same in this one, and report which."""
        report = begin_with(model, Meaning.of_saved(self.run), Run.open(init_from), self.ranks)
        towers(model).forget()
        self.say(report.text)
        if self.config.ends_in_closed_form:
            self.say("  The skipped tables are filled by the closed form.")
        return report

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that passes until each is there added up."""
        while True:
            asked = time.perf_counter()
            self.heartbeat.doing = f"step {self.step + 1:,} (its rows)"
            batch = next(batches, None)
            if self.follows and self.passes.is_end(self.step):  # waiting for new files is no part of training
                self._started = time.perf_counter()
            else:
                self.waiting_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def begins(self) -> None:
        """A step does, with rows that may have come some steps ago."""
        self.heartbeat.doing = f"step {self.step + 1:,}"
        self.attempts.comes_to(self.step + 1)

    @property
    def is_logged_next(self) -> bool:
        """Whether the step under way will be logged, as far as is known."""
        step = self.step + 1
        return step % self.config.train.log_every == 0 or (not self.follows and self.passes.is_over(step))

    def took(self, loss: torch.Tensor, batch: Batch) -> None:
        """Agree with the other ranks on the loss, on whether someone told one of them to stop, and on failed saves."""
        fault_point("step:forward", self.step + 1)
        self.under_way = loss.detach(), batch
        value = self._agree(float(loss.detach()))
        if not math.isfinite(value):
            self.refuse(f"The loss of step {self.step + 1:,} is {value}")
        self.losses.append(value)

    def _agree(self, value: float = 0.0) -> float:
        """The mean of `value` over ranks; sets `told_to_stop` on all.

        Raises on all ranks where a save has failed, or where the run directory was moved.
        """
        told = [self.signals.received == each for each in STOPPING]
        is_moved = self.ranks.is_first and not self.lock.is_in_place
        total = self.ranks.sum(np.array([value, *told, is_moved, self.checkpoints.has_failed]))
        self.told_to_stop = next((each for each, count in zip(STOPPING, total[1:-2], strict=True) if count), None)
        if total[-2]:
            self.ranks.once(self.lock.check)
        if total[-1]:
            self.checkpoints.wait()
        return float(total[0]) / self.ranks.num_ranks

    def agrees_to_stop(self) -> bool:
        """Whether all ranks stop now, which wait together for new files."""
        self._agree()
        return self.told_to_stop is not None

    def refuse(self, found: str) -> NoReturn:
        """Leave what is known of the step under way, which cannot be taken, and end the run."""
        folder = self.run.folder / f"not-finite-step-{self.step + 1:08d}"
        assert self.under_way is not None
        describe_step(folder, self.ranks, self.step + 1, found, *self.under_way, self.passes)
        of_ranks = self.ranks.collect(suspects(self.config.feature_schema, self.under_way[1]))
        absurd = list(dict.fromkeys(each for rank in of_ranks for each in rank))
        fix = "Lower train.optimizer.lr or raise loss.temperature"
        if absurd:
            fix = f"In this step {' and '.join(absurd[:4])}: scale such values down in the data"
        raise TrainingError(
            f"{found}; nothing was updated by it. Its rows and what their features hold are in {folder}. The newest "
            f"checkpoint is of step {max(self.saved_step, 0):,}. {fix}, and train in a new run_dir."
        )

    def done(self) -> None:
        fault_point("step:updated", self.step + 1)
        if self.is_first_step:
            self.ranks.is_under_way()
            self.is_first_step = False
        self.step += 1
        self.valid = {}
        now = time.perf_counter()
        self.train_s += now - self._started
        self._started = now
        may_be_last = self.passes.is_end(self.step) if self.follows else self.passes.is_over(self.step)
        if self.step % self.config.train.log_every == 0 or may_be_last:
            self._log()

    is_first_step = True  # since the start
    pause: Callable[[], None] = staticmethod(lambda: None)  # is called before the model is used between two steps
    under_way: tuple[torch.Tensor, Batch] | None = None  # the loss and the rows of the newest step since the start

    def _log(self) -> None:
        passed_s = max(self.train_s - self.logged_s, 1e-9)
        steps = self.step - self.logged_step
        rows_per_s = (self.passes.rows_before(self.step) - self.passes.rows_before(self.logged_step)) / passed_s
        loss = sum(self.losses) / len(self.losses)
        left_s = (self.num_steps - self.step) * passed_s / steps
        self.say(
            f"step {self.step:>6,}/{self.num_steps:,}  {self.passes.place(self.step)}  loss {loss:.4f}  "
            f"{rows_per_s:>9,.0f} rows/s  {clock(left_s)} left"
        )
        waited_s, self.logged_waiting_s = self.waiting_s - self.logged_waiting_s, self.waiting_s
        measured: dict[str, float | Histogram] = {
            "loss": loss,
            **self.model.figures(),
            **self.optimizer.figures(),
            "rows_per_s": rows_per_s,
            "waiting_share": min(waited_s / passed_s, 1.0),
            "train_s": self.train_s,
            **memory_figures(self.ranks),
        }
        self.log.write(self.step, "train", measured)
        scores = measured.get("negative_scores")
        if isinstance(scores, Histogram) and self.model.has_cosine_scores and self._is_pass_end():
            self._warn(self.guard.trained(scores.mean()))
        self.losses, self.logged_step, self.logged_s = [], self.step, self.train_s

    def look(self, measure: Measure, model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        """Evaluate and save, each where it is due and not yet done."""
        if self._is_due(self.config.train.evaluate_every) and self.evaluated_step != self.step:
            self.evaluated_step = self.step
            self._check_numbers(model, optimizer)
            metrics = measure(towers(model))
            if metrics is not None:
                best, popularity = self.config.evaluate.best, measure.popularity()
                if popularity is not None:
                    metrics = {**metrics, baseline_name(best): popularity[best]}
                self.evaluated(metrics, model, optimizer)
        if self._is_due(self.config.checkpoint.every) and self.saved_step != self.step:
            self.save(model, optimizer)

    def _is_due(self, every: int | None) -> bool:
        is_time = self.step % every == 0 if every is not None else self.passes.is_end(self.step)
        return is_time or self.passes.is_over(self.step)

    def _is_pass_end(self) -> bool:
        return self.passes.is_end(self.step) or self.passes.is_over(self.step)

    def _warn(self, findings: list[Finding]) -> None:
        """Print warnings, and write them to metrics.jsonl."""
        for finding in findings:
            self.say(finding.message)
            self.log.warn(self.step, finding.as_values())

    def evaluated(self, metrics: dict[str, float], model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        model.train()
        now = time.perf_counter()
        self.evaluate_s += now - self._started
        self._started = now
        self.log.write(self.step, "valid", metrics)
        name = self.config.evaluate.best
        self.valid = {"metric": self.config.evaluate.best_label, "value": metrics[name]}
        is_best = metrics[name] > self.best
        self.say(f"step {self.step:>6,}  valid {name} {metrics[name]:.4f}" + ("  (best so far)" if is_best else ""))
        self._warn(self.guard.validated(metrics, is_pass_end=self._is_pass_end()))
        if is_best:
            self.best = metrics[name]
        if is_best or self.owes_evaluation:
            self.saved_step = -1  # a checkpoint without its value would lose it
            self.owes_evaluation = False
            self.save(model, optimizer)

    def save(self, model: DistributedModelParallel, optimizer: RunOptimizer, *, owes_evaluation: bool = False) -> None:
        if self.saved_step != self.step:
            self._check_numbers(model, optimizer)
            self.heartbeat.doing = f"the checkpoint of step {self.step:,}"
            facts = {
                "cursor": self.step,
                "place": self.passes.place(self.step),
                "seed": self.config.data.seed,
                "config": config_hash(self.config),
                "settings": binding(self.config),
                "data": self.passes.sources.dataset.fingerprint,
                "plan": [asdict(placement) for placement in placements(model.plan)],
                "versions": versions(),
                "precision": self.ranks.precision(self.config.train.precision),  # what auto was
                "valid": self.valid,
                "owes_evaluation": owes_evaluation,
                "train_s": self.train_s,
                "evaluate_s": self.evaluate_s,
                "losses": list(self.losses),  # since the last logged step
                "logged_s": self.logged_s,
            }
            self.checkpoints.save(self.step, model, optimizer, facts)
            self.saved_step = self.step
        self._started = time.perf_counter()

    def _check_numbers(self, model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        """Raise TrainingError on all ranks where the weights or the last batch's vectors are dead (see failures.py)."""
        if self.checked_step == self.step:
            return
        self.checked_step = self.step
        found = next(filter(None, self.ranks.collect(dead_weights(model, optimizer))), None)
        if found is None and self.under_way is not None:
            self.pause()
            found = dead_vectors(towers(model), self.under_way[1], self.ranks)
        if found is not None:
            path = self.checkpoints.newest()
            newest = "There is no checkpoint yet." if path is None else f"The newest checkpoint is {path}."
            raise TrainingError(DIVERGED.format(step=self.step, found=found, newest=newest))

    def stop_if_told(self, model: DistributedModelParallel, optimizer: RunOptimizer) -> None:
        """Save and raise Stopped, when a rank was told to by a signal and all have agreed on it in this step."""
        told = self.told_to_stop
        if told is None or (self.passes.is_over(self.step) and not self.follows):
            return
        is_due = self._is_due(self.config.train.evaluate_every) and self.evaluated_step != self.step
        self.save(model, optimizer, owes_evaluation=is_due)
        self.checkpoints.wait()
        fault_point("stop:saved", self.step)
        self.log.close()
        self.attempts.end()
        if self.ranks.is_first:
            status = {
                "state": "stopped",
                "step": self.step,
                "of_steps": self.num_steps,
                "reason": f"told to by {told.name}",
                "exit_code": 128 + told,
                "meaning": "Saved after this step; the same command goes on from there.",
            }
            write_json(self.run.folder / STATUS, status)
        raise Stopped(
            f"stopped by {told.name} after step {self.step:,} of {self.num_steps:,}, which is saved; the same command "
            "goes on from there.",
            told,
        )

    def finish(self) -> None:
        self.heartbeat.doing = "its end"
        self.checkpoints.wait()
        self.ranks.once(self.lock.check)
        self.attempts.end()
        peak_bytes = self.ranks.sizes(peak_resident_bytes())
        self.log.close()
        if self.ranks.is_first:
            status = {
                "state": "finished",
                "step": self.step,
                "of_steps": self.num_steps,
                "reason": "no new files came" if self.follows else "all its epochs are done",
                "exit_code": 0,
                "meaning": "Nothing is left to do; the same command takes what has come since."
                if self.follows
                else "Nothing is left to do; more train.epochs go on from here.",
                "best": self.checkpoints.best(),
                "train_s": round(self.train_s, 3),
                "waiting_s": round(self.waiting_s, 3),  # of train_s, for data, since the last start
                "evaluate_s": round(self.evaluate_s, 3),
                "rows_per_s": round(self.passes.rows_before(self.step) / max(self.train_s, 1e-9), 1),
                OWN_ITEMS: None if self.own_items is None else asdict(self.own_items),
                "peak_rank_bytes": max(peak_bytes),
                "peak_bytes_by_rank": peak_bytes,
                "num_ranks": self.ranks.num_ranks,
            }
            write_json(self.run.folder / STATUS, status)
            self.say(self._summary())

    def _summary(self) -> str:
        """Return the last line of a finished training."""
        step, train_s, evaluate_s, added = self.step, self.train_s, self.evaluate_s, ""
        if self.config.ends_in_closed_form:  # its steps are those of the run in RUN/trained
            trained = read_json(self.run.folder / TRAINED / STATUS)
            step, train_s, evaluate_s = trained["step"], trained["train_s"], trained["evaluate_s"]
            added = ", then added the closed form of train.start"
        elif not step and self.config.train.start is not None:
            return f"the weights are the closed form of train.start; train.epochs is 0: {self.run.folder}"
        times = f"{clock(train_s)} (and {clock(evaluate_s)} of evaluation)"
        return f"trained {step:,} steps in {times}{added}: {self.run.folder}"

    def say(self, line: str) -> None:
        if self.ranks.is_first:
            print(line, flush=True)


def memory_figures(ranks: Ranks) -> dict[str, float]:
    """The most that any rank holds now, and of its GPU has held since the last call; all ranks call together."""
    figures = {"resident_bytes": float(max(ranks.sizes(resident_bytes())))}
    if ranks.device.type == "cuda":
        figures["gpu_peak_bytes"] = float(max(ranks.sizes(torch.cuda.max_memory_allocated())))
        torch.cuda.reset_peak_memory_stats()
    return figures


def clock(seconds: float) -> str:
    """90 -> "1m30s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
