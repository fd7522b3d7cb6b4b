"""The files and row numbers of a step's rows, to find the row that made a step fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trec_twotower.data.loading.order import Interleaving, Window

SHOWN_ROWS = 8


@dataclass(frozen=True)
class StepRows:
    """Row numbers within one row group, ascending."""

    path: str
    row_group: int
    rows: list[int]

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.rows[:SHOWN_ROWS]))
        more = f" and {len(self.rows) - SHOWN_ROWS:,} more" if len(self.rows) > SHOWN_ROWS else ""
        return f"of {self.path}, row group {self.row_group}, the rows {numbers}{more}"


def rows_at(windows: Sequence[Window], low: int, high: int, seed: int) -> list[StepRows]:
    """Return the rows at places low .. high - 1 of the epoch with these windows."""
    step_rows = []
    for window in windows:
        start, stop = max(low - window.first, 0), min(high - window.first, window.num_rows)
        if start >= stop:
            continue
        for unit, first, end in zip(window.units, *Interleaving.of(window, seed).before([start, stop]), strict=True):
            rows = np.sort(unit.order(seed)[first:end])
            before = 0
            for group in unit.groups:
                group_rows = rows[(rows >= before) & (rows < before + group.num_rows)] - before
                if len(group_rows):
                    step_rows.append(StepRows(str(group.path), group.number, group_rows.tolist()))
                before += group.num_rows
    return step_rows
