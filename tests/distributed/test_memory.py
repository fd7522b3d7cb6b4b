"""What the C library keeps of freed memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from trec_twotower.distributed.host_memory import keep_freed

print(keep_freed())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    parts = [np.ones(1 << 18, np.int32) for _ in range(16)]  # 16 MiB
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (16 << 20) // 4096


def kept_and_faults(**environ: str) -> tuple[bool, int]:
    """Whether it was done, and how often a page was asked for in thirty times the same blocks."""
    others = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**others, **environ}
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_blocks_are_asked_for_once_and_then_kept():
    kept, faults = kept_and_faults()
    assert kept and faults < 3 * PAGES, f"{faults} faults"


@pytest.mark.parametrize(
    "environ",
    [{"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, {"MALLOC_MMAP_THRESHOLD_": "131072"}],
    ids=["tunables", "variables"],
)
def test_what_the_environment_says_counts_before(environ):
    kept, faults = kept_and_faults(**environ)
    assert not kept and faults > 20 * PAGES, f"{faults} faults"
