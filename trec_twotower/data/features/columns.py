"""The features of some rows: table rows and numbers by feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trec_twotower.ops.ragged import Ragged


@dataclass(frozen=True)
class Columns:
    """The features of some rows of one side.

    `sparse[f]` holds the buckets (int32) of feature f; `numbers[f]` has num_numbers columns; a number has its
    normalized value and 1 if it is missing. `sparse[f@2]` holds the buckets of the second hash of a table. For text
    with a language model, `sparse[f]` holds tokens. The side columns of a sequence are `sparse[f@gap]`,
    `sparse[f@action]` (buckets) and `sparse[f@row]` (catalogue rows, whose features are in `items`).
    """

    num_rows: int
    sparse: Mapping[str, Ragged]
    numbers: Mapping[str, np.ndarray]  # float32 (rows, num_numbers)
    items: Columns | None = None  # features of the whole catalogue, for attributes of steps

    def take(self, rows: np.ndarray) -> Columns:
        return Columns(
            len(rows),
            {name: lists.take(rows) for name, lists in self.sparse.items()},
            {name: take_numbers(number, rows) for name, number in self.numbers.items()},
            self.items,
        )

    def slice(self, start: int, stop: int) -> Columns:
        """Return rows start .. stop - 1, without a copy."""
        return Columns(
            stop - start,
            {name: lists.slice(start, stop) for name, lists in self.sparse.items()},
            {name: number[start:stop] for name, number in self.numbers.items()},
            self.items,
        )

    def merge(self, other: Columns) -> Columns:
        """Return the features of both, for the same rows."""
        assert self.num_rows == other.num_rows
        return Columns(
            self.num_rows,
            {**self.sparse, **other.sparse},
            {**self.numbers, **other.numbers},
            self.items or other.items,
        )

    @staticmethod
    def concat(parts: Sequence[Columns]) -> Columns:
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return Columns(
            sum(part.num_rows for part in parts),
            {name: Ragged.concat([part.sparse[name] for part in parts]) for name in first.sparse},
            {name: np.concatenate([part.numbers[name] for part in parts]) for name in first.numbers},
            parts[-1].items,
        )


def take_numbers(number: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows of a (rows, N) float32 array; pairs are copied as one 64-bit value each."""
    if number.shape[1] != 2:
        return number[rows]
    words = np.ascontiguousarray(number).reshape(-1).view(np.int64)
    return words[rows].view(np.float32).reshape(-1, 2)
