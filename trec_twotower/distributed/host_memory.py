"""How much memory this process may use, and how much it does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

import pyarrow as pa

CGROUPS = Path("/sys/fs/cgroup")
KEPT_BYTES = 1 << 27  # freed at the end of the heap, before any of it is given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Bytes of the largest block that glibc allocates from its heap; its dynamic threshold never exceeds this either.
_LARGEST_OF_HEAP = 1 << 25


def host_bytes(cgroups: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the machine's memory, or the limit of the control group (a container, a Slurm job) if it is lower.

    Every group from this process's own up to the root may set a limit; of version 2 and version 1.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # Seen from within a container the path may not exist: its own group is then the root.
        for place in (group, *group.parents):
            if (place / name).is_file():
                text = (place / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []  # else "max"
            if place == root:
                break
    return min(limits)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed() -> bool:
    """Set malloc to keep freed blocks of some MB, which readers allocate and free all the time.

    otherwise glibc returns them to the system, which zeroes them again: a tenth of a reader's time. Settings of malloc
    in the environment (such as the launcher's) take precedence. Returns whether it was done.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_HEAP) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def give_back() -> None:
    """Return to the system what was freed and is kept for later: by the C library and by Arrow."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
