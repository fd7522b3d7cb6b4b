"""Searching some of the items only: which of three ways is the fastest for how many they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index.probing import Fit, fit_for
from trec_twotower.index.scan import Scanner

Way = Literal["exact", "selector", "overfetch"]

# Microseconds of a user of dim 64 on one core of an AMD EPYC; what counts is how they compare.
EXACT, SCORE = 48.0, 0.0093  # a search of all allowed items, and an item of it
SELECT, ASK, PICK = 150.0, 0.01, 0.008  # a scan that asks the bitmap, an item asked about, and one scored after that
FETCH, SCAN, HOLD = 100.0, 0.01, 0.22  # a search as if all were allowed, an item scanned, and one held in sight


@dataclass(frozen=True, eq=False)
class Allowed:
    """Items that searches may find, made ready by `ItemIndex.allow`; the same for every user of a search."""

    mask_I: np.ndarray  # bool
    item_rows: np.ndarray
    bitmap: np.ndarray  # a bit an item, the first lowest, as FAISS reads it
    size_L: np.ndarray | None  # how many lie in each list
    vectors: np.ndarray | None  # theirs, where they are so few that all are scored
    way: Way | None = None  # None: the fastest by `choose_way`
    chosen: dict[int, Way] = field(default_factory=dict)  # by k, where it was asked for before

    @property
    def share(self) -> float:
        return len(self.item_rows) / max(len(self.mask_I), 1)


def make_allowed(scanner: Scanner, mask_I: np.ndarray, fits: tuple[Fit, ...], way: Way | None = None) -> Allowed:
    """The items marked in a bool array (I,), with what the ways of searching them need."""
    mask_I = np.asarray(mask_I)
    if mask_I.dtype != bool or mask_I.shape != (scanner.num_items,):
        raise ConfigError(
            f"Allowed items are given as {mask_I.dtype} of shape {mask_I.shape}: give one bool for each of the "
            f"{scanner.num_items:,} item rows."
        )
    item_rows = np.flatnonzero(mask_I)
    if not len(item_rows):
        raise DataError(f"The filter allows none of the {scanner.num_items:,} items: nothing can be found.")
    size_L = None
    if scanner.num_lists:
        size_L = np.bincount(scanner.list_of_item()[item_rows], minlength=scanner.num_lists)
    needs_vectors = way == "exact" or (way is None and choose_way(scanner, fits, len(item_rows), fits[0].k) == "exact")
    vectors = scanner.vectors_of(item_rows) if needs_vectors else None
    bitmap = np.packbits(mask_I, bitorder="little")
    return Allowed(mask_I, item_rows, bitmap, size_L, vectors, way)


def choose_way(scanner: Scanner, fits: tuple[Fit, ...], num_allowed: int, k: int) -> Way:
    """The way of least cost to find `k` of so many items.

    exact scores all of them; selector scans lists and asks a bitmap before scoring; overfetch searches as if all were
    allowed and throws away. The last two scan what k / share neighbours need.
    """
    share = num_allowed / scanner.num_items
    scanned = scanner.num_items * fit_for(fits, min(round(k / share), scanner.num_items)).scanned_share
    costs: dict[Way, float] = {
        "exact": EXACT + SCORE * num_allowed,
        "selector": SELECT + scanned * (ASK + PICK * share),
        "overfetch": FETCH + SCAN * scanned + HOLD * num_to_fetch(k, share),
    }
    return min(costs, key=lambda way: costs[way])


def num_to_fetch(k: int, share: float) -> int:
    """Neighbours of which `k` are allowed in all but one case in a thousand, were the filter blind to the scores."""
    wanted = k / share
    return int(np.ceil(wanted + 3.1 * np.sqrt(wanted * (1 - share) / share)))


def mask_of(cells: pa.Array, values: Sequence[Any], column: str) -> np.ndarray:
    """Bool (I,): the items that have one of `values` in a column of the catalogue, or in the column's list.

    Values may be words where the column has numbers. Raises ConfigError for one that the column's type cannot be.
    """
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    flat = cells.flatten() if is_list else cells
    try:
        wanted = pa.array(values)
        wanted = wanted.cast(flat.type)
    except pa.ArrowException as error:
        raise ConfigError(f"The filter on {column!r}, a column of {flat.type}, has {list(values)}: {error}.") from None
    hit = pc.is_in(flat, value_set=wanted).to_numpy(zero_copy_only=False)
    if not is_list:
        return hit
    mask = np.zeros(len(cells), bool)
    mask[pc.list_parent_indices(cells).to_numpy()[hit]] = True
    return mask
