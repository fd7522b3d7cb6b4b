"""Searching among some of the items: which they are, and the rule by which they are searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index.exact import ExactItems

Strategy = Literal["exact", "selector"]

KEPT_BYTES = 1 << 28  # allowed items' vectors that are kept in memory; more are never scored all


@dataclass(frozen=True, eq=False)
class Allowed:
    """Items that searches may return, made by `ItemIndex.allow`; the same for every user of a search."""

    mask_I: np.ndarray  # bool
    item_rows: np.ndarray  # rising
    bitmap: np.ndarray  # one bit per item, the first lowest, as FAISS reads it
    size_L: np.ndarray | None  # number of them in each inverted list
    strategy: Strategy | None = None  # None: by `choose_strategy`
    kept: list[ExactItems] = field(default_factory=list)  # their vectors, once they were needed

    @classmethod
    def build(cls, mask_I: np.ndarray, list_I: np.ndarray | None, num_lists: int, strategy: Strategy | None) -> Allowed:
        """Build the filter of the items marked in `mask_I`; `list_I` is each item's list, if the index has lists."""
        item_rows = np.flatnonzero(mask_I)
        size_L = None if list_I is None else np.bincount(list_I[item_rows], minlength=num_lists)
        return cls(mask_I, item_rows, np.packbits(mask_I, bitorder="little"), size_L, strategy)

    @property
    def share(self) -> float:
        return len(self.item_rows) / max(len(self.mask_I), 1)

    def fits(self, dim: int) -> bool:
        """Return whether all vectors may be kept in memory."""
        return 4 * dim * len(self.item_rows) <= KEPT_BYTES


def check_mask(mask_I: np.ndarray, num_items: int) -> np.ndarray:
    """Return the mask as an array; raises ConfigError for a wrong one, DataError for one that allows nothing."""
    mask_I = np.asarray(mask_I)
    if mask_I.dtype != bool or mask_I.shape != (num_items,):
        raise ConfigError(
            f"The mask of allowed items is {mask_I.dtype} of shape {mask_I.shape}. Expected one bool for each of the "
            f"{num_items:,} item rows."
        )
    if not mask_I.any():
        raise DataError(f"The filter allows none of the {num_items:,} items, so that nothing can be found.")
    return mask_I


def choose_strategy(allowed: Allowed, k: int, scanned_items: float, dim: int) -> Strategy:
    """Return how to search the allowed items for `k`, from counts alone.

    "exact" scores all of them, if they are no more than an unfiltered search for the number of items that contains `k`
    allowed ones would scan (`scanned_items`), or if `k` asks for all. "selector" scans lists or a graph and skips the
    others.
    """
    if k >= len(allowed.item_rows):
        return "exact"
    if allowed.strategy is not None:
        return allowed.strategy
    return "exact" if len(allowed.item_rows) <= scanned_items and allowed.fits(dim) else "selector"


def mask_of(cells: pa.Array, values: Sequence[Any], column: str) -> np.ndarray:
    """Return a bool per item: whether it has one of `values` in a column of the catalogue, or in the column's list.

    Values may be strings where the column has numbers. Raises ConfigError for one that the column's type cannot be.
    """
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    flat = cells.flatten() if is_list else cells
    try:
        try:
            wanted = pa.array(values).cast(flat.type)
        except OverflowError:  # an integer beyond int64, which the column may have
            wanted = pa.array(values, flat.type)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ConfigError(f"The filter on {column!r}, a column of {flat.type}, has {list(values)}: {error}.") from None
    hit = pc.is_in(flat, value_set=wanted).to_numpy(zero_copy_only=False)
    if not is_list:
        return hit
    mask = np.zeros(len(cells), bool)
    mask[pc.list_parent_indices(cells).to_numpy()[hit]] = True
    return mask
