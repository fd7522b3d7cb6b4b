"""Convert the sorted events of whole users into train, valid, test and serving rows with histories."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import SERVING
from trec_twotower.data.sources.event_logs.log_options import ORDER, LogOptions
from trec_twotower.data.sources.writer import DatasetWriter, list_column
from trec_twotower.ops.hashing import id_keys, uniform
from trec_twotower.ops.ragged import offsets_of

MIN_CANDIDATES = 3  # events that may be held out; a user with fewer is in train only
MIN_BASKETS = 2  # minimum baskets of a user for a test row; a valid row needs one more
_VALUES_PER_PIECE = 4_000_000  # list elements in memory at a time
_TRAIN, _VALID, _TEST = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Ranges:
    """Ranges of events: range r holds the events `rows[starts[r] : stops[r]]`, as row numbers of a piece."""

    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    def part(self, lists: slice) -> Ranges:
        return Ranges(self.rows, self.starts[lists], self.stops[lists])

    def flat(self) -> pa.ListArray:
        """Return the row numbers as a list array, one list per range."""
        return list_column(self.rows, self.starts, self.stops)


@dataclass(frozen=True, eq=False)
class Piece:
    """The events of whole users, sorted by user, time and what orders events of equal time.

    For made-up events of users a and b:
    user  a a a a b      first  0 0 0 0 4   where the user's events begin
    time  5 7 7 8 6      now    0 1 1 3 4   where the events of the same user and instant begin
    so that the events before event e are the rows first[e] .. now[e] - 1.
    """

    table: pa.Table

    @cached_property
    def row(self) -> np.ndarray:
        return np.arange(len(self.table))

    @cached_property
    def starts(self) -> np.ndarray:
        """Return the first row of each user, followed by the total number of rows."""
        return np.append(np.flatnonzero(_is_new(self.table["user_id"])), len(self.table))

    @property
    def num_users(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(self.num_users), np.diff(self.starts))

    @cached_property
    def first(self) -> np.ndarray:
        return self.starts[self.owner]

    @cached_property
    def now(self) -> np.ndarray:
        begins = _is_new(self.table["timestamp"])
        if ORDER in self.table.column_names:
            begins |= _is_new(self.table[ORDER])
        begins[self.starts[:-1]] = True
        return np.maximum.accumulate(np.where(begins, self.row, 0))

    @cached_property
    def earliest(self) -> np.ndarray:
        """Return, for each event, the row of the first event with the same user and item."""
        code = pc.dictionary_encode(one_chunk(self.table["item_id"]))
        pair = self.owner * len(code.dictionary) + code.indices.to_numpy()
        _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
        return first[inverse]

    @property
    def is_new(self) -> np.ndarray:
        """Return whether each event is the first of its user with the item."""
        return self.earliest == self.row

    def once(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` (rising) that are the first of their user and item among these rows."""
        return rows[np.sort(np.unique(self.earliest[rows], return_index=True)[1])]

    def once_per_instant(self) -> np.ndarray:
        """Return the rows that are the first of their user and item within the instant."""
        return np.sort(np.unique(self.earliest * len(self.row) + self.now, return_index=True)[1])

    def lists(self, columns: Sequence[str], ranges: Ranges) -> list[pa.ListArray]:
        """Return one list array per column: the column's values at the events of each range."""
        flat = ranges.flat()
        return [
            pa.ListArray.from_arrays(flat.offsets, one_chunk(self.table[name]).take(flat.values)) for name in columns
        ]

    def by_user(self, rows: np.ndarray) -> tuple[np.ndarray, Ranges]:
        """Return the users that have any of `rows` (rising), and each one's own rows."""
        count = np.bincount(self.owner[rows], minlength=self.num_users)
        user, offsets = np.flatnonzero(count), offsets_of(count)
        return user, Ranges(rows, offsets[user], offsets[user + 1])


