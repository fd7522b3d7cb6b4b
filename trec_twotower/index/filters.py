"""Searching some of the items only, by three ways of which the fastest is found out by the first searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index.probing import Fit, fit_for
from trec_twotower.index.scan import Scanner

Way = Literal["exact", "selector", "overfetch"]

# Microseconds of a user of dim 64 on one core of an AMD EPYC: they say which ways are tried, not which is taken.
EXACT, SCORE = 48.0, 0.0093  # a search of all allowed items, and an item of it
SELECT, ASK, PICK = 150.0, 0.01, 0.008  # a scan that asks the bitmap, an item asked about, and one scored after that
FETCH, SCAN, HOLD = 100.0, 0.01, 0.22  # a search as if all were allowed, an item scanned, and one held in sight
CLOSE = 1.6  # times the least cost: ways of less are tried
TRIES = 9  # searches by each of them, of which the median counts: users differ
KEPT_BYTES = 1 << 28  # of allowed items' vectors, that are kept from one search to the next


@dataclass(frozen=True, eq=False)
class Allowed:
    """Items that searches may find, made ready by `ItemIndex.allow`; the same for every user of a search."""

    mask_I: np.ndarray  # bool
    item_rows: np.ndarray
    bitmap: np.ndarray  # a bit an item, the first lowest, as FAISS reads it
    size_L: np.ndarray | None  # how many lie in each list
    way: Way | None = None  # None: the fastest
    races: dict[tuple[int, bool], Race] = field(default_factory=dict)  # by k, and whether many users come together
    kept: list[np.ndarray] = field(default_factory=list)  # the items' vectors, once they were asked for

    @property
    def share(self) -> float:
        return len(self.item_rows) / max(len(self.mask_I), 1)

    def vectors(self, scanner: Scanner) -> np.ndarray:
        """The items' vectors, read from the index once, unless they are too many to be kept."""
        if self.kept:
            return self.kept[0]
        vectors = scanner.vectors_of(self.item_rows)
        if vectors.nbytes <= KEPT_BYTES:
            self.kept.append(vectors)
        return vectors


class Race:
    """The first searches go by each way that might be the fastest in turn, the others by the one that was.

    Every way reaches the target recall, so that no search is made twice; what a way costs is that of this index on this
    machine. Until it is decided, one user's answers may differ as much as an index's do from exact search.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self.best: Way = ways[0]  # as foretold, later as measured
        self._seconds: dict[Way, list[float]] = {way: [] for way in ways}
        self._is_open = len(ways) > 1

    def next_way(self) -> tuple[Way, bool]:
        """How to search now, and whether to `tell` how long it took."""
        if not self._is_open:
            return self.best, False
        return min(self._seconds, key=lambda way: len(self._seconds[way])), True

    def tell(self, way: Way, seconds: float) -> None:
        self._seconds[way].append(seconds)
        if all(len(each) >= TRIES for each in self._seconds.values()):
            self.best = min(self._seconds, key=lambda way: median(self._seconds[way]))
            self._is_open = False


def make_allowed(scanner: Scanner, mask_I: np.ndarray, way: Way | None = None) -> Allowed:
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
    bitmap = np.packbits(mask_I, bitorder="little")
    return Allowed(mask_I, item_rows, bitmap, size_L, way)


def likely_ways(scanner: Scanner, fits: tuple[Fit, ...], num_allowed: int, k: int) -> list[Way]:
    """The ways that may be the fastest to find `k` of so many items, the likeliest first.

    exact scores all of them; selector scans lists and asks a bitmap before scoring; overfetch searches as if all were
    allowed and throws away. The last two scan what k / share neighbours need.
    """
    share = num_allowed / scanner.num_items
    scanned = scanner.num_items * fit_for(fits, min(round(k / share), scanner.num_items)).scanned_share
    axes = scanner.dim / 64
    costs: dict[Way, float] = {
        "exact": EXACT + SCORE * axes * num_allowed,
        "selector": SELECT + scanned * (ASK + PICK * axes * share),
        "overfetch": FETCH + SCAN * axes * scanned + HOLD * num_to_fetch(k, share),
    }
    least = min(costs.values())
    return [way for way in sorted(costs, key=lambda way: costs[way]) if costs[way] <= CLOSE * least]


def num_to_fetch(k: int, share: float) -> int:
    """Neighbours of which `k` are allowed in all but one case in a thousand, were the filter blind to the scores.

    Their number is negative binomial: its normal quantile, and how far its skew moves that (Cornish & Fisher 1938).
    """
    wanted = k / share
    return int(np.ceil(wanted + 3.1 * np.sqrt(wanted * (1 - share) / share) + 1.44 * (2 - share) * (share < 1) / share))


def mask_of(cells: pa.Array, values: Sequence[Any], column: str) -> np.ndarray:
    """Bool (I,): the items that have one of `values` in a column of the catalogue, or in the column's list.

    Values may be words where the column has numbers. Raises ConfigError for one that the column's type cannot be.
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
