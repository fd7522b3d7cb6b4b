"""Metrics of a training: metrics.jsonl, the trackers, and the lines it prints."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from trec_twotower.config.run_config import binding
from trec_twotower.data.loading.streaming import TrainData
from trec_twotower.distributed.host_memory import resident_bytes
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.step_diagnostics import Histogram
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.storage.atomic import naming, write_file
from trec_twotower.training.checkpoints.trainer_state import Stopwatch, TrainerState
from trec_twotower.training.collapse_guard import CollapseGuard, Finding
from trec_twotower.training.diagnostics.trackers import TRACKERS
from trec_twotower.training.optimizer import RunOptimizer
from trec_twotower.training.run_dir import Run


class RunLog:
    """metrics.jsonl and the trackers of a run, written by the first rank; a resumed run continues after its step."""

    def __init__(self, run: Run, ranks: Ranks, step: int) -> None:
        self.path = run.folder / "metrics.jsonl"
        self.is_written = ranks.is_first
        if not self.is_written:
            return
        if self.path.is_file():
            whole = self.path.read_text().split("\n")[:-1]  # a line that was cut short has no newline
            lines = [line for line in whole if json.loads(line)["step"] <= step]
            write_file(self.path, "".join(line + "\n" for line in lines))
        # An open file belongs to this run even if the directory is moved and replaced by another.
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, self._file)
        settings = binding(run.config)
        self.trackers = [TRACKERS[name](run.folder, settings, step) for name in run.config.train.log_to]

    def write(self, step: int, kind: str, values: Mapping[str, float | Histogram]) -> None:
        """Write one line, such as {"step": 20, "kind": "train", "loss": 6.1}; a histogram as its edges and counts."""
        if not self.is_written:
            return
        plain = {
            name: {"edges": value.edges.round(6).tolist(), "counts": value.counts.astype(int).tolist()}
            if isinstance(value, Histogram)
            else value
            for name, value in values.items()
        }
        self._append({"step": step, "kind": kind, **plain})
        for tracker in self.trackers:
            tracker.log(step, {f"{kind}/{name}": value for name, value in values.items()})

    def note(self, step: int, kind: str, facts: Mapping[str, Any]) -> None:
        """Write one line of values that are not metrics, such as where the first weights are from."""
        if self.is_written:
            self._append({"step": step, "kind": kind, **facts})

    def warnings_and_last_validation(self) -> list[dict[str, Any]]:
        """Return the lines of both kinds; only the first rank has them."""
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "valid"][-1:]
        return [line for line in lines if line["kind"] == "warning"] + last

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.is_written:
            self._close()
            for tracker in self.trackers:
                tracker.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        with naming(self.path):
            os.write(self._file, (json.dumps(line) + "\n").encode())


class MetricsLogger:
    """Logs training steps and validations: which ones, and what about them."""

    def __init__(self, run: Run, ranks: Ranks, data: TrainData, stopwatch: Stopwatch, step: int) -> None:
        """Remove the lines of steps after `step`, at which the run resumes."""
        self.ranks, self.data, self.stopwatch = ranks, data, stopwatch
        self.log_every = run.config.train.log_every
        self.is_stream = run.config.data.follow is not None
        self.log = RunLog(run, ranks, step)
        self.guard = CollapseGuard(run.config)
        self.guard.resume(ranks.once(self.log.warnings_and_last_validation))
        self._logged_waiting_s = 0.0

    def is_due(self, step: int) -> bool:
        """Return whether a step is logged: every `log_every` steps, and the last one (of a stream, all that may be)."""
        may_be_last = self.data.is_end(step) if self.is_stream else self.data.is_over(step)
        return step % self.log_every == 0 or may_be_last

    def needs_diagnostics(self, step: int) -> bool:
        """Return whether a step that has not begun will be logged, as far as is known."""
        return step % self.log_every == 0 or (not self.is_stream and self.data.is_over(step))

    def log_training(self, state: TrainerState, model: TwoTower, optimizer: RunOptimizer) -> None:
        """Log the steps since the last logged one; all ranks call together."""
        step, data = state.step, self.data
        passed_s = max(state.train_s - state.logged_s, 1e-9)
        num_rows = data.rows_before(step) - data.rows_before(state.logged_step)
        rows_per_s = num_rows / passed_s
        loss = sum(state.losses) / len(state.losses)
        remaining_s = (data.num_steps - step) * passed_s / len(state.losses)
        self.print(
            f"step {step:>6,}/{data.num_steps:,}  {data.place(step)}  loss {loss:.4f}  "
            f"{rows_per_s:>9,.0f} rows/s  {format_duration(remaining_s)} left"
        )
        waiting_s, self._logged_waiting_s = (
            self.stopwatch.waiting_s - self._logged_waiting_s,
            self.stopwatch.waiting_s,
        )
        values: dict[str, float | Histogram] = {
            "loss": loss,
            **model.figures(),
            **optimizer.figures(),
            "rows_per_s": rows_per_s,
            "waiting_share": min(waiting_s / passed_s, 1.0),
            "train_s": state.train_s,
            **memory_metrics(self.ranks),
        }
        self.log.write(step, "train", values)
        scores = values.get("negative_scores")
        if isinstance(scores, Histogram) and model.has_cosine_scores and self.is_pass_end(step):
            self._warn(step, self.guard.trained(scores.mean()))
        state.note_logged()

    def log_validation(self, step: int, metric: str, metrics: Mapping[str, float], *, is_best: bool) -> None:
        """Log a validation, whose `metric` selects the best checkpoint."""
        self.log.write(step, "valid", metrics)
        self.print(f"step {step:>6,}  valid {metric} {metrics[metric]:.4f}" + ("  (best so far)" if is_best else ""))
        self._warn(step, self.guard.validated(metrics, is_pass_end=self.is_pass_end(step)))

    def note(self, step: int, kind: str, facts: Mapping[str, Any]) -> None:
        """Log values that are not metrics."""
        self.log.note(step, kind, facts)

    def is_pass_end(self, step: int) -> bool:
        """Return whether an epoch, a generation or the training ends with a step."""
        return self.data.is_end(step) or self.data.is_over(step)

    def print(self, line: str) -> None:
        """Print a line on the first rank."""
        if self.ranks.is_first:
            print(line, flush=True)

    def close(self) -> None:
        """Close the files."""
        self.log.close()

    def _warn(self, step: int, findings: list[Finding]) -> None:
        for finding in findings:
            self.print(finding.message)
            self.log.note(step, "warning", finding.as_values())


def memory_metrics(ranks: Ranks) -> dict[str, float]:
    """Return the largest resident set of a rank, and GPU peak since the last call; all ranks call together."""
    metrics = {"resident_bytes": float(max(ranks.sizes(resident_bytes())))}
    if ranks.device.type == "cuda":
        metrics["gpu_peak_bytes"] = float(max(ranks.sizes(torch.cuda.max_memory_allocated())))
        torch.cuda.reset_peak_memory_stats()
    return metrics


def format_duration(seconds: float) -> str:
    """Return a duration such as "1m30s" for 90."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
