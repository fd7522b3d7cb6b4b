"""Pairs of a step's rows and candidates: positives, known items and impressions, from the loader to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Row and column numbers of cells of the matrix (rows, candidates), in any order; cells may repeat."""

    row_P: Tensor
    column_P: Tensor
    weight_P: Tensor | None = None  # None: 1
    label_P: Tensor | None = None  # None: 1

    @classmethod
    def from_numpy(cls, *arrays: np.ndarray | None) -> Pairs:
        """Return pairs that share the memory of the arrays: rows, columns, weights and labels."""
        row_P, column_P, *others = (None if array is None else torch.from_numpy(array) for array in arrays)
        assert row_P is not None and column_P is not None
        return cls(row_P, column_P, *others)

    def each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """Return the pairs with `change` applied to every tensor."""
        parts = (self.row_P, self.column_P, self.weight_P, self.label_P)
        return Pairs(*(None if part is None else change(part) for part in parts))

    def weights(self, like: Tensor) -> Tensor:
        """Return the weights (P,) in the type of `like`."""
        return like.new_ones(self.row_P.shape[0]) if self.weight_P is None else self.weight_P.to(like.dtype)

    def labels(self, like: Tensor) -> Tensor:
        """Return the labels (P,) in the type of `like`."""
        return like.new_ones(self.row_P.shape[0]) if self.label_P is None else self.label_P.to(like.dtype)

    def is_refused(self) -> Tensor:
        """Return whether the label is 0 or below (P,)."""
        return torch.zeros_like(self.row_P, dtype=torch.bool) if self.label_P is None else self.label_P <= 0

    def where(self, is_kept_P: Tensor) -> Pairs:
        """Return the pairs where `is_kept_P` is True."""
        return self.each(lambda part: part[is_kept_P])


@dataclass(frozen=True)
class Targets:
    """The pairs of this rank's rows with the candidates of a step.

    positive     interactions, with weights
    known        candidates that are not negatives of a row, including its positives
    given        impressions and mined negatives of the rows, with weights and labels
    masked_keys  with a cross-batch memory: rows and, as columns, the keys of all items that are not negatives of them,
                 whether candidates of this step or not. The key of a history item is ~fingerprint, which is negative
    """

    positive: Pairs
    known: Pairs
    given: Pairs | None = None
    masked_keys: Pairs | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """Return the targets with `change` applied to every tensor."""
        given, masked_keys = (None if part is None else part.each(change) for part in (self.given, self.masked_keys))
        return Targets(self.positive.each(change), self.known.each(change), given, masked_keys)
