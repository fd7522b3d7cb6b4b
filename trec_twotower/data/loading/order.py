"""The row order of an epoch: a function of (seed, epoch, global row), independent of the ranks and reader threads.

Row groups are shuffled and joined into windows of about `shuffle_rows` rows, and each window is shuffled. The window's
order is a uniform permutation in two steps: each unit (one row group, or several small ones) is permuted separately,
and the units are interleaved at random. Threads can therefore read and hash units independently. A step consumes a run
of each unit's order; within the run, rows keep the order of the files.

Rows of different row groups may be anywhere in the epoch. Two neighbours in a file are in the same window, at
independent places: a third of its rows apart on average. Memory holds two windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from trec_twotower.data.split import RowGroup
from trec_twotower.ops.hashing import mix
from trec_twotower.ops.kernels import count_before, shuffle

UNIT_ROWS = 1 << 16  # row groups are joined until a unit has this many rows
_WINDOWS, _UNITS, _PLACES = 0x6F72, 0x6F73, 0x6F74  # seeds of independent random streams


@dataclass(frozen=True)
class Unit:
    """Row groups that are read and permuted together."""

    epoch: int
    groups: tuple[RowGroup, ...]
    num_rows: int
    first: int = 0  # number of its first row in the window, counted over the units in order
    window_rows: int = 0

    def order(self, seed: int) -> np.ndarray:
        """Return the unit's row numbers (counted over its groups in order) in shuffled order, int32."""
        rows = np.arange(self.num_rows, dtype=np.int32)
        shuffle(rows, _stream(_UNITS, seed, self.epoch, self.groups[0].first_row))
        return rows


@dataclass(frozen=True)
class Window:
    """Units whose rows are interleaved, at the places first .. first + num_rows - 1 of the epoch."""

    epoch: int
    number: int
    units: tuple[Unit, ...]
    first: int
    num_rows: int

    @property
    def end(self) -> int:
        return self.first + self.num_rows

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        return tuple(group for unit in self.units for group in unit.groups)


@dataclass(frozen=True)
class Interleaving:
    """The unit that provides the row at each place of a window."""

    unit_at: np.ndarray  # uint16, one unit number per place
    num_units: int

    @classmethod
    def of(cls, window: Window, seed: int) -> Interleaving:
        unit_at = np.repeat(np.arange(len(window.units), dtype=np.uint16), [unit.num_rows for unit in window.units])
        shuffle(unit_at, _stream(_PLACES, seed, window.epoch, window.number))
        return cls(unit_at, len(window.units))

    def before(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the number of rows of each unit before each of these ascending places: (places, units), int64."""
        counts = np.zeros((len(places), self.num_units), np.int64)
        count_before(self.unit_at, np.asarray(places, np.int64), counts)
        return counts


def windows_of(groups: Sequence[RowGroup], shuffle_rows: int, seed: int, epoch: int) -> list[Window]:
    """Return the windows of an epoch in order.

    The last window may be smaller than `shuffle_rows`; a large row group makes its window larger.
    """
    windows: list[Window] = []
    units: list[Unit] = []
    pending: list[RowGroup] = []
    first = 0
    order = np.arange(len(groups))
    shuffle(order, _stream(_WINDOWS, seed, epoch, 0))
    for position, number in enumerate(order.tolist()):
        pending.append(groups[number])
        unit_rows = sum(group.num_rows for group in pending)
        window_rows = unit_rows + sum(unit.num_rows for unit in units)
        is_last = position == len(order) - 1
        if unit_rows >= UNIT_ROWS or window_rows >= shuffle_rows or is_last:
            units.append(Unit(epoch, tuple(pending), unit_rows))
            pending = []
        if window_rows >= shuffle_rows or is_last:
            starts = accumulate((unit.num_rows for unit in units), initial=0)  # one more entry than units: the end
            units = [
                replace(unit, first=start, window_rows=window_rows) for unit, start in zip(units, starts, strict=False)
            ]
            windows.append(Window(epoch, len(windows), tuple(units), first, window_rows))
            first, units = first + window_rows, []
    return windows


def _stream(*parts: int) -> np.uint64:
    """Return the seed of the random stream of these parts."""
    state = 0
    for part in parts:
        state = mix(state ^ part)
    return np.uint64(state)
