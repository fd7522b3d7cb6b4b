"""The command line as one rank of a real torchrun, with an audit of its own for each attempt: `-m tests.soak.rank`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trec_twotower.cli import _quiet, main

_quiet()

from tests.soak.jobs import record  # noqa: E402

if __name__ == "__main__":
    attempt = f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    record(Path(os.environ["SOAK_AUDITS"]) / attempt, int(os.environ["RANK"]))
    sys.exit(main())
