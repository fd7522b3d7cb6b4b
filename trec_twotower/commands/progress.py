"""Progress of a long command on stderr: one line that is rewritten on a terminal, else a plain line per tenth."""

from __future__ import annotations

import sys
from typing import Any

PLAIN_STEPS = 10  # lines of a whole command where stderr is not a terminal


class ProgressReport:
    """Reports how many of a number of things are done: `with ProgressReport("users") as progress: progress(3, 10)`.

    Neither form uses colours, so that NO_COLOR needs no case of its own. With `is_shown=False` nothing is printed.
    """

    def __init__(self, unit: str, *, is_shown: bool = True) -> None:
        self.unit = unit
        self._is_shown = is_shown
        self._bar: Any = None
        self._step = 0  # tenths that have been printed

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` are done."""
        if not self._is_shown:
            return
        if sys.stderr.isatty():
            self._rewrite(done, total)
        elif (step := PLAIN_STEPS * done // max(total, 1)) > self._step:
            self._step = step
            print(f"{done:,} of {total:,} {self.unit}", file=sys.stderr, flush=True)

    def _rewrite(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=f" {self.unit}", unit_scale=True, file=sys.stderr, ascii=True)
        self._bar.update(done - self._bar.n)
