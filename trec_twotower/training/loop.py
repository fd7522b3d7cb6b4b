"""The training loop: batches in, checkpoints out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.config.run_config import TRAINED, RunConfig
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.loading.streaming import Epochs, Stream, TrainData
from trec_twotower.distributed.host_memory import peak_resident_bytes
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.distributed.signals import StopSignals
from trec_twotower.distributed.watchdog import Heartbeat
from trec_twotower.errors import ConfigError, Stopped, TrainingError
from trec_twotower.model.finite_check import NotFiniteError
from trec_twotower.ops.hashing import mix
from trec_twotower.storage.atomic import read_json, write_json
from trec_twotower.storage.fault_point import fault_point
from trec_twotower.storage.lock import RunLock
from trec_twotower.storage.manifest import MANIFEST
from trec_twotower.training.checkpoints.checkpoint_manager import CheckpointManager
from trec_twotower.training.checkpoints.trainer_state import Stopwatch, TrainerState
from trec_twotower.training.checkpoints.warm_start import Report, begin_with
from trec_twotower.training.checkpoints.weight_meaning import Meaning
from trec_twotower.training.diagnostics.crash_guard import CrashGuard
from trec_twotower.training.diagnostics.divergence import DivergenceCheck
from trec_twotower.training.diagnostics.profiler import Trace
from trec_twotower.training.diagnostics.step_monitor import StepMonitor
from trec_twotower.training.diagnostics.step_report import suspect_values, write_step_report
from trec_twotower.training.hard_negatives import HardNegatives, Neighbours
from trec_twotower.training.metrics_logger import MetricsLogger, format_duration
from trec_twotower.training.model_builder import build_model, inner_model
from trec_twotower.training.optimizer import RunOptimizer
from trec_twotower.training.pipeline import build_pipeline
from trec_twotower.training.run_dir import OWN_ITEMS, STATUS, Run
from trec_twotower.training.spectral_initialization import check_start, start_spectral
from trec_twotower.training.validator import MakeEvaluate, Measurement, Validator


@dataclass(frozen=True)
class Job:
    """This process in a training: its ranks, and what is entered for as long as the training runs."""

    ranks: Ranks
    heartbeat: Heartbeat
    lock: RunLock
    signals: StopSignals


def train(
    config: RunConfig,
    ranks: Ranks,
    evaluate: MakeEvaluate | None = None,
    init_from: Path | None = None,
    neighbours: Neighbours | None = None,
) -> Path:
    """Train both towers and return the run directory; the same call resumes an interrupted run.

    `evaluate` makes the validation of a dataset. `init_from` is a run whose best weights a new run starts with, where
    they fit. `neighbours` is the search of the index package, for loss.negatives.refresh. Raises Stopped when a signal
    ended the training after a step, which is then saved; TrainingError when it cannot continue.
    """
    assert config.run_dir is not None
    with Heartbeat(ranks) as heartbeat, _locked(config.run_dir, ranks) as lock, StopSignals() as signals:
        fault_point("start:locked")
        job = Job(ranks, heartbeat, lock, signals)
        if config.ends_in_closed_form:
            assert config.train.spectral is not None
            check_start(config.feature_schema, config.train.spectral)
            ranks.once(lambda: _check_epochs(config))
            init_from = _train(config.without_closed_form, job, evaluate, init_from, neighbours)
        return _train(config, job, evaluate, init_from, neighbours)


def _train(
    config: RunConfig, job: Job, evaluate: MakeEvaluate | None, init_from: Path | None, neighbours: Neighbours | None
) -> Path:
    trainer = Trainer(config, job, evaluate, init_from, neighbours)
    try:
        trainer.fit()
    finally:
        trainer.checkpoints.close()
    return trainer.run.folder


class Trainer:
    """One start of a training: its set-up in the constructor, its loop in `fit`."""

    def __init__(
        self,
        config: RunConfig,
        job: Job,
        evaluate: MakeEvaluate | None,
        init_from: Path | None,
        neighbours: Neighbours | None,
    ) -> None:
        self.config, self.job, self.ranks = config, job, (ranks := job.ranks)
        self.run = run = Run.create_or_open(config, ranks)
        sources = run.initialize(ranks) or run.open_dataset(ranks, for_training=True)
        self.data = build_train_data(run, sources, ranks)
        measurement = Measurement(evaluate, self.data)
        fault_point("start:read")
        self.model = build_model(config, ranks)
        self.optimizer = RunOptimizer(self.model, config.train.optimizer)
        fault_point("start:built")
        self.stopwatch = Stopwatch()
        self.checkpoints = CheckpointManager(run, ranks, self.data, job.heartbeat, self.stopwatch, job.lock.check)
        job.heartbeat.set_phase("the load of its checkpoint")
        restored = self.checkpoints.restore(self.model, self.optimizer)
        self.state = restored or TrainerState()
        report = warm_start(self.model, run, init_from, ranks) if restored is None and init_from is not None else None
        self.crash_guard = CrashGuard(run.folder, ranks, config.train.max_failures)
        self.crash_guard.begin(self.state.step, self.data)
        self.logger = MetricsLogger(run, ranks, self.data, self.stopwatch, self.state.step)
        if report is not None:
            self.logger.note(self.state.step, "init_from", report.facts)
        self.stopwatch.restart()
        if restored is None and (init_from is None or config.ends_in_closed_form):
            self._fill_by_closed_form(sources)
        self.own_items = ranks.once(run.own_items)
        if self.own_items is not None:
            self.logger.print(self.own_items.describe)
        inner = inner_model(self.model)
        self.hard_negatives: HardNegatives | None = None
        if config.loss.negatives.refresh is not None:
            self.hard_negatives = HardNegatives(run, ranks, inner, neighbours, self.state.step, self.logger.print)
        self.pipeline = build_pipeline(config.train, self.model, self.optimizer, ranks)
        self.divergence = DivergenceCheck(self.model, self.optimizer, self.pipeline, self.checkpoints, ranks)
        self.validator = Validator(
            config,
            measurement,
            self.model,
            self.pipeline,
            self.logger,
            self.stopwatch,
            best=self.checkpoints.best_value(),
            evaluated_step=-1 if restored is None or restored.owes_evaluation else restored.step,
        )
        self.monitor = StepMonitor(ranks, job.signals, job.lock, inner.gradient_check, self.checkpoints)

    def fit(self) -> None:
        """Train to the end of the data. Raises Stopped, when a signal ended it after a step, which is then saved."""
        state, data = self.state, self.data
        if state.owes_evaluation:
            self._evaluate_and_save()
        self.model.train()
        hard_negatives_at = None if self.hard_negatives is None else self.hard_negatives.at
        batches = data.iter_from(state.step, hard_negatives_at, self.monitor.agrees_to_stop)
        try:
            with Trace(self.config.train.profile_steps, self.run.folder, self.ranks) as trace:
                for _ in self.pipeline.run(await_rows(batches, self), self._forward):
                    self._finish_step(state.step + 1)
                    trace.end_step()
                    self._stop_if_agreed()
                    self._evaluate_and_save()
            self._stop_if_agreed()
            self._evaluate_and_save()  # the end of a stream is known only when no more batches have come
        except NotFiniteError as error:
            self._refuse(error)
        self._write_finished()

    def _forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch: a step up to its backward pass."""
        step = self.state.step + 1
        self.job.heartbeat.set_phase(f"step {step:,}")
        self.crash_guard.begin_step(step)
        self.optimizer.set_rates(step - 1, self.data.num_steps)
        seed_step(self.config.train.seed, step - 1, self.ranks.rank)
        loss: Tensor = self.model(batch, with_diagnostics=self.logger.needs_diagnostics(step))
        self._step_under_way = loss.detach(), batch
        self.monitor.after_forward(step, loss)  # before the backward pass, which updates the tables at once
        return loss

    def _finish_step(self, step: int) -> None:
        """Count a step whose weights are updated, and log it where that is due."""
        is_logged = self.logger.is_due(step)
        must_agree = is_logged or self.validator.is_due(step) or self.checkpoints.is_due(step)
        losses = self.monitor.after_update(step, must_agree=must_agree)
        self.state.advance(losses, self.stopwatch.lap())
        if is_logged:
            self.logger.log_training(self.state, inner_model(self.model), self.optimizer)

    def _evaluate_and_save(self) -> None:
        """Evaluate and save, each where it is due and not yet done."""
        step = self.state.step
        is_evaluated, is_saved = self.validator.is_due(step), self.checkpoints.is_due(step)
        if is_evaluated or is_saved:
            self.divergence.check(step)
        must_save = is_evaluated and self.validator.run(self.state)
        if must_save or is_saved:
            self.checkpoints.save(self.state, self.model, self.optimizer, again=must_save)

    def _fill_by_closed_form(self, sources: FeatureDataset) -> None:
        """Fill the tables that train.spectral names."""
        start = self.config.train.spectral
        if start is not None:
            self.job.heartbeat.set_phase("its closed form")
            schema, seed = self.config.feature_schema, self.config.train.seed
            start_spectral(self.model, schema, start, sources, seed, self.ranks)

    def _refuse(self, error: NotFiniteError) -> NoReturn:
        """Write a report of a step whose loss or gradient is not finite, and end the training."""
        assert self._step_under_way is not None
        step = self.state.step + 1 if error.step is None else error.step
        loss, batch = self._step_under_way
        value = float(loss) if error.loss is None else error.loss
        if step != self.state.step + 1:  # found some steps later, on a GPU
            batch = next(self.data.iter_from(step - 1, None if self.hard_negatives is None else self.hard_negatives.at))
        folder = self.run.folder / f"not-finite-step-{step:08d}"
        write_step_report(folder, self.ranks, step, str(error), value, batch, self.data)
        of_ranks = self.ranks.collect(suspect_values(self.config.feature_schema, batch))
        suspects = list(dict.fromkeys(each for rank in of_ranks for each in rank))
        fix = "Lower train.optimizer.lr or raise loss.temperature"
        if suspects:
            fix = f"In this step {' and '.join(suspects[:4])}: scale such values down in the data"
        outcome = "nothing was updated by it" if self.ranks.device.type == "cpu" else "nothing that it updated is saved"
        raise TrainingError(
            f"{error}; {outcome}. Its rows and what their features hold are in {folder}. The newest checkpoint is of "
            f"step {self.checkpoints.saved_step:,}. {fix}, and train in a new run_dir."
        )

    def _stop_if_agreed(self) -> None:
        """Save and raise Stopped, where a rank received a signal and all have agreed on it."""
        received, state = self.monitor.stop_signal, self.state
        if received is None or (self.data.is_over(state.step) and self.config.data.follow is None):
            return
        state.owe_evaluation(is_due=self.validator.is_due(state.step))
        self.divergence.check(state.step)
        self.checkpoints.save(state, self.model, self.optimizer)
        self.checkpoints.wait()
        fault_point("stop:saved", state.step)
        self.logger.close()
        self.crash_guard.end()
        if self.ranks.is_first:
            status = {
                "state": "stopped",
                "step": state.step,
                "of_steps": self.data.num_steps,
                "reason": f"stopped by {received.name}",
                "exit_code": 128 + received,
                "meaning": "Saved after this step; the same command resumes from there.",
            }
            write_json(self.run.folder / STATUS, status)
        raise Stopped(
            f"stopped by {received.name} after step {state.step:,} of {self.data.num_steps:,}, which is saved; the "
            "same command resumes from there.",
            received,
        )

    def _write_finished(self) -> None:
        """End a training whose steps are all done."""
        self.job.heartbeat.set_phase("its end")
        self.checkpoints.wait()
        self.ranks.once(self.job.lock.check)
        self.crash_guard.end()
        peak_bytes = self.ranks.sizes(peak_resident_bytes())
        self.logger.close()
        if self.ranks.is_first:
            own = None if self.own_items is None else asdict(self.own_items)
            status = {
                **finished_status(self.config, self.state, self.data, self.stopwatch.waiting_s),
                "best": self.checkpoints.best(),
                OWN_ITEMS: own,
                "peak_rank_bytes": max(peak_bytes),
                "peak_bytes_by_rank": peak_bytes,
                "num_ranks": self.ranks.num_ranks,
            }
            write_json(self.run.folder / STATUS, status)
            self.logger.print(summary_line(self.config, self.state, self.run.folder))

    _step_under_way: tuple[Tensor, Batch] | None = None  # the loss and the batch of the newest step since the start


