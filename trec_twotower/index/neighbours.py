"""Items near items: what training takes its hardest negatives from."""

from __future__ import annotations

from typing import Any

import numpy as np

from trec_twotower.index.engine import as_vectors, exact_search, faiss
from trec_twotower.metrics import first_kept

EXACT_ITEMS = 1 << 16  # of a larger catalogue the neighbours are those that an inverted file finds
LISTS_SCANNED = 32  # one list of so many
BLOCK = 4096  # items searched for at a time


def neighbours(item_ID: np.ndarray, rows: np.ndarray, first: int, last: int) -> np.ndarray:
    """(rows, last - first + 1): the item rows of the first-th to last-th nearest other items of each of these items.

    By cosine; the nearest other item is the first. -1 where there are fewer. In a catalogue of more than EXACT_ITEMS
    about a thirty-second of the items is looked at for each, so that ranks are those among what is found.
    """
    item_ID = as_vectors(item_ID, "item")
    item_ID = item_ID / np.maximum(np.linalg.norm(item_ID, axis=1, keepdims=True), 1e-12)
    index = _inverted_file(item_ID) if len(item_ID) > EXACT_ITEMS else None
    found = np.full((len(rows), last - first + 1), -1, np.int64)
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        wanted = min(last + 1, len(item_ID))
        if index is None:
            _, near_BK = exact_search(item_ID, item_ID[part], wanted)
        else:
            _, near_BK = index.search(item_ID[part], wanted)
        is_other = (near_BK >= 0) & (near_BK != part[:, None])
        [kept_BK] = first_kept(is_other, last, (near_BK, -1))
        found[start : start + BLOCK] = kept_BK[:, first - 1 :]
    return found


def _inverted_file(item_ID: np.ndarray) -> Any:
    num_lists = int(4 * len(item_ID) ** 0.5)
    index: Any = faiss.index_factory(item_ID.shape[1], f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.train(item_ID[:: max(1, len(item_ID) // (64 * num_lists))])
    index.add(item_ID)
    index.nprobe = max(1, num_lists // LISTS_SCANNED)
    return index