def break_ties(table: pa.Table, seed: int, *, is_order: bool = False) -> pa.Table:
    """Return sorted events with those of one instant in an order drawn by `seed`, user and item.

    With `is_order` the drawn order counts as known: the column ORDER parts the events of one instant.
    """
    piece = Piece(table)
    row = np.flatnonzero(np.bincount(piece.now, minlength=len(table))[piece.now] > 1)
    if is_order:
        row = piece.row
    if not len(row):
        return table
    draw = draws(table.take(row), seed)
    order = np.lexsort((row, draw, piece.now[row]))
    place = piece.row.copy()
    place[row] = row[order]
    table = table.take(place)
    return table.append_column(ORDER, pa.array(draw[order])) if is_order else table


def draws(events: pa.Table, seed: int) -> np.ndarray:
    """Return a number in [0, 1) per event, which depends on the seed, the user and the item alone."""
    user, item = (id_keys(one_chunk(events[name]), name) for name in ("user_id", "item_id"))
    return uniform(seed, user, item)


class Splits:
    """Writer of the rows of each piece for the configured split, with counts of the written rows."""

    def __init__(self, options: LogOptions, writer: DatasetWriter) -> None:
        self.options = options
        self.writer = writer
        self.rows: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._write_piece: Callable[[Piece], None] = {
            "leave-last-out": self._leave_last_out,
            "position": self._leave_last_out,
            "last-basket": self._last_basket,
            "time": self._by_time,
            "random": self._at_random,
            "none": self._keep_all,
        }[options.split]

    def write(self, piece: Piece) -> None:
        """Write the rows of a piece."""
        self.counts["repeats_kept"] += int((~piece.is_new).sum())
        self._write_piece(piece)

    def _leave_last_out(self, piece: Piece) -> None:
        candidate = piece.row[piece.is_new] if self.options.hold_out == "new" else piece.row
        offsets = offsets_of(np.bincount(piece.owner[candidate], minlength=piece.num_users))
        user = np.flatnonzero(np.diff(offsets) >= MIN_CANDIDATES)
        valid, test = (candidate[offsets[user + 1] - back] for back in (2, 1))
        train_end = piece.starts[1:].copy()
        train_end[user] = valid
        self._write_train_before(piece, train_end, len(valid) + len(test))
        for split, row in (("valid", valid), ("test", test)):
            asked = piece.table.select(["user_id", *self.options.asked]).take(row)
            past = Ranges(piece.row, piece.first[row], piece.now[row])
            self._write_held_out(split, piece, asked, Ranges(row, np.arange(len(row)), np.arange(len(row)) + 1), past)
        self.counts["users_in_train_only"] += piece.num_users - len(user)

    def _last_basket(self, piece: Piece) -> None:
        is_any = self.options.hold_out == "any"
        candidate = piece.once_per_instant() if is_any else piece.row[piece.is_new]
        begin = np.flatnonzero(np.diff(piece.now[candidate], prepend=-1))  # first candidate of each basket
        offsets = offsets_of(np.bincount(piece.owner[candidate[begin]], minlength=piece.num_users))
        begin_or_end, train_end = np.append(begin, len(candidate)), piece.starts[1:].copy()
        held_out = {}
        for split, back in (("test", 1), ("valid", 2)):
            user = np.flatnonzero(np.diff(offsets) >= MIN_BASKETS - 1 + back)
            basket = offsets[user + 1] - back
            row = candidate[begin[basket]]
            train_end[user] = piece.now[row]
            positive = Ranges(candidate, begin_or_end[basket], begin_or_end[basket + 1])
            held_out[split] = (row, positive, Ranges(piece.row, piece.first[row], piece.now[row]))
        self._write_train_before(piece, train_end, sum(int(part.lengths.sum()) for _, part, _ in held_out.values()))
        for split in ("valid", "test"):
            row, positive, past = held_out[split]
            self._write_held_out(split, piece, piece.table.select(["user_id", "timestamp"]).take(row), positive, past)
        self.counts["users_in_train_only"] += piece.num_users - len(held_out["test"][0])

    def _by_time(self, piece: Piece) -> None:
        time = piece.table["timestamp"].to_numpy()
        self._write_train(piece, time < self.options.periods["valid"][0])
        for split, (start, stop) in self.options.periods.items():
            row = piece.row[(time >= start) & (time < stop)]
            positive = row[piece.is_new[row]] if self.options.hold_out == "new" else piece.once(row)
            user, positives = piece.by_user(positive)
            first = piece.starts[user]
            past = np.bincount(piece.owner[time < start], minlength=piece.num_users)[user]
            asked = pa.table({"user_id": piece.table["user_id"].take(first), "timestamp": np.full(len(user), start)})
            self._write_held_out(split, piece, asked, positives, Ranges(piece.row, first, first + past))

    def _at_random(self, piece: Piece) -> None:
        part = self._draw_parts(piece)
        self._write_train(Piece(piece.table.filter(pa.array(part == _TRAIN))), None)
        for split, number in (("valid", _VALID), ("test", _TEST)):
            user, positives = piece.by_user(piece.row[piece.is_new & (part == number)])
            past_row = piece.row[part < number]
            offsets = offsets_of(np.bincount(piece.owner[past_row], minlength=piece.num_users))
            asked = pa.table({"user_id": piece.table["user_id"].take(piece.starts[user])})
            past = Ranges(past_row, offsets[user], offsets[user + 1])
            self._write_held_out(split, piece, asked, positives, past)
        is_tested = np.bincount(piece.owner, part > _TRAIN, minlength=piece.num_users) > 0
        self.counts["users_in_train_only"] += int((~is_tested).sum())

    def _draw_parts(self, piece: Piece) -> np.ndarray:
        """Return the part of each event: a share of each user's items, and all events of an item with it."""
        row = piece.row[piece.is_new]
        draw = draws(piece.table.take(row), self.options.tie_seed or 0)
        row = row[np.lexsort((row, draw, piece.owner[row]))]
        count = np.bincount(piece.owner[row], minlength=piece.num_users)
        from_end = np.repeat(offsets_of(count)[1:], count) - np.arange(len(row))  # 1 for a user's last item
        num_valid, num_test = held_out_items(count, *self.options.shares)
        num_valid, num_test = num_valid[piece.owner[row]], num_test[piece.owner[row]]
        part = np.zeros(len(piece.row), np.int8)
        part[row[from_end <= num_valid + num_test]] = _VALID
        part[row[from_end <= num_test]] = _TEST
        return part[piece.earliest]

    def _keep_all(self, piece: Piece) -> None:
        self._write_train(piece, None)
        begin, end = piece.starts[:-1], piece.starts[1:]
        asked = piece.table.select(["user_id", *self.options.asked]).take(end - 1)
        nothing = Ranges(piece.row, begin, begin)
        self._write_held_out(SERVING, piece, asked, nothing, Ranges(piece.row, begin, end))

    def _write_train_before(self, piece: Piece, train_end: np.ndarray, num_held_out: int) -> None:
        """Write train rows of the items whose first event is before `train_end` of its user.

        Later events with these items are train rows, too: only held-out items are in no train row and in no history
        of one. With hold_out = any no later event is left to train on.
        """
        known = piece.row if self.options.hold_out == "any" else piece.earliest
        is_train = known < train_end[piece.owner]
        self._write_train(Piece(piece.table.filter(pa.array(is_train))), None)
        self.counts["repeats_left_out"] += len(piece.row) - num_held_out - int(is_train.sum())

    def _write_train(self, piece: Piece, is_train: np.ndarray | None) -> None:
        """Write one row per event with at least min_history earlier events, or per such event marked in `is_train`."""
        is_long = piece.now - piece.first >= self.options.min_history
        row = np.flatnonzero(is_long if is_train is None else is_train & is_long)
        self._count_empty("train", piece.now[row] == piece.first[row], row > piece.first[row])
        oldest = np.maximum(piece.first[row], piece.now[row] - self.options.max_history)
        past = Ranges(piece.row, oldest, piece.now[row])
        events = piece.table.select(["user_id", "item_id", *self.options.kept])
        for part in _parts(past.lengths):
            self._write("train", self._with_history(piece, events.take(row[part]), past.part(part)))
        if self.options.rows == "both":
            self._write_users(piece, piece.is_new if is_train is None else piece.is_new & is_train)

    def _write_users(self, piece: Piece, is_positive: np.ndarray) -> None:
        """Write one row per user with the marked items, oldest first."""
        user, positives = piece.by_user(piece.row[is_positive])
        for part in _parts(positives.lengths):
            [items] = piece.lists(["item_id"], positives.part(part))
            users = piece.table["user_id"].take(piece.starts[user[part]])
            self.writer.write("train_users", pa.table({"user_id": users, "positives": items}))

    def _write_held_out(self, split: str, piece: Piece, asked: pa.Table, positive: Ranges, past: Ranges) -> None:
        """Write rows asked[r], at most one per user, with the items to find and the events before.

        The events before are all that the row's user has in `past`; if an item's events are among them, its first is.
        """
        is_past = np.zeros(len(piece.row), bool)
        for part in _parts(past.lengths + positive.lengths):
            flat = past.part(part).flat().values.to_numpy()
            is_past[flat] = True
            [positives] = piece.lists(["item_id"], positive.part(part))
            rows = asked.slice(part.start, part.stop - part.start).add_column(1, "positives", positives)
            self._write(split, self._with_history(piece, rows, past.part(part)))
        if split != SERVING:
            event = positive.flat()
            is_seen = is_past[piece.earliest[event.values.to_numpy()]]
            row = np.repeat(np.arange(len(positive.lengths)), positive.lengths)
            num_seen = np.bincount(row, is_seen, minlength=len(positive.lengths))
            self.counts[f"{split}_unfindable"] += int((num_seen == positive.lengths).sum())
            earliest = positive.rows[positive.starts]
            self._count_empty(split, past.lengths == 0, earliest > piece.first[earliest])

    def _with_history(self, piece: Piece, rows: pa.Table, past: Ranges) -> pa.Table:
        history, *others = piece.lists(["item_id", *self.options.outcome_columns], past)
        rows = rows.append_column("history", history)
        for name, values in zip(self.options.outcome_columns, others, strict=True):
            rows = rows.append_column(f"history_{name}", values)
        return rows

    def _count_empty(self, split: str, is_empty: np.ndarray, has_earlier: np.ndarray) -> None:
        """Count rows without history, and those of them whose user has events at the same time."""
        self.counts[f"{split}_empty_histories"] += int(is_empty.sum())
        self.counts[f"{split}_empty_by_ties"] += int((is_empty & has_earlier).sum())

    def _write(self, split: str, table: pa.Table) -> None:
        self.rows[split] += len(table)
        if "timestamp" in table.column_names:
            place = table.column_names.index("timestamp")
            seconds = pc.divide(table["timestamp"], 1_000_000)
            table = table.set_column(place, "timestamp", seconds) if self.options.has_times else table.drop("timestamp")
        self.writer.write(split, table)