def await_rows(batches: Iterator[Batch], trainer: Trainer) -> Iterator[Batch]:
    """Yield the batches, measuring the time until each is available."""
    state, stopwatch = trainer.state, trainer.stopwatch
    is_stream = trainer.config.data.follow is not None
    while True:
        began = time.perf_counter()
        trainer.job.heartbeat.set_phase(f"step {state.step + 1:,} (its rows)")
        batch = next(batches, None)
        if is_stream and trainer.data.is_end(state.step):  # waiting for new files is no part of training
            stopwatch.restart()
        else:
            stopwatch.add_waiting(time.perf_counter() - began)
        if batch is None:
            return
        yield batch


def build_train_data(run: Run, sources: FeatureDataset, ranks: Ranks) -> TrainData:
    """Return the run's batches: of the epochs of a fixed dataset, or of a growing folder."""
    config, on_gpu = run.config, ranks.device.type == "cuda"
    ranks.once(run.check_files)
    generations = run.generations(ranks)
    if generations is not None:
        return Stream(generations, sources, config.data, config.loss, run.folder, ranks, pin_memory=on_gpu)
    share = (ranks.rank, ranks.num_ranks)
    batches = TrainBatches(sources, config.data, config.loss, run.counts(), share, pin_memory=on_gpu)
    return Epochs(batches, 0 if config.ends_in_closed_form else config.train.epochs)


