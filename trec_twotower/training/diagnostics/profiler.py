"""Profiler traces of training steps."""

from __future__ import annotations

from pathlib import Path

import torch

from trec_twotower.distributed.ranks import Ranks

WARM_STEPS = 5  # before a trace: compilation and first allocations are no part of a usual step


class Trace:
    """Profiles some steps with torch, one trace per rank: RUN/profile/rank-0.json for Perfetto, rank-0.txt as a table.

    The first steps are not profiled.
    """

    def __init__(self, num_steps: int, run_dir: Path, ranks: Ranks) -> None:
        self._profiler: torch.profiler.profile | None = None
        self._num_steps, self._is_written = num_steps, False
        self.folder, self.rank, self.device = run_dir / "profile", ranks.rank, ranks.device
        if not num_steps:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARM_STEPS, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def __enter__(self) -> Trace:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            if not self._is_written and self.rank == 0:
                print(
                    f"no trace was written: train.profile_steps is {self._num_steps}, but the {WARM_STEPS + 1} steps "
                    "before them were not through when this run ended; train for longer.",
                    flush=True,
                )

    def end_step(self) -> None:
        """Count a step."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._is_written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json"))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=-1)
        (self.folder / f"rank-{self.rank}.txt").write_text(table)
