"""Which rows of which files a step takes, for whoever looks for the one that broke it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trec_twotower.data.loading.order import Interleaving, Window

SHOWN_ROWS = 8


@dataclass(frozen=True)
class StepRows:
    """Rows of one row group, counted within it, rising."""

    path: str
    row_group: int
    rows: list[int]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:SHOWN_ROWS]))
        more = f" and {len(self.rows) - SHOWN_ROWS:,} more" if len(self.rows) > SHOWN_ROWS else ""
        return f"of {self.path}, row group {self.row_group}, the rows {shown}{more}"


def rows_at(windows: Sequence[Window], low: int, high: int, seed: int) -> list[StepRows]:
    """The rows at the places low .. high - 1 of the epoch whose windows these are."""
    found = []
    for window in windows:
        start, stop = max(low - window.first, 0), min(high - window.first, window.num_rows)
        if start >= stop:
            continue
        for unit, first, end in zip(window.units, *Interleaving.of(window, seed).before([start, stop]), strict=True):
            rows = np.sort(unit.order(seed)[first:end])
            before = 0
            for group in unit.groups:
                of_group = rows[(rows >= before) & (rows < before + group.num_rows)] - before
                if len(of_group):
                    found.append(StepRows(str(group.path), group.number, of_group.tolist()))
                before += group.num_rows
    return found
