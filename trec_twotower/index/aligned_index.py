"""An index whose item rows are those of items/ as it is now, though it was built from an earlier state of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trec_twotower.data.item_table import Catalogue
from trec_twotower.errors import DataError
from trec_twotower.index import Allowed, IndexReport, ItemIndex
from trec_twotower.ops.hashing import id_keys
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.arrow_values import python_value


class CatalogueIndex:
    """The searches of an ItemIndex in rows of a catalogue that has its items in another order, or more of them."""

    def __init__(self, index: ItemIndex, catalogue_row_I: np.ndarray, num_rows: int) -> None:
        """`catalogue_row_I` has the catalogue's row of each item of the index, (items of the index,) int64."""
        self.index = index
        self._catalogue_row_I = catalogue_row_I
        self._index_row = np.full(num_rows, -1, np.int64)
        self._index_row[catalogue_row_I] = np.arange(len(catalogue_row_I))

    def __len__(self) -> int:
        """Return the number of items that can be found."""
        return len(self.index)

    @property
    def report(self) -> IndexReport:
        return self.index.report

    def tuned_k(self, k: int) -> int:
        """Return ItemIndex.tuned_k."""
        return self.index.tuned_k(k)

    def search(
        self, user_BD: np.ndarray, k: int, *, seen: Ragged | None = None, allowed: Allowed | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search as ItemIndex.search does; seen and found items are rows of the catalogue."""
        if seen is not None:
            row = np.where(seen.values >= 0, self._index_row[seen.values], -1)
            seen = Ragged(seen.offsets, row).where(row >= 0)
        score_BK, row_BK = self.index.search(user_BD, k, seen=seen, allowed=allowed)
        return score_BK, np.where(row_BK >= 0, self._catalogue_row_I[row_BK], -1)

    def search_unseen(self, user_BD: np.ndarray, k: int, seen: Ragged) -> tuple[np.ndarray, np.ndarray]:
        """Search as `search` does, with a list of seen items for each user."""
        return self.search(user_BD, k, seen=seen)

    def allow(self, mask_I: np.ndarray) -> Allowed:
        """Return ItemIndex.allow for a mask over the rows of the catalogue."""
        return self.index.allow(mask_I[self._catalogue_row_I])


def aligned(index: ItemIndex, catalogue: Catalogue, *, warns: bool) -> ItemIndex | CatalogueIndex:
    """Return the index with item rows of the catalogue: itself where its ids are the catalogue's, in this order.

    Items that the index lacks cannot be found; with `warns`, a line on stderr reports their number. Raises
    DataError where the index has items that the catalogue lacks.
    """
    ids = index.item_ids
    if ids is None:  # built in this process, from the catalogue's own vectors
        return index
    keys = id_keys(ids, "the index")
    if np.array_equal(keys, catalogue.keys):
        return index
    row_I = catalogue.rows_of_keys(keys)
    folder = catalogue.split.folder
    if (row_I < 0).any():
        raise DataError(
            f"The index has {int((row_I < 0).sum()):,} items that {folder} lacks, such as item_id "
            f"{_shown(ids, np.flatnonzero(row_I < 0))}: export and index again, or bring them back."
        )
    missing = np.setdiff1d(np.arange(len(catalogue)), row_I)
    if len(missing) and warns:
        print(
            f"trec-twotower: the index lacks {len(missing):,} items of {folder}, such as item_id "
            f"{_shown(catalogue.ids, missing)}: export and index again to find them.",
            file=sys.stderr,
            flush=True,
        )
    return CatalogueIndex(index, row_I, len(catalogue))


def _shown(ids: pa.Array, rows: Sequence[int] | np.ndarray) -> Any:
    return repr(python_value(ids, int(rows[0])))
