"""Ragged arrays: rows of different lengths in two flat arrays, used for bags, positives and seen items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trec_twotower.ops.compilation import LINE_BYTES, copy_run, kernel, line_from

Run = slice  # rows start .. stop - 1; an alias, because the class has a method `slice`


@dataclass(frozen=True, eq=False)
class Ragged:
    """A ragged array: row r holds values[offsets[r]:offsets[r + 1]], and the weights of that range if there are any.

    Three rows [7, 8], [], [9]:  offsets = [0, 2, 2, 3]  values = [7, 8, 9]
    """

    offsets: np.ndarray  # int64, number of rows + 1
    values: np.ndarray
    weights: np.ndarray | None = None  # float32
    is_single: bool = False  # every row has exactly one value, so values[r] is the value of row r

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0 and self.offsets[-1] == len(self.values), "offsets do not span the values"

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        """Return the ragged int64 array with these sequences as rows."""
        rows = [np.asarray(row, dtype=np.int64) for row in lists]
        return cls(offsets_of([len(row) for row in rows]), np.concatenate([np.empty(0, np.int64), *rows]))

    @classmethod
    def singles(cls, values: np.ndarray) -> Ragged:
        """Return an array with one value per row."""
        return cls(_counting(len(values) + 1), values, None, True)

    @classmethod
    def empty(cls, num_rows: int) -> Ragged:
        """Return an array of empty rows."""
        return cls(np.zeros(num_rows + 1, np.int64), np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the length of each row, int32."""
        return np.subtract(self.offsets[1:], self.offsets[:-1], dtype=np.int32, casting="unsafe")

    @property
    def rows(self) -> np.ndarray:
        """Return the row of each value."""
        if self.is_single:
            return np.arange(len(self))
        return np.repeat(np.arange(len(self)), self.lengths)

    def slice(self, start: int, stop: int) -> Ragged:
        """Return rows start .. stop - 1; the values are not copied."""
        if self.is_single:
            return Ragged.singles(self.values[start:stop])
        offsets = self.offsets[start : stop + 1]
        part = np.s_[int(offsets[0]) : int(offsets[-1])]
        return Ragged(offsets - offsets[0], self.values[part], None if self.weights is None else self.weights[part])

    def values_of(self, rows: Run) -> np.ndarray:
        """Return the values of rows start .. stop - 1 without a copy."""
        if self.is_single:
            return self.values[rows]
        return self.values[self.offsets[rows.start] : self.offsets[rows.stop]]

    def take(self, rows: np.ndarray) -> Ragged:
        """Return the rows with these indices, in this order."""
        if self.is_single:
            return Ragged.singles(self.values[rows])
        starts, offsets = np.empty(len(rows), np.int64), np.empty(len(rows) + 1, np.int64)
        total = find_lists(self.offsets, rows, starts, offsets)

        def copy(values: np.ndarray) -> np.ndarray:
            out = np.empty(total, values.dtype)
            copy_lists(np.ascontiguousarray(values), starts, offsets, out)
            return out

        return Ragged(offsets, copy(self.values), None if self.weights is None else copy(self.weights))

    def where(self, keep: np.ndarray) -> Ragged:
        """Return the array with only the values marked in `keep` (bool, one per value) and all rows."""
        num_before = np.concatenate([[0], np.cumsum(keep)])
        weights = None if self.weights is None else self.weights[keep]
        return Ragged(num_before[self.offsets].astype(np.int64), self.values[keep], weights)

    def newest(self, max_length: int | None) -> Ragged:
        """Return each row's last `max_length` values."""
        if max_length is None or not len(self.values) or int(self.lengths.max()) <= max_length:
            return self
        from_end = np.repeat(self.offsets[1:], self.lengths) - np.arange(len(self.values))
        return self.where(from_end <= max_length)

    def distinct(self) -> Ragged:
        """Return each row's distinct values in ascending order, without weights."""
        if not len(self.values):
            return self
        least = int(self.values.min())
        span = int(self.values.max()) - least + 1
        row, value = np.divmod(np.unique(self.rows * span + (self.values - least)), span)
        return Ragged(offsets_of(np.bincount(row, minlength=len(self))), value + least)

    def contain(self, item_row_BK: np.ndarray) -> np.ndarray:
        """Return bool of the same shape: whether the value is in its own row; -1 (no item) never is."""
        assert len(item_row_BK) == len(self), f"{len(item_row_BK)} rows against {len(self)} lists"
        is_item = self.values >= 0
        if item_row_BK.size == 0 or not is_item.any():
            return np.zeros(item_row_BK.shape, dtype=bool)
        span = max(int(item_row_BK.max()), int(self.values.max())) + 1
        key = np.sort((self.rows * span + self.values)[is_item])
        wanted_BK = np.arange(len(self))[:, None] * span + item_row_BK
        at_BK = np.minimum(np.searchsorted(key, wanted_BK), len(key) - 1)
        return (key[at_BK] == wanted_BK) & (item_row_BK >= 0)

    def hold(self, other: Ragged) -> np.ndarray:
        """Return bool per value of `other`: whether the same row of this array has it; -1 (no item) never is."""
        assert len(other) == len(self), f"{len(other)} rows against {len(self)} lists"
        span = max(int(self.values.max(initial=0)), int(other.values.max(initial=0))) + 1
        own = (self.rows * span + self.values)[self.values >= 0]
        return np.isin(other.rows * span + other.values, own) & (other.values >= 0)

    @staticmethod
    def concat(parts: Sequence[Ragged]) -> Ragged:
        """Return the rows of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        if all(part.is_single for part in parts):
            return Ragged.singles(np.concatenate([part.values for part in parts]))
        weights = None
        if any(part.weights is not None for part in parts):
            weights = np.concatenate([weights_of(part) for part in parts])
        offsets = offsets_of(np.concatenate([part.lengths for part in parts]))
        return Ragged(offsets, np.concatenate([part.values for part in parts]), weights)


def side_by_side(first: Ragged, second: Ragged) -> Ragged:
    """Return each row of `first` followed by the same row of `second`."""
    both = Ragged.concat([Ragged(first.offsets, first.values), Ragged(second.offsets, second.values)])
    order = np.arange(2 * len(first)).reshape(2, -1).T.reshape(-1)
    interleaved = both.take(order)
    return Ragged(interleaved.offsets[::2], interleaved.values)


def distinct(values: np.ndarray) -> np.ndarray:
    """Return the distinct values in ascending order by sorting, which is faster here than np.unique's hash table."""
    values = np.sort(values)
    is_new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    return values[is_new]


