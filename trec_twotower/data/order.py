"""The order of an epoch: a function of (seed, epoch, global row), the same for any ranks and any reader threads.

Row groups are put in random order and joined into windows of about `shuffle_rows` rows; the rows of a window are
permuted. Rows of different row groups may come anywhere in the epoch. Two neighbours in a file share a row group and so
a window, where they land as if drawn independently: a third of its rows apart on average, and never further than all of
them. Memory is that of a few windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trec_twotower.data.dataset import RowGroup

_STREAM = 0x6F72  # keeps these random numbers apart from others of the same seed


@dataclass(frozen=True)
class Window:
    """Row groups that are permuted together; its rows take the places first .. first + num_rows - 1 of the epoch."""

    epoch: int
    number: int
    groups: tuple[RowGroup, ...]
    first: int
    num_rows: int

    @property
    def end(self) -> int:
        return self.first + self.num_rows


def windows_of(groups: Sequence[RowGroup], shuffle_rows: int, seed: int, epoch: int) -> list[Window]:
    """An epoch's windows in order; the last one may be smaller, and one is larger where a row group is."""
    windows: list[Window] = []
    waiting: list[RowGroup] = []
    first = num_rows = 0
    for number in _random(seed, epoch, 0).permutation(len(groups)):
        waiting.append(groups[number])
        num_rows += groups[number].num_rows
        if num_rows >= shuffle_rows:
            windows.append(Window(epoch, len(windows), tuple(waiting), first, num_rows))
            first, num_rows, waiting = first + num_rows, 0, []
    if waiting:
        windows.append(Window(epoch, len(windows), tuple(waiting), first, num_rows))
    return windows


def permutation(window: Window, seed: int) -> np.ndarray:
    """Which of the window's rows (counted through its groups in order) comes at each of its places; int32."""
    order = np.arange(window.num_rows, dtype=np.int32)
    _random(seed, window.epoch, window.number + 1).shuffle(order)
    return order


def _random(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, epoch, stream]))
