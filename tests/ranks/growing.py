"""The command line on a folder that grows: `-m tests.ranks.growing PLAN ARGUMENTS...`.

PLAN is a JSON file: {"step": {"3": [[FROM, TO], ...]}, "term_in_sleep": 2, "rows": FOLDER}. The first rank renames
files when step 3 is done; the last rank sends itself SIGTERM in the second sleep of its wait for new files; and what
each rank's batches hold is noted in FOLDER/RANK.jsonl, a line a step: [step, [row, ...]].
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trec_twotower.cli import _quiet, main

_quiet()

from trec_twotower.data.loading import streaming as stream  # noqa: E402
from trec_twotower.model.two_tower import TwoTower  # noqa: E402
from trec_twotower.training import loop as training  # noqa: E402


def arm(plan: dict[str, Any]) -> None:
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    notes = Path(plan["rows"]) / f"{rank}.jsonl"
    now = {"step": 0, "sleeps": 0}
    awaited, finish_step, forward = training.await_rows, training.Trainer._finish_step, TwoTower.forward

    def knowing_the_step(batches: Any, trainer: training.Trainer) -> Any:
        for batch in awaited(batches, trainer):
            now["step"] = trainer.state.step + 1
            yield batch

    def noting(model: TwoTower, batch: Any, **more: Any) -> Any:
        with notes.open("a") as file:
            file.write(json.dumps([now["step"], batch.sparse["user:row"].values().tolist()]) + "\n")
        return forward(model, batch, **more)

    def publishing(trainer: training.Trainer, step: int) -> None:
        if rank == 0:
            for there, here in plan.get("step", {}).get(str(step), []):
                if os.path.exists(there):  # a step may be taken again
                    os.rename(there, here)
        finish_step(trainer, step)

    def sleep(seconds: float) -> None:
        now["sleeps"] += 1
        if rank == last and now["sleeps"] == plan.get("term_in_sleep"):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)

    training.await_rows = knowing_the_step
    training.Trainer._finish_step = publishing  # type: ignore[method-assign]
    TwoTower.forward = noting  # type: ignore[method-assign]
    stream.time = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)  # type: ignore[assignment]


if __name__ == "__main__":
    arm(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(main(sys.argv[2:]))
