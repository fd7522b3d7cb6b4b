"""Training batches, in an order that depends only on (seed, epoch, row): see order.py.

A step consumes the next `batch_size` rows of its epoch, so the step number is the whole cursor. `data.threads` threads
prefetch windows and cut batches from them. The order of the batches does not depend on the number of threads.
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

ROWS_AHEAD = 1 << 17  # rows in prefetched batches that training has not consumed

# (step, sources, interactions per item) -> lists of hard negatives, and the list of each item (-1: none).
HardNegativeProvider = Callable[[int, FeatureDataset, np.ndarray], tuple[Ragged, np.ndarray] | None]


class TrainBatches:
    """Yields the batches of this rank, starting at any step: `batches.iter_from(step, end)`.

    With loss.negatives.refresh, `hard_negatives_at` returns the lists from which the rows of a step sample negatives.
    The thread that consumes the batches calls it, after all earlier batches are consumed and before a later one exists.
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
        """`count_I` is the result of count_items over `counted_rows` rows (default: the training rows).

        A stream's later generations begin at `first_step` and `first_epoch`.
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
        self.pin_memory = pin_memory  # needed for asynchronous copies to a GPU

    @property
    def item_counts(self) -> np.ndarray:
        """Return the interactions of each item in the counted rows, (I,)."""
        return self.negatives.facts.interactions_I

    @property
    def log_q_I(self) -> np.ndarray:
        """Log of the probability that an item is among the candidates of a step, (I,)."""
        return self.negatives.log_I

    def iter_from(self, step: int, end: int, hard_negatives_at: HardNegativeProvider | None = None) -> Iterator[Batch]:
        """Yield the batches of steps step .. end - 1; a data error is raised at the step that needs the bad row."""
        pool: _Pool = ThreadPoolExecutor(self.data.threads, "reader") if self.data.threads else _Inline()
        try:
            yield from self._prefetch(pool, step, end, hard_negatives_at)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def windows(self, epoch: int) -> list[Window]:
        """Return the windows of an epoch, in order."""
        return windows_of(self.sources.dataset.train.row_groups, self.data.shuffle_rows, self.data.seed, epoch)

    def rows_of(self, step: int) -> list[StepRows]:
        """Return the files and row numbers of a step's rows, over all ranks."""
        low, high, epoch = self._places(step)
        return rows_at(self.windows(epoch), low, high, self.data.seed)

    def _prefetch(
        self, pool: _Pool, step: int, end: int, hard_negatives_at: HardNegativeProvider | None
    ) -> Iterator[Batch]:
        """Yield batches while threads prepare `prefetch` more batches and read the units of the next window."""
        windows = self._windows_since(step, end)
        reads: deque[_WindowReads] = deque()
        batches: deque[Future[Batch]] = deque()
        refresh = self.loss.negatives.refresh if hard_negatives_at is not None else None
        stop = end if refresh is None else step  # batches before this step must be consumed first
        max_batches = 1
        if self.data.threads:  # with fewer than 32, threads wait for the consumer
            max_batches = self.data.prefetch or min(32, max(4, ROWS_AHEAD // self.data.batch_size))
        while step < end or batches:
            if refresh is not None and hard_negatives_at is not None and step == stop and not batches:
                self._refresh(step, hard_negatives_at)
                stop = min(end, step - step % refresh.every + refresh.every)
            while step < stop and len(batches) < max_batches:
                low, high, epoch = self._places(step)
                while reads and (reads[0].window.epoch < epoch or reads[0].window.end <= low):
                    reads.popleft()
                while not reads or (reads[-1].window.epoch, reads[-1].window.end) < (epoch, high):
                    reads.append(_WindowReads(next(windows), self.reader))
                needed = [each for each in reads if each.window.epoch == epoch and each.window.first < high]
                for each in needed:
                    each.read(pool)
                if self.data.threads and len(reads) == len(needed) and (upcoming := next(windows, None)) is not None:
                    reads.append(_WindowReads(upcoming, self.reader))
                if len(reads) > len(needed):  # one unit per thread: batches must not wait for a whole window
                    reads[-1].read(pool, at_once=self.data.threads)
                if batches and not all(rows.done() for each in needed for rows in each.rows):
                    break  # yield a finished batch before waiting for rows
                pieces = [piece for each in needed for piece in each.pieces(low)]
                batches.append(pool.submit(self._batch, step, pieces))
                step += 1
            yield batches.popleft().result()

    def _refresh(self, step: int, hard_negatives_at: HardNegativeProvider) -> None:
        """Make the batches from this step on draw from the hard-negative lists of this step."""
        lists = hard_negatives_at(step, self.sources, self.negatives.facts.interactions_I)
        if lists is not None:
            self.negatives.refresh(*lists)

    def _places(self, step: int) -> tuple[int, int, int]:
        """Return the first place of a step's rows in its epoch, the end of them, and the epoch."""
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
        """Build this rank's batch of a step; the candidates come from the rows of all ranks.

        Each piece is a unit and the number of one of its buckets.
        """
        rows_of_pieces = np.array([unit.num_rows(bucket) for unit, bucket in pieces])  # (pieces, ranks)
        mine: Examples = take([(unit.mine, bucket) for unit, bucket in pieces])
        if self.num_ranks == 1:
            items = mine.items
        else:
            items = take([(unit.items, bucket) for unit, bucket in pieces if unit.items is not None])
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
    """Return the places of a rank's rows among a step's rows; every piece holds the ranks' rows in rank order."""
    is_rank = np.zeros(rows_of_pieces.shape, bool)
    is_rank[:, rank] = True
    return np.flatnonzero(np.repeat(is_rank.reshape(-1), rows_of_pieces.reshape(-1)))


class _WindowReads:
    """A window and the futures of its units' rows."""

    def __init__(self, window: Window, reader: UnitReader) -> None:
        self.window = window
        self.reader = reader
        self.rows: list[Future[UnitRows]] = []
        # Edges within the window: its start, the places where steps begin, and its end.
        batch_size = reader.data.batch_size
        inside = range(window.first - window.first % batch_size + batch_size, window.end, batch_size)
        self.edges = [place - window.first for place in (window.first, *inside, window.end)]
        self._before: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, pool: _Pool, at_once: int | None = None) -> None:
        """Submit the remaining units to the pool; with `at_once`, only while fewer than that are being read."""
        for number in range(len(self.rows), len(self.window.units)):
            if at_once is not None and sum(not rows.done() for rows in self.rows) >= at_once:
                return
            self.rows.append(pool.submit(self._read, number))

    def _read(self, number: int) -> UnitRows:
        return self.reader.read(self.window.units[number], self._cuts()[:, number])

    def _cuts(self) -> np.ndarray:
        """Return the number of rows of each unit before each edge: (edges, units)."""
        with self._lock:  # computed by the first thread that needs it
            if self._before is None:
                self._before = Interleaving.of(self.window, self.reader.data.seed).before(np.array(self.edges))
            return self._before

    def pieces(self, low: int) -> list[tuple[UnitRows, int]]:
        """Return the buckets of the step that begins at this place of the epoch, or before the window."""
        bucket = bisect_left(self.edges, max(low - self.window.first, 0))
        first, end = self._cuts()[bucket : bucket + 2].tolist()
        return [(rows.result(), bucket) for rows, low, high in zip(self.rows, first, end, strict=True) if low < high]


def used_rows_per_epoch(num_rows: int, data: DataConfig) -> int:
    """Return the number of rows that an epoch uses; `drop_last` leaves out the last partial batch."""
    return num_rows - num_rows % data.batch_size if data.drop_last else num_rows


@dataclass(frozen=True)
class _Done:
    """A finished result with the interface of a Future."""

    value: Any

    def result(self) -> Any:
        return self.value

    def done(self) -> bool:
        return True


class _Inline:
    """A pool that runs work in the calling thread, for `threads: 0`."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return _Done(work(*arguments))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: no work is pending."""


_Pool = ThreadPoolExecutor | _Inline
