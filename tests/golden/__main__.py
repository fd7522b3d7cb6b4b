"""Makes losses.json anew."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ["TREC_TWOTOWER_PRECISION"] = "fp32"

from tests.golden.curves import KEPT, curves
from tests.ranks.worlds import write_world
from trec_twotower.distributed.ranks import start_ranks

with tempfile.TemporaryDirectory() as temporary, start_ranks() as ranks:
    place = Path(temporary)
    found = curves(write_world(place / "world"), place, ranks)
KEPT.write_text(json.dumps(found, indent=1) + "\n")
print(f"{KEPT}: " + ", ".join(f"{name}, {len(losses)} steps" for name, losses in found.items()))
