"""Detection of a run that crashes again and again without getting further."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trec_twotower.data.loading.streaming import TrainData
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import TrainingError
from trec_twotower.storage.atomic import naming

ATTEMPT = ".attempt.json"


class CrashGuard:
    """Counts the crashes of a run since its newest checkpoint; the first rank records each step that it starts.

    A run that was stopped by a signal, or has finished, has not crashed.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, max_crashes: int) -> None:
        self.path = run_dir / ATTEMPT
        self.ranks = ranks
        self.max_crashes = max_crashes
        self._file: int | None = None
        self._record: dict[str, Any] = {}

    def begin(self, step: int, data: TrainData) -> None:
        """Record a start at `step`; raises TrainingError on all ranks where too many before it got no further."""

        def record_start() -> list[int]:
            before = self._read()
            crashed_in = before.get("died_in", []) if before.get("from_step") == step else []
            if before.get("in_step"):  # which came after `step`, even where that attempt began before it
                crashed_in = [*crashed_in, before["in_step"]]
            if len(crashed_in) >= self.max_crashes:
                raise TrainingError(self._message(step, crashed_in, data))
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._write({"from_step": step, "died_in": crashed_in, "in_step": None})
            return crashed_in

        self.ranks.once(record_start)

    def begin_step(self, step: int) -> None:
        """Record that a step begins."""
        if self._file is not None:
            self._write({**self._record, "in_step": step})

    def end(self) -> None:
        """Forget the record: the run has not crashed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_bytes()[: 1 << 16])
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, note: dict[str, Any]) -> None:
        assert self._file is not None
        self._record = note
        with naming(self.path):
            os.pwrite(self._file, json.dumps(note).encode().ljust(1024), 0)  # in place: it is written every step

    def _message(self, step: int, crashed_in: list[int], data: TrainData) -> str:
        last = crashed_in[-1]
        rows = "; ".join(map(str, data.rows_of(last - 1))) or "rows of the newest files"
        return (
            f"This run has died {len(crashed_in)} times in a row without a new checkpoint since step {step:,}, in the "
            f"steps {', '.join(f'{each:,}' for each in crashed_in)}. Step {last:,} reads {rows}. Read the messages of "
            f"its last attempts, fix the cause, and remove {self.path} to try again (or raise train.max_failures)."
        )
