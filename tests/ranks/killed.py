"""The command line, in a process that is killed at a given moment: `-m tests.ranks.killed MOMENT ARGUMENTS...`.

MOMENT is step:N (the last rank dies when step N is done, before anything of it is logged) or save:N (the first rank
dies when the files of checkpoint N are written, before the checkpoint is whole).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from trec_twotower.cli import _quiet, main

_quiet()

from trec_twotower.checkpoint import Checkpoints  # noqa: E402
from trec_twotower.train import Progress  # noqa: E402


def arm(moment: str) -> None:
    what, _, number = moment.partition(":")
    step = int(number)
    rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    done, finish = Progress.done, Checkpoints._finish

    def dies_when_done(progress: Progress) -> None:
        if what == "step" and progress.step + 1 == step and rank == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done(progress)

    def dies_when_written(checkpoints: Checkpoints, temporary: Path, path: Path, facts: dict[str, Any]) -> None:
        if what == "save" and facts["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(checkpoints, temporary, path, facts)

    Progress.done = dies_when_done  # type: ignore[method-assign]
    Checkpoints._finish = dies_when_written  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
