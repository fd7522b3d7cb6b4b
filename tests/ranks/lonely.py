"""One rank comes to a collective that the other does not: `-m tests.ranks.lonely OUT HOW`, `dies` or `sleeps`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

from trec_twotower.distributed.ranks import start_ranks


def main() -> None:
    with start_ranks() as ranks:
        ranks.sum(np.ones(1))
        ranks.timeout_s = 1
        ranks.is_under_way()
        dist.barrier()
        if ranks.rank == 1:
            time.sleep(0 if sys.argv[2] == "dies" else 3)
            os._exit(0)
        started = time.monotonic()
        try:
            ranks.sum(np.ones(1))
        except dist.DistNetworkError as error:
            assert time.monotonic() - started < 2.5
            Path(sys.argv[1]).write_text(str(error))
        os._exit(0)


if __name__ == "__main__":
    main()
