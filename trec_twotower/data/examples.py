"""Training rows, hashed: the unit that is cached, permuted and cut into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trec_twotower.data.lists import Lists
from trec_twotower.data.transforms import Columns


@dataclass(frozen=True)
class Examples:
    """Some training rows, hashed."""

    user: Columns
    positives: Lists  # catalogue rows
    known: Lists | None = None  # catalogue rows that are no negatives, beside the positives
    history: Lists | None = None  # the same by fingerprint, of items that may be outside the catalogue
    weight: np.ndarray | None = None  # float32, one a row; None: 1

    def slice(self, start: int, stop: int) -> Examples:
        """Rows start .. stop - 1, without a copy."""
        return Examples(
            self.user.slice(start, stop),
            self.positives.slice(start, stop),
            None if self.known is None else self.known.slice(start, stop),
            None if self.history is None else self.history.slice(start, stop),
            None if self.weight is None else self.weight[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence[Examples]) -> Examples:
        if len(parts) == 1:
            return parts[0]

        known = [part.known for part in parts if part.known is not None]
        history = [part.history for part in parts if part.history is not None]
        weight = [part.weight for part in parts if part.weight is not None]
        return Examples(
            Columns.concat([part.user for part in parts]),
            Lists.concat([part.positives for part in parts]),
            Lists.concat(known) if known else None,
            Lists.concat(history) if history else None,
            np.concatenate(weight) if weight else None,
        )
