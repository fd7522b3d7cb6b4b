"""What can go wrong through a person's doing; the command line turns each into one message and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 30  # names of a choice in a message: a folder may hold hundreds of runs


class ConfigError(ValueError):
    """A setting or an argument that cannot be right: exit code 2."""

    exit_code = 2


class DataError(ValueError):
    """A file or a table that is not what it should be: exit code 3."""

    exit_code = 3


class TrainingError(RuntimeError):
    """A training that cannot go on, such as a loss that is no number: exit code 1."""

    exit_code = 1


class LostRanks(TrainingError):
    """Other ranks did not answer; each rank prints its own message."""


class Stopped(Exception):
    """A training was stopped by a signal and has saved a checkpoint: exit code 128 + the signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.message = message
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return self.message


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (nearest: 'x')" for the most similar known name, or the (first) known names if none is similar."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" (nearest: {close[0]!r})"
    more = f" and {len(known) - MOST_SHOWN:,} more" if len(known) > MOST_SHOWN else ""
    return f" (known: {', '.join(map(repr, known[:MOST_SHOWN]))}{more})" if known else ""