def warm_start(model: DistributedModelParallel, run: Run, init_from: Path, ranks: Ranks) -> Report:
    """Copy the weights of another run that mean the same in this one; return the report of which those are."""
    report = begin_with(model, Meaning.of_saved(run), Run.open(init_from), ranks)
    inner_model(model).forget()
    if ranks.is_first:
        print(report.text, flush=True)
        if run.config.ends_in_closed_form:
            print("  The skipped tables are filled by the closed form.", flush=True)
    return report


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step (dropout) a function of these three, so that a resumed run draws the same."""
    torch.manual_seed(mix(mix(mix(seed) ^ step) ^ rank))


def finished_status(config: RunConfig, state: TrainerState, data: TrainData, waiting_s: float) -> dict[str, Any]:
    """Return what status.json reports of a finished training; `waiting_s` is part of its training time."""
    is_stream = config.data.follow is not None
    return {
        "state": "finished",
        "step": state.step,
        "of_steps": data.num_steps,
        "reason": "no new files came" if is_stream else "all its epochs are done",
        "exit_code": 0,
        "meaning": "All steps are done; the same command trains on new files."
        if is_stream
        else "Nothing is left to do; more train.epochs go on from here.",
        "train_s": round(state.train_s, 3),
        "waiting_s": round(waiting_s, 3),
        "evaluate_s": round(state.evaluate_s, 3),
        "rows_per_s": round(data.rows_before(state.step) / max(state.train_s, 1e-9), 1),
    }


def summary_line(config: RunConfig, state: TrainerState, folder: Path) -> str:
    """Return the last line that a finished training prints."""
    step, train_s, evaluate_s, added = state.step, state.train_s, state.evaluate_s, ""
    if config.ends_in_closed_form:  # the steps are those of the run in RUN/trained
        trained = read_json(folder / TRAINED / STATUS)
        step, train_s, evaluate_s = trained["step"], trained["train_s"], trained["evaluate_s"]
        added = ", then added the closed form of train.spectral"
    elif not step and config.train.spectral is not None:
        return f"the weights are the closed form of train.spectral; train.epochs is 0: {folder}"
    times = f"{format_duration(train_s)} (and {format_duration(evaluate_s)} of evaluation)"
    return f"trained {step:,} steps in {times}{added}: {folder}"


@contextmanager
def _locked(run_dir: Path, ranks: Ranks) -> Iterator[RunLock]:
    """Hold the lock of a run directory on the first rank."""
    lock = RunLock(run_dir)
    ranks.once(lock.acquire)
    try:
        yield lock
    finally:
        lock.release()


def _check_epochs(config: RunConfig) -> None:
    """Raise ConfigError if a run with added spectral columns is to be trained for another number of epochs."""
    assert config.run_dir is not None
    if any((config.run_dir / "checkpoints").glob(f"step-*/{MANIFEST}")):
        had = Run.open(config.run_dir).config.train.epochs
        if had != config.train.epochs:
            raise ConfigError(
                f"{config.run_dir} was trained for {had} epochs before the spectral columns were added, but now "
                f"train.epochs is {config.train.epochs}: train in another folder (run_dir=...)."
            )
