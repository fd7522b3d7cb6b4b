"""Training rows, hashed: the unit that is cached, permuted and cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from trec_twotower.data.features.transform import Columns
from trec_twotower.ops.ragged import Ragged


class _ByRow:
    """A dataclass of arrays, Ragged and Columns that have one entry a row each; None where there are none."""

    def take(self, rows: np.ndarray) -> Self:
        """The given rows, in the given order."""
        return self._each(lambda part: part[rows] if isinstance(part, np.ndarray) else part.take(rows))

    def slice(self, start: int, stop: int) -> Self:
        """Rows start .. stop - 1, without a copy."""
        return self._each(lambda part: part[start:stop] if isinstance(part, np.ndarray) else part.slice(start, stop))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts below each other."""
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
    """What every rank knows of each row, its own or not: the candidates of a step come from them."""

    positives: Ragged  # catalogue rows
    given: Ragged | None = None  # catalogue rows that the rows name beside these, with labels as weights
    user_key: np.ndarray | None = None  # int64: the user's id, see hashing.py


@dataclass(frozen=True)
class Examples(_ByRow):
    """Some training rows, hashed."""

    user: Columns
    positives: Ragged  # catalogue rows
    known: Ragged | None = None  # catalogue rows that are no negatives, beside the positives
    history: Ragged | None = None  # the same by fingerprint, of items that may be outside the catalogue
    weight: np.ndarray | None = None  # float32, one a row; None: 1
    given: Ragged | None = None  # as in RowItems
    given_weight: Ragged | None = None  # float32, as long as those
    user_key: np.ndarray | None = None  # as in RowItems

    @property
    def items(self) -> RowItems:
        return RowItems(self.positives, self.given, self.user_key)
