"""`python -m tests.soak [--share 0.1] [--seed 0] [--json soak.json]`: all faults, as a table; 1 if any did harm."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TREC_TWOTOWER_PRECISION"] = "fp32"  # losses of other ranks and plans are compared
os.environ["OMP_NUM_THREADS"] = "1"  # a process that forks must have no threads

from tests.ranks.forked import get_ready
from tests.soak.drifting import DRIFTING
from tests.soak.scenarios import SCENARIOS, Soak, Tally
from tests.soak.spoiled import SPOILED

COLUMNS = ("tried", "exact", "lost", "doubled", "silent")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the tries of each fault (at least one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="scenarios whose name has one of these words, as in kill,told")
    parser.add_argument("--json", type=Path, default=Path("soak.json"))
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        tallies = run(options.keep or Path(folder), options)
    options.json.write_text(json.dumps([vars(tally) for tally in tallies], indent=2) + "\n")
    return 0 if all(tally.is_good for tally in tallies) else 1


def run(folder: Path, options: argparse.Namespace) -> list[Tally]:
    get_ready()
    soak = Soak(folder, options.share, options.seed)
    print(f"{'fault':<72}" + "".join(f"{name:>9}" for name in COLUMNS) + f"{'took':>9}", flush=True)
    tallies = []
    for scenario in (*SCENARIOS, *SPOILED, *DRIFTING):
        if options.only and not any(word in scenario.__name__ for word in options.only.split(",")):
            continue
        began = time.monotonic()
        tally = scenario(soak)
        tally.took_s = round(time.monotonic() - began, 1)
        tallies.append(tally)
        counts = "".join(f"{getattr(tally, name):>9,}" for name in COLUMNS)
        print(f"{tally.fault:<72}{counts}{tally.took_s:>8.0f}s", flush=True)
        for note in tally.notes:
            print(f"    {note}", flush=True)
    return tallies


if __name__ == "__main__":
    sys.exit(main())
