"""The training rows as batches, in an order that depends on nothing but (seed, epoch, row): see order.py.

A step takes the next `batch_size` rows of its epoch, so a cursor is one integer, the step. Windows are read ahead by
`data.threads` threads, and batches cut from them; what comes when does not depend on how many there are.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from trec_twotower.config.data import DataConfig
from trec_twotower.config.losses import LossConfig
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.batch import Batch, make_batch
from trec_twotower.data.loading.examples import Examples
from trec_twotower.data.loading.order import Interleaving, Window, windows_of
from trec_twotower.data.loading.reader import UnitReader, UnitRows
from trec_twotower.data.loading.step_buckets import take
from trec_twotower.data.loading.step_rows import StepRows, rows_at
from trec_twotower.data.negatives.candidates import CandidateSets
from trec_twotower.data.negatives.samplers import StepItems
from trec_twotower.data.negatives.step_negatives import Negatives
from trec_twotower.errors import ConfigError
from trec_twotower.ops.ragged import Ragged

ROWS_AHEAD = 1 << 17  # in batches that are made but not taken

# (step, sources, how often each item was taken) -> lists of items, and which of them is each item's (-1: none).
HardNegativeProvider = Callable[[int, FeatureDataset, np.ndarray], tuple[Ragged, np.ndarray] | None]


class TrainBatches:
    """The batches of this rank from any step on: `batches.since(step, end)`.

    With loss.negatives.refresh, `lists_at` returns the lists from which the rows of a step draw negatives. It is called
    in the thread that reads the batches, when all earlier ones have been read and no later one has been made.
    """

    def __init__(
        self,
        sources: FeatureDataset,
        data: DataConfig,
        loss: LossConfig,
        count_I: np.ndarray,
        share: tuple[int, int],
        *,
        pin_memory: bool = False,
        first_step: int = 0,
        first_epoch: int = 0,
        counted_rows: int | None = None,
    ) -> None:
        """`count_I` is of negatives.count_items, in so many rows (default: these).

        Their first step and epoch may be others than 0.
        """
        self.sources = sources
        self.data = data
        self.loss = loss
        self.rank, self.num_ranks = share
        self.num_rows = sources.dataset.train.num_rows
        if data.batch_size > self.num_rows and data.follow is None:
            raise ConfigError(
                f"data.batch_size is {data.batch_size:,}, but {sources.dataset.train.folder} has only "
                f"{self.num_rows:,} rows: set it to {self.num_rows:,} or less."
            )
        self.first_step, self.first_epoch = first_step, first_epoch
        self.rows_per_epoch = used_rows_per_epoch(self.num_rows, data)
        self.steps_per_epoch = -(-self.rows_per_epoch // data.batch_size)
        self.reader = UnitReader(sources, data, loss, self.rank, self.num_ranks)
        self.negatives = Negatives(sources, data, loss, count_I, counted_rows or self.num_rows)
        masks_history = self.reader.masks_history
        self.candidates = CandidateSets(sources, loss, self.negatives, self.num_ranks, masks_history=masks_history)
        self.pin_memory = pin_memory  # for copies to a GPU that do not wait

    @property
    def item_counts(self) -> np.ndarray:
        """How often each item is a positive of the rows that were counted, (I,)."""
        return self.negatives.facts.interactions_I

    @property
    def log_q_I(self) -> np.ndarray:
        """Log of the probability that an item is among a step's candidates, (I,)."""
        return self.negatives.log_I

    def since(self, step: int, end: int, lists_at: HardNegativeProvider | None = None) -> Iterator[Batch]:
        """Batches of the steps step .. end - 1; an error in the data is raised at the step that needs the row."""
        pool: _Pool = ThreadPoolExecutor(self.data.threads, "reader") if self.data.threads else _Inline()
        try:
            yield from self._ahead(pool, step, end, lists_at)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows, in order."""
        return windows_of(self.sources.dataset.train.row_groups, self.data.shuffle_rows, self.data.seed, epoch)

    def rows_of(self, step: int) -> list[StepRows]:
        """Where the rows of a step stand, those of all ranks."""
        low, high, epoch = self._places(step)
        return rows_at(self.windows(epoch), low, high, self.data.seed)

    def _ahead(self, pool: _Pool, step: int, end: int, lists_at: HardNegativeProvider | None) -> Iterator[Batch]:
        """Keeps `prefetch` batches and, where there are threads, units of the next window under way."""
        windows = self._windows_since(step, end)
        held: deque[_Held] = deque()
        made: deque[Future[Batch]] = deque()
        refresh = self.loss.negatives.refresh if lists_at is not None else None
        stop = end if refresh is None else step  # the step before which all others must have been taken
        most = 1
        if self.data.threads:  # fewer than 32 leave threads waiting for whoever takes the batches
            most = self.data.prefetch or min(32, max(4, ROWS_AHEAD // self.data.batch_size))
        while step < end or made:
            if refresh is not None and lists_at is not None and step == stop and not made:
                self._refresh(step, lists_at)
                stop = min(end, step - step % refresh.every + refresh.every)
            while step < stop and len(made) < most:
                low, high, epoch = self._places(step)
                while held and (held[0].window.epoch < epoch or held[0].window.end <= low):
                    held.popleft()
                while not held or (held[-1].window.epoch, held[-1].window.end) < (epoch, high):
                    held.append(_Held(next(windows), self.reader))
                needed = [each for each in held if each.window.epoch == epoch and each.window.first < high]
                for each in needed:
                    each.read(pool)
                if self.data.threads and len(held) == len(needed) and (ahead := next(windows, None)) is not None:
                    held.append(_Held(ahead, self.reader))
                if len(held) > len(needed):  # a unit a thread at a time: batches must not wait behind a whole window
                    held[-1].read(pool, at_once=self.data.threads)
                if made and not all(rows.done() for each in needed for rows in each.rows):
                    break  # give what there is before waiting for more
                pieces = [piece for each in needed for piece in each.pieces(low)]
                made.append(pool.submit(self._batch, step, pieces))
                step += 1
            yield made.popleft().result()

    def _refresh(self, step: int, lists_at: HardNegativeProvider) -> None:
        """Let the batches from this step on draw from the lists that are valid then."""
        lists = lists_at(step, self.sources, self.negatives.facts.interactions_I)
        if lists is not None:
            self.negatives.refresh(*lists)

    def _places(self, step: int) -> tuple[int, int, int]:
        """The places of a step's rows in its epoch, and the epoch."""
        epoch, number = divmod(step - self.first_step, self.steps_per_epoch)
        low = number * self.data.batch_size
        return low, min(low + self.data.batch_size, self.rows_per_epoch), epoch + self.first_epoch

    def _windows_since(self, step: int, end: int) -> Iterator[Window]:
        low, _, first = self._places(step)
        last_high, last = self._places(max(end - 1, step))[1:]
        for epoch in count(first):
            for window in self.windows(epoch):
                if (epoch, window.first) >= (last, last_high):
                    return
                if (epoch > first or window.end > low) and window.first < self.rows_per_epoch:
                    yield window

    def _batch(self, step: int, pieces: list[tuple[UnitRows, int]]) -> Batch:
        """This rank's batch of a step, whose candidates come from the rows of all ranks.

        Each piece is a heap of a unit.
        """
        rows_of_pieces = np.array([unit.num_rows(heap) for unit, heap in pieces])  # (pieces, ranks)
        mine: Examples = take([(unit.mine, heap) for unit, heap in pieces])
        if self.num_ranks == 1:
            items = mine.items
        else:
            items = take([(unit.items, heap) for unit, heap in pieces if unit.items is not None])
        rows_R = rows_of_pieces.sum(axis=0)
        candidates, targets = self.candidates.of(
            StepItems(step, items), mine, lambda: _places_of(rows_of_pieces, self.rank)
        )
        first = sum(candidates.sizes[: self.rank])
        share = candidates.item_row[first : first + candidates.sizes[self.rank]]
        batch = make_batch(
            self.sources.schema,
            self.sources.with_items(mine.user),
            self.sources.catalogue.columns.take(share),
            num_rows=max(int(rows_R.max()), *candidates.sizes),
            candidates=candidates,
            targets=targets,
            num_rows_of_all_ranks=int(rows_R.sum()),
        )
        return batch.pin_memory() if self.pin_memory else batch