_COUNT = np.arange(1 << 14)
_COUNT.flags.writeable = False


def _counting(stop: int) -> np.ndarray:
    """Return 0 .. stop - 1; short results share memory."""
    return _COUNT[:stop] if stop <= len(_COUNT) else np.arange(stop)


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the offsets of rows with these lengths, int64."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def weights_of(lists: Ragged) -> np.ndarray:
    """Return the weights, or ones if there are none."""
    return np.ones(len(lists.values), np.float32) if lists.weights is None else lists.weights


@kernel
def find_lists(offsets: np.ndarray, rows: np.ndarray, starts: np.ndarray, out_offsets: np.ndarray) -> int:
    """Write the start of each of `rows` in the values, and the offsets of a copy of these rows; returns its end."""
    end = 0
    out_offsets[0] = 0
    for i in range(rows.size):
        row = rows[i]
        starts[i] = offsets[row]
        end += offsets[row + 1] - offsets[row]
        out_offsets[i + 1] = end
    return end


@kernel
def copy_lists(values: np.ndarray, starts: np.ndarray, out_offsets: np.ndarray, out: np.ndarray) -> None:
    """Copy the rows of `find_lists` by whole cache lines: the next row overwrites the surplus of a row.

    The two loops are separate, because a length that is still being loaded would delay all later copies.
    """
    line, address = LINE_BYTES // values.itemsize, values.ctypes.data
    for i in range(starts.size):
        at, low = out_offsets[i], starts[i]
        count = out_offsets[i + 1] - at
        if low + count + line <= values.size and at + count + line <= out.size:
            for k in range(0, count, line):
                line_from(out, at + k, address + (low + k) * values.itemsize)
        else:
            copy_run(out, at, values, low, count)
