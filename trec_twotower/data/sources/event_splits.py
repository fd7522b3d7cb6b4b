"""Sorted events as the rows of train, valid and test, each with what its user did before."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.lists import offsets_of
from trec_twotower.data.sources.writer import DatasetWriter, list_column

if TYPE_CHECKING:
    from trec_twotower.data.sources.event_log import LogOptions

MIN_EVENTS = 3  # leave-last-out: users with fewer are trained on, not evaluated
_VALUES_PER_PIECE = 4_000_000  # list elements made at a time


@dataclass(frozen=True, eq=False)
class Piece:
    """The events of whole users, sorted by user, second and item.

    For made-up events of users a and b:
    user  a a a a b      first  0 0 0 0 4   where the user's events begin
    time  5 7 7 8 6      now    0 1 1 3 4   where the events of the same user and second begin
    so that the past of event e is the rows first[e] .. now[e] - 1.
    """

    table: pa.Table

    @cached_property
    def item(self) -> pa.Array:
        return self.table["item_id"].combine_chunks()

    @cached_property
    def row(self) -> np.ndarray:
        return np.arange(len(self.table))

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each user, and one past the last row of all."""
        return np.append(np.flatnonzero(_is_new(self.table["user_id"])), len(self.table))

    @cached_property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def first(self) -> np.ndarray:
        return self.starts[self.owner]

    @cached_property
    def now(self) -> np.ndarray:
        begins = _is_new(self.table["timestamp"])
        begins[self.starts[:-1]] = True
        return np.maximum.accumulate(np.where(begins, self.row, 0))

    @cached_property
    def earliest(self) -> np.ndarray:
        """The row of the first event of the same user and item."""
        code = pc.dictionary_encode(self.item)
        pair = self.owner * len(code.dictionary) + code.indices.to_numpy()
        _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
        return first[inverse]

    def ids(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.ListArray:
        """Lists of item ids: element r holds those of the events rows[starts[r] : stops[r]]."""
        lists = list_column(rows, starts, stops)
        return pa.ListArray.from_arrays(lists.offsets, self.item.take(lists.values))


class Splits:
    """Turns pieces into the rows of train, valid and test; a kind of split is one method."""

    def __init__(self, options: LogOptions, writer: DatasetWriter) -> None:
        self.options = options
        self.writer = writer
        self.rows: Counter[str] = Counter()
        self.repeats_kept = 0
        self.repeats_held_out = 0

    def leave_last_out(self, piece: Piece) -> None:
        starts, ends = piece.starts[:-1], piece.starts[1:]
        is_tested = ends - starts >= MIN_EVENTS
        self._write_train(piece, piece.row < (ends - 2 * is_tested)[piece.owner])
        for split, back in (("valid", 2), ("test", 1)):
            row = (ends - back)[is_tested]
            asked = piece.table.select(["user_id", *self.options.asked]).take(row)
            self._write_held_out(split, piece, asked, piece.row, row, row + 1, piece.first[row], piece.now[row])
            self.repeats_held_out += int((piece.earliest[row] < piece.now[row]).sum())

    def time(self, piece: Piece) -> None:
        second = piece.table["timestamp"].to_numpy()
        self._write_train(piece, second < self.options.periods["valid"][0])
        is_first = piece.earliest == piece.row
        for split, (start, stop) in self.options.periods.items():
            positive = np.flatnonzero(is_first & (second >= start) & (second < stop))
            count = np.bincount(piece.owner[positive], minlength=len(piece.starts) - 1)
            user, offsets = np.flatnonzero(count), offsets_of(count)
            past = np.bincount(piece.owner[second < start], minlength=len(count))
            first = piece.starts[user]
            asked = pa.table({"user_id": piece.table["user_id"].take(first), "timestamp": np.full(len(user), start)})
            self._write_held_out(
                split, piece, asked, positive, offsets[user], offsets[user + 1], first, first + past[user]
            )

    def _write_train(self, piece: Piece, is_train: np.ndarray) -> None:
        row = np.flatnonzero(is_train & (piece.now - piece.first >= self.options.min_history))
        oldest = np.maximum(piece.first[row], piece.now[row] - self.options.max_history)
        for part in _parts(piece.now[row] - oldest):
            history = piece.ids(piece.row, oldest[part], piece.now[row[part]])
            self._write("train", piece.table.take(row[part]).append_column("history", history))
        self.repeats_kept += int((piece.earliest < piece.row).sum())
        if self.options.rows == "both":
            self._write_users(piece, is_train)

    def _write_users(self, piece: Piece, is_train: np.ndarray) -> None:
        """A row per user: what it took in train, each item once, oldest first."""
        positive = np.flatnonzero(is_train & (piece.earliest == piece.row))
        count = np.bincount(piece.owner[positive], minlength=len(piece.starts) - 1)
        user, offsets = np.flatnonzero(count), offsets_of(count)
        for part in _parts(count[user]):
            taken = piece.ids(positive, offsets[user[part]], offsets[user[part] + 1])
            users = piece.table["user_id"].take(piece.starts[user[part]])
            self.writer.write("train_users", pa.table({"user_id": users, "positives": taken}))

    def _write_held_out(
        self,
        split: str,
        piece: Piece,
        asked: pa.Table,
        positive: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        past_starts: np.ndarray,
        past_stops: np.ndarray,
    ) -> None:
        """Row r is asked[r], with the items of positive[starts[r] : stops[r]] to find, and its past."""
        for part in _parts(past_stops - past_starts + stops - starts):
            positives = piece.ids(positive, starts[part], stops[part])
            history = piece.ids(piece.row, past_starts[part], past_stops[part])
            rows = asked.slice(part.start, part.stop - part.start)
            self._write(split, rows.add_column(1, "positives", positives).append_column("history", history))

    def _write(self, split: str, table: pa.Table) -> None:
        self.rows[split] += len(table)
        self.writer.write(split, table if self.options.shows_times else table.drop_columns("timestamp"))


def whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows, in tables that no user's rows are parted by."""
    waiting: list[pa.Table] = []
    for batch in batches:
        table = pa.Table.from_batches([batch])
        cut = int(np.flatnonzero(_is_new(table["user_id"]))[-1])
        if cut or (waiting and waiting[0]["user_id"][0] != table["user_id"][0]):
            yield pa.concat_tables([*waiting, table.slice(0, cut)]).combine_chunks()
            waiting = []
        waiting.append(table.slice(cut))
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _is_new(column: pa.ChunkedArray) -> np.ndarray:
    """Which values (bool) differ from the one before; the first does."""
    values = column.combine_chunks()
    later = pc.not_equal(values.slice(1), values.slice(0, max(len(values) - 1, 0)))
    return np.append(True, later.to_numpy(zero_copy_only=False))


def _parts(lengths: np.ndarray) -> Iterator[slice]:
    """Runs of rows whose lists together hold about `_VALUES_PER_PIECE` values."""
    cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // _VALUES_PER_PIECE)) + 1
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(lengths)]):
        if stop > start:
            yield slice(start, stop)
