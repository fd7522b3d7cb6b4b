"""Nearest items of items, from which training samples hard negatives."""

from __future__ import annotations

import numpy as np

from trec_twotower.index.backends.faiss_backend import faiss
from trec_twotower.index.backends.kinds import make_searcher
from trec_twotower.index.backends.matrix import as_vectors, norms
from trec_twotower.index.exact import ExactItems, exact_search
from trec_twotower.index.searcher import SearchEffort, Searcher
from trec_twotower.ops.topk import first_allowed

EXACT_ITEMS = 1 << 16  # of a larger catalogue the neighbours are those that an inverted file finds
LISTS_SCANNED = 32  # items per list
BLOCK = 4096  # items searched for at a time


def neighbours(item_ID: np.ndarray, rows: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return the first-th to last-th nearest other items of each of these items: (rows, last - first + 1) item rows.

    By cosine, equals by item row; the nearest other item is the first. -1 where there are fewer. In a catalogue of more
    than EXACT_ITEMS about a thirty-second of the items is scored for each, so that ranks are those among what is found.
    """
    item_ID = as_vectors(item_ID, "item")
    item_ID = item_ID / np.maximum(norms(item_ID)[:, None], 1e-12)
    wanted = min(last + 1, len(item_ID))
    is_large = len(item_ID) > EXACT_ITEMS
    searcher = _inverted_file(item_ID) if is_large else None
    items = None if is_large else ExactItems.build(item_ID)
    found = np.full((len(rows), last - first + 1), -1, np.int64)
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        if searcher is not None:
            effort = SearchEffort(wanted, max(1, searcher.num_lists // LISTS_SCANNED), 1 / LISTS_SCANNED)
            _, near_BK = searcher.search(item_ID[part], wanted, effort)
        else:
            assert items is not None
            _, near_BK = exact_search(items, item_ID[part], wanted)
        is_other = (near_BK >= 0) & (near_BK != part[:, None])
        [kept_BK] = first_allowed(is_other, last, (near_BK, -1))
        found[start : start + BLOCK] = kept_BK[:, first - 1 :]
    return found


def _inverted_file(item_ID: np.ndarray) -> Searcher:
    num_lists = int(4 * len(item_ID) ** 0.5)
    index = faiss.index_factory(item_ID.shape[1], f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.train(item_ID[:: max(1, len(item_ID) // (64 * num_lists))])
    index.add(item_ID)
    return make_searcher([index], "cpu")