def _places_of(rows_of_pieces: np.ndarray, rank: int) -> np.ndarray:
    """Where a rank's rows stand among a step's: in each piece, those of the ranks come one behind the other."""
    is_rank = np.zeros(rows_of_pieces.shape, bool)
    is_rank[:, rank] = True
    return np.flatnonzero(np.repeat(is_rank.reshape(-1), rows_of_pieces.reshape(-1)))


class _Held:
    """A window whose units are read, being read or still to be."""

    def __init__(self, window: Window, reader: UnitReader) -> None:
        self.window = window
        self.reader = reader
        self.rows: list[Future[UnitRows]] = []
        # The window's first place, those where steps begin, and its end.
        batch_size = reader.data.batch_size
        inside = range(window.first - window.first % batch_size + batch_size, window.end, batch_size)
        self.edges = [place - window.first for place in (window.first, *inside, window.end)]
        self._before: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, pool: _Pool, at_once: int | None = None) -> None:
        """Have the units read that are not yet; with `at_once`, only while fewer than so many are under way."""
        for number in range(len(self.rows), len(self.window.units)):
            if at_once is not None and sum(not rows.done() for rows in self.rows) >= at_once:
                return
            self.rows.append(pool.submit(self._read, number))

    def _read(self, number: int) -> UnitRows:
        return self.reader.read(self.window.units[number], self._cuts()[:, number])

    def _cuts(self) -> np.ndarray:
        """How many rows of each unit come before each edge: (edges, units)."""
        with self._lock:  # whoever asks first
            if self._before is None:
                self._before = Interleaving.of(self.window, self.reader.data.seed).before(np.array(self.edges))
            return self._before

    def pieces(self, low: int) -> list[tuple[UnitRows, int]]:
        """The heaps that the step takes which begins at this place of the epoch, or before the window."""
        heap = bisect_left(self.edges, max(low - self.window.first, 0))
        first, end = self._cuts()[heap : heap + 2].tolist()
        return [(rows.result(), heap) for rows, low, high in zip(self.rows, first, end, strict=True) if low < high]


def used_rows_per_epoch(num_rows: int, data: DataConfig) -> int:
    """How many of an epoch's rows come in its batches."""
    return num_rows - num_rows % data.batch_size if data.drop_last else num_rows


@dataclass(frozen=True)
class _Done:
    """A result that is there; looks like a Future."""

    value: Any

    def result(self) -> Any:
        return self.value

    def done(self) -> bool:
        return True


class _Inline:
    """Looks like a pool of threads, but works where it is asked: `threads: 0`."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return _Done(work(*arguments))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is under way."""


_Pool = ThreadPoolExecutor | _Inline
