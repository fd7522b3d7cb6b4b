"""The best unseen items of each user by scoring every item: products in blocks, a list of k kept beside them."""

from __future__ import annotations

import numpy as np

from trec_twotower.data.kernels import kernel
from trec_twotower.data.lists import Lists
from trec_twotower.errors import DataError

USERS, ITEMS = 256, 4096  # of a block of scores, which is to stay in a core's cache
STRIDE = 32  # scores that are looked at together


def rank_everything(item_ID: np.ndarray, user_BD: np.ndarray, k: int, seen: Lists) -> np.ndarray:
    """(B, k) item rows of highest inner product, best first and of equals the smaller row, without those on `seen`.

    Of users with several vectors, (B, M, D), an item's score is the highest by any of them. -1 where items run out.
    Raises DataError for vectors of users with NaN or infinity.
    """
    if not np.isfinite(user_BD).all():
        raise DataError("Vectors of users hold NaN or infinity: nothing can be ranked for them.")
    ranked_BK = np.full((len(user_BD), k), -1, np.int64)
    best_BK = np.full((len(user_BD), k), -np.inf, np.float32)
    step = USERS if user_BD.ndim == 2 else max(1, USERS // user_BD.shape[1])
    for start in range(0, len(user_BD), step):
        stop = min(start + step, len(user_BD))
        user_D = np.ascontiguousarray(user_BD[start:stop])
        offsets = seen.offsets[start : stop + 1]
        for first in range(0, len(item_ID), ITEMS):
            score = user_D @ item_ID[first : first + ITEMS].T
            if score.ndim == 3:
                score = score.max(axis=1)
            _keep_best(score, first, offsets, seen.values, best_BK[start:stop], ranked_BK[start:stop])
    return ranked_BK


@kernel
def _keep_best(
    score: np.ndarray, first: int, offsets: np.ndarray, seen: np.ndarray, best: np.ndarray, ranked: np.ndarray
) -> None:
    """Puts the block's items, which begin at row `first`, where they belong among each user's best."""
    num_items, k = score.shape[1], best.shape[1]
    for user in range(score.shape[0]):
        for place in range(offsets[user], offsets[user + 1]):
            at = seen[place] - first
            if 0 <= at < num_items:
                score[user, at] = -np.inf
        for begin in range(0, num_items, STRIDE):
            end = min(begin + STRIDE, num_items)
            least = best[user, k - 1]
            above = 0
            for at in range(begin, end):
                above |= score[user, at] > least
            if not above:
                continue
            for at in range(begin, end):
                value = score[user, at]
                if value > best[user, k - 1]:
                    place = k - 1
                    while place > 0 and best[user, place - 1] < value:
                        best[user, place] = best[user, place - 1]
                        ranked[user, place] = ranked[user, place - 1]
                        place -= 1
                    best[user, place] = value
                    ranked[user, place] = first + at
