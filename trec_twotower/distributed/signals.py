"""Stop signals, which wait for the end of a step, and ranks that end with their launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGENT_PID = "TREC_TT_AGENT_PID"  # set by trec_twotower.distributed.launcher for its ranks
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only leave word in `received`; a second Ctrl-C ends at once.

    Under torchrun, which passes on what it gets, a second Ctrl-C is no sign of impatience. Outside the main thread,
    where Python hears no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {each: signal.signal(each, self._note) for each in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT and AGENT_PID not in os.environ:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


def end_with_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when its torchrun dies, even by SIGKILL."""
    agent = os.environ.get(AGENT_PID)
    if agent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(agent):
        os.kill(os.getpid(), signal.SIGTERM)  # it died while this process was starting