def held_out_items(count: np.ndarray, valid_share: float, test_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of each user's `count` items are held out for valid and test.

    A share of them, rounded down, but at least one where the share is above 0 and at most what leaves one item to
    train on; none of a user with fewer than MIN_CANDIDATES items.
    """
    is_large = count >= MIN_CANDIDATES
    num_valid, num_test = (
        np.where(is_large & (share > 0), np.maximum(np.floor(count * share + 1e-9), 1), 0).astype(np.int64)
        for share in (valid_share, test_share)
    )
    num_valid = np.minimum(num_valid, np.maximum(count - 1 - (num_test > 0), 0))
    return num_valid, np.minimum(num_test, np.maximum(count - 1 - num_valid, 0))


def whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the same rows in tables that keep all rows of a user together."""
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
    """Return whether each value (bool) differs from the one before; the first does."""
    values = one_chunk(column)
    later = pc.not_equal(values.slice(1), values.slice(0, max(len(values) - 1, 0)))
    return np.append(True, later.to_numpy(zero_copy_only=False))


def _parts(lengths: np.ndarray) -> Iterator[slice]:
    """Yield runs of rows whose lists together hold about `_VALUES_PER_PIECE` values."""
    cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // _VALUES_PER_PIECE)) + 1
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(lengths)]):
        if stop > start:
            yield slice(start, stop)
