"""The training rows as batches, in an order that depends on nothing but (seed, epoch, row): see order.py.

A step takes the next `batch_size` rows of its epoch, so a cursor is one integer, the step. Windows are read ahead by
`data.threads` threads, and batches cut from them; what comes when does not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from trec_twotower.config import DataConfig, LossConfig
from trec_twotower.data.batch import Batch, Candidates, Targets, make_batch
from trec_twotower.data.examples import Examples
from trec_twotower.data.features import Sources
from trec_twotower.data.hashing import fingerprints
from trec_twotower.data.lists import Lists
from trec_twotower.data.negatives import InclusionProbability, sampled_items
from trec_twotower.data.order import Interleaving, Window, windows_of
from trec_twotower.data.probing import FingerprintTable
from trec_twotower.data.reader import UnitReader, UnitRows
from trec_twotower.errors import ConfigError


class TrainBatches:
    """The batches of this rank from any step on: `batches.since(step, end)`."""

    def __init__(
        self,
        sources: Sources,
        data: DataConfig,
        loss: LossConfig,
        count_I: np.ndarray,
        share: tuple[int, int],
        *,
        pin_memory: bool = False,
    ) -> None:
        self.sources = sources
        self.data = data
        self.loss = loss
        self.rank, self.num_ranks = share
        self.num_rows = sources.dataset.train.num_rows
        if data.batch_size > self.num_rows:
            raise ConfigError(
                f"data.batch_size is {data.batch_size:,}, but {sources.dataset.train.folder} has only "
                f"{self.num_rows:,} rows: set it to {self.num_rows:,} or less."
            )
        self.steps_per_epoch = -(-self.num_rows // data.batch_size)
        self.reader = UnitReader(sources, data, loss, self.rank, self.num_ranks)
        per_row = count_I.sum() / self.num_rows * (1 - data.input_share if data.rows == "user" else 1)
        inclusion = InclusionProbability(loss.negatives, count_I, per_row * data.batch_size)
        self.log_q_I = inclusion.log_I * np.float32(loss.log_q)
        self.fingerprint_I = fingerprints(sources.catalogue.keys) if self.reader.masks_history else None
        self.pin_memory = pin_memory  # for copies to a GPU that do not wait
        self._scratch = threading.local()

    def since(self, step: int, end: int) -> Iterator[Batch]:
        """Batches of the steps step .. end - 1; an error in the data is raised at the step that needs the row."""
        pool: _Pool = ThreadPoolExecutor(self.data.threads, "reader") if self.data.threads else _Inline()
        try:
            yield from self._ahead(pool, step, end)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def windows(self, epoch: int) -> list[Window]:
        """The epoch's windows, in order."""
        return windows_of(self.sources.dataset.train.row_groups, self.data.shuffle_rows, self.data.seed, epoch)

    def _ahead(self, pool: _Pool, step: int, end: int) -> Iterator[Batch]:
        """Keeps `prefetch` batches and, where there are threads, units of the next window under way."""
        windows = self._windows_since(step, end)
        held: deque[_Held] = deque()
        made: deque[Future[Batch]] = deque()
        while step < end or made:
            while step < end and len(made) < self.data.prefetch:
                low, high, epoch = self._places(step)
                while held and (held[0].window.epoch < epoch or held[0].window.end <= low):
                    held.popleft()
                while not held or (held[-1].window.epoch, held[-1].window.end) < (epoch, high):
                    held.append(_Held(next(windows)))
                needed = [each for each in held if each.window.epoch == epoch and each.window.first < high]
                for each in needed:
                    each.read(pool, self.reader)
                if self.data.threads and len(held) == len(needed) and (ahead := next(windows, None)) is not None:
                    held.append(_Held(ahead))
                if len(held) > len(needed):  # a unit a thread at a time: batches must not wait behind a whole window
                    held[-1].read(pool, self.reader, at_once=self.data.threads)
                if made and not all(rows.done() for each in needed for rows in each.rows):
                    break  # give what there is before waiting for more
                pieces = [piece for each in needed for piece in each.pieces(low, high, self.data.seed)]
                made.append(pool.submit(self._batch, step, pieces))
                step += 1
            yield made.popleft().result()

    def _places(self, step: int) -> tuple[int, int, int]:
        """The places of a step's rows in its epoch, and the epoch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        low = number * self.data.batch_size
        return low, min(low + self.data.batch_size, self.num_rows), epoch

    def _windows_since(self, step: int, end: int) -> Iterator[Window]:
        low, _, first = self._places(step)
        last_high, last = self._places(max(end - 1, step))[1:]
        for epoch in count(first):
            for window in self.windows(epoch):
                if (epoch, window.first) >= (last, last_high):
                    return
                if epoch > first or window.end > low:
                    yield window

    def _batch(self, step: int, pieces: list[tuple[UnitRows, int, int]]) -> Batch:
        """This rank's batch of a step, whose candidates come from the rows of all ranks."""
        taken = np.concatenate([rows.taken.slice(start, stop).values for rows, start, stop in pieces])
        rows_R = np.sum([rows.rows_per_rank(start, stop, self.num_ranks) for rows, start, stop in pieces], axis=0)
        mine = [rows.mine(start, stop) for rows, start, stop in pieces]
        candidates = self._candidates(step, taken)
        first = sum(candidates.sizes[: self.rank])
        share = candidates.item_row[first : first + candidates.sizes[self.rank]]
        batch = make_batch(
            self.sources.schema,
            [piece.user for piece in mine],
            self.sources.catalogue.columns.take(share),
            num_rows=max(int(rows_R.max()), *candidates.sizes),
            candidates=candidates,
            targets=self._targets(mine, candidates.item_row),
            num_rows_of_all_ranks=int(rows_R.sum()),
        )
        return batch.pin_memory() if self.pin_memory else batch

    def _candidates(self, step: int, taken: np.ndarray) -> Candidates:
        """The positives of all ranks and the step's sample, each item once."""
        negatives = self.loss.negatives
        item_row, is_negative = taken, None
        if negatives.sampled:
            drawn = sampled_items(negatives, len(self.sources.catalogue), self.data.seed, step)
            item_row = np.concatenate([taken, drawn])
        item_row = distinct(item_row)
        if not negatives.in_batch:
            is_negative = np.isin(item_row, drawn)
        if is_negative is None:
            is_negative = np.ones(len(item_row), bool)
        edges = len(item_row) * np.arange(self.num_ranks + 1) // self.num_ranks
        return Candidates(item_row, self.log_q_I[item_row], is_negative, tuple(np.diff(edges).tolist()))

    def _targets(self, mine: list[Examples], item_row: np.ndarray) -> Targets:
        """The positives as (row, candidate) pairs, and the pairs that are no negatives."""
        column_I = self._columns(item_row)
        positives = Lists.concat([piece.positives for piece in mine])
        row, column = positives.rows, column_I[positives.values]
        weight = np.ones(len(row), np.float32)
        if not positives.is_single:
            lengths = np.maximum(positives.lengths, 1).astype(np.float32)
            weight = np.repeat(lengths**-self.loss.positive_power, positives.lengths)
        if any(piece.weight is not None for piece in mine):
            weight = weight * np.concatenate([piece.weight for piece in mine if piece.weight is not None])[row]
        known_row, known_column = row, column
        if self.reader.is_by_user and self.loss.mask_history:
            known = Lists.concat([piece.known for piece in mine if piece.known is not None])
            known_column = column_I[known.values]
            is_candidate = known_column >= 0
            known_row, known_column = known.rows[is_candidate], known_column[is_candidate]
        elif self.fingerprint_I is not None:
            history = Lists.concat([piece.history for piece in mine if piece.history is not None])
            place, found = FingerprintTable(self.fingerprint_I[item_row]).find(history.values)
            known_row, known_column = np.append(row, history.rows[place]), np.append(column, found)
        column_I[item_row] = -1
        return Targets(row, column, weight, known_row, known_column)

    def _columns(self, item_row: np.ndarray) -> np.ndarray:
        """Each catalogue row's place among the candidates, or -1: this thread's array, to be wiped after use."""
        if not hasattr(self._scratch, "column_I"):
            self._scratch.column_I = np.full(len(self.sources.catalogue), -1, np.int64)
        column_I: np.ndarray = self._scratch.column_I
        column_I[item_row] = np.arange(len(item_row))
        return column_I


class _Held:
    """A window whose units are read, being read or still to be."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.rows: list[Future[UnitRows]] = []
        self._interleaving: Interleaving | None = None

    def read(self, pool: _Pool, reader: UnitReader, at_once: int | None = None) -> None:
        """Have the units read that are not yet; with `at_once`, only while fewer than so many are under way."""
        for unit in self.window.units[len(self.rows) :]:
            if at_once is not None and sum(not rows.done() for rows in self.rows) >= at_once:
                return
            self.rows.append(pool.submit(reader.read, unit))

    def pieces(self, low: int, high: int, seed: int) -> list[tuple[UnitRows, int, int]]:
        """The rows at the epoch's places low .. high - 1, as slices of units."""
        if self._interleaving is None:
            self._interleaving = Interleaving.of(self.window, seed)
        start, stop = max(low - self.window.first, 0), min(high - self.window.first, self.window.num_rows)
        slices = self._interleaving.rows(start, stop)
        return [(rows.result(), *part) for rows, part in zip(self.rows, slices, strict=True) if part[0] < part[1]]


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, rising: np.unique by sorting, which is faster here than its hash table."""
    values = np.sort(values)
    is_new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    return values[is_new]


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
