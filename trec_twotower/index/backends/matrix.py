"""Vectors to index or to search for: where they come from, and the checks that all of them pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from trec_twotower.errors import ConfigError, DataError

PIECE = 1 << 16  # vectors that are read, assigned and added together


class Vectors(Protocol):
    """Vectors that can be read any number of times without all of them in memory: a matrix, or an export."""

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def pieces(self) -> Iterator[np.ndarray]:
        """Return float32 blocks in order, some 2^16 rows each."""


class Matrix:
    """A matrix in memory as `Vectors`."""

    def __init__(self, vectors: np.ndarray, what: str) -> None:
        self.vectors = as_vectors(vectors, what)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def pieces(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), PIECE):
            yield self.vectors[start : start + PIECE]


def as_vectors(vectors: np.ndarray, what: str) -> np.ndarray:
    """Return the vectors as contiguous float32 rows; raises ConfigError for another shape, DataError for NaN."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise ConfigError(f"The {what} vectors have shape {vectors.shape}. Expected a matrix, one row per {what}.")
    if math.isfinite(np.vdot(vectors, vectors)):  # NaN and infinity leave no sum of squares finite
        return vectors
    with np.errstate(all="ignore"):
        suspect = np.flatnonzero(~np.isfinite(vectors.sum(axis=1)))
    bad = suspect[~np.isfinite(vectors[suspect]).all(axis=1)]
    if len(bad):
        raise DataError(
            f"{len(bad):,} of {len(vectors):,} {what} vectors hold NaN or infinity, the first in rows "
            f"{bad[:5].tolist()}: the model has diverged. Train it again with a lower learning rate."
        )
    return vectors


def check_same_dim(item_dim: int, user_dim: int) -> None:
    if item_dim != user_dim:
        raise ConfigError(
            f"The items' vectors have {item_dim} numbers and the users' {user_dim}. Export both from the same model."
        )


def norms(vectors: np.ndarray) -> np.ndarray:
    """Return the Euclidean length of each row."""
    return np.sqrt(np.einsum("id,id->i", vectors, vectors))
