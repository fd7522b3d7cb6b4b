"""Hashed training rows, which are cached, permuted and cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from trec_twotower.data.features.columns import Columns
from trec_twotower.ops.ragged import Ragged


class _ByRow:
    """A dataclass of arrays, Ragged and Columns with one entry per row; absent parts are None."""

    def take(self, rows: np.ndarray) -> Self:
        """Return the given rows, in the given order."""
        return self._each(lambda part: part[rows] if isinstance(part, np.ndarray) else part.take(rows))

    def slice(self, start: int, stop: int) -> Self:
        """Return rows start .. stop - 1 without a copy."""
        return self._each(lambda part: part[start:stop] if isinstance(part, np.ndarray) else part.slice(start, stop))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Return the concatenated rows of all parts."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            values = [value for part in parts if (value := getattr(part, name)) is not None]
            if not values:
                return None
            return np.concatenate(values) if isinstance(values[0], np.ndarray) else type(values[0]).concat(values)

        return cls(*map(joined, _names(cls)))

    def _each(self, change: Callable[[Any], Any]) -> Self:
        values = (getattr(self, name) for name in _names(type(self)))
        return type(self)(*(None if value is None else change(value) for value in values))


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


@dataclass(frozen=True)
class RowItems(_ByRow):
    """The items of rows, which every rank reads for all rows because they are the candidates of a step."""

    positives: Ragged  # catalogue rows
    given: Ragged | None = None  # catalogue rows of the impressions; the weights are their labels
    user_key: np.ndarray | None = None  # int64 key of the user's id, see hashing.py


@dataclass(frozen=True)
class Examples(_ByRow):
    """Hashed training rows."""

    user: Columns
    positives: Ragged  # catalogue rows
    known: Ragged | None = None  # catalogue rows that are not negatives, in addition to the positives
    history: Ragged | None = None  # fingerprints of further items that are not negatives, in the catalogue or not
    weight: np.ndarray | None = None  # float32, one per row; None: 1
    given: Ragged | None = None  # as in RowItems
    given_weight: Ragged | None = None  # float32, one per item of `given`
    user_key: np.ndarray | None = None  # as in RowItems

    @property
    def items(self) -> RowItems:
        return RowItems(self.positives, self.given, self.user_key)
