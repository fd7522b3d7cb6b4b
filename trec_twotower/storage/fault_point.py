"""Fault injection: an environment variable kills, suspends or signals a process at a named point.

    TREC_TT_FAULT=save:between_files:step20          kill -9 of every rank that reaches this point at step 20
    TREC_TT_FAULT=step:backward:step13:rank1:stop    SIGSTOP of rank 1 there

Without the variable, a fault point costs one lookup. Tests and `make soak` use it.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass

from trec_twotower.errors import ConfigError, nearest

VARIABLE = "TREC_TT_FAULT"
POINTS = (
    "start:joined",  # the process group is initialized
    "start:locked",  # the run directory is locked
    "start:read",  # the catalogue is in memory
    "start:built",  # the model is sharded and initialized
    "load:verified",  # the checkpoint's files match their manifest
    "load:filled",  # the model has its weights
    "step:forward",
    "step:backward",  # the backward pass and the fused update of the tables are done
    "step:updated",
    "save:copied",  # the local shards are copied
    "save:opened",  # the temporary folder exists and is empty
    "save:within_file",  # part of this rank's file is written
    "save:between_files",  # this rank's file is written, the manifest is not
    "save:sealed",  # the manifest is written, the folder has its temporary name
    "save:published",  # the folder has its name, older ones still exist
    "save:swept",
    "stop:saved",  # stopped by a signal, and saved
    "publish:written",  # a complete folder has its temporary name
    "publish:aside",  # the older folder was renamed; only if the file system cannot exchange two names atomically
    "publish:named",  # the new folder has its name, the older one still exists
)
_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}
_ACTIONS = (*_SIGNALS, "agent", "full")


@dataclass(frozen=True)
class Fault:
    """An action at a point; None as `rank` or `step` means any."""

    point: str
    step: int | None
    rank: int | None
    attempt: int  # number of restarts by torchrun
    action: str

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault of PHASE:POINT[:stepN][:rankN][:attemptN][:ACTION]; raises ConfigError."""
        parts = text.split(":")
        point, numbers, action = ":".join(parts[:2]), {}, "kill"
        if point not in POINTS:
            raise ConfigError(f"{VARIABLE} names {point!r}, which is not a fault point{nearest(point, POINTS)}.")
        for part in parts[2:]:
            name = part.rstrip("0123456789")
            if name in ("step", "rank", "attempt") and name != part:
                numbers[name] = int(part[len(name) :])
            elif part in _ACTIONS:
                action = part
            else:
                known = ", ".join(("stepN", "rankN", "attemptN", *_ACTIONS))
                raise ConfigError(f"{VARIABLE} has {part!r} in {text!r}: after the point, write one of {known}.")
        return cls(point, numbers.get("step"), numbers.get("rank"), numbers.get("attempt", 0), action)

    def is_due(self, point: str, step: int | None) -> bool:
        return (
            point == self.point
            and self.step in (None, step)
            and self.rank in (None, int(os.environ.get("RANK", "0")))
            and self.attempt == int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        )

    def strike(self, path: str | None) -> None:
        """Cause the fault."""
        if self.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.action == "agent":
            os.kill(os.getppid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), _SIGNALS[self.action])


def fault_point(point: str, step: int | None = None, path: str | None = None) -> None:
    """Cause the fault that TREC_TT_FAULT sets for this point; `path` is the file being written."""
    faults = os.environ.get(VARIABLE)
    if not faults:
        return
    assert point in POINTS
    for fault in map(Fault.parse, faults.split(",")):
        if fault.is_due(point, step):
            fault.strike(path)
