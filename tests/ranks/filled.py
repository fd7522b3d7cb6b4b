"""Ranks that fill one cache at once: `-m tests.ranks.filled DATASET CACHE OUT`; each writes OUT/found-RANK.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tests.data.loading.test_reader import batches_of, contents


def main(folder: Path, cache: Path, out: Path) -> None:
    rank = int(os.environ["RANK"])
    (out / f"ready-{rank}").touch()
    while not all((out / f"ready-{other}").exists() for other in range(2)):  # so that they begin at one moment
        time.sleep(0.001)
    found = [contents(batches_of(folder, (rank, 2), rows=rows, cache=cache)) for rows in ("event", "user")]
    (out / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
