"""The best unseen items of each user by scoring every item: products in blocks, a list of k kept beside them."""

from __future__ import annotations

import numpy as np

from trec_twotower.data.kernels import kernel
from trec_twotower.data.lists import Lists
from trec_twotower.errors import DataError

USERS, ITEMS = 256, 4096  # of a block of scores, which is to stay in a core's cache
STRIDE = 32  # scores that are looked at together
FEW_USERS = 128  # in `best_of_few`: their scores of a block of items stay in the cache
SPARE = 64  # candidates beyond k, at least, that are held before they are thinned to k


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


def best_of_few(item_ID: np.ndarray, user_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` items of highest inner product for up to FEW_USERS users: scores and item rows (B, k), best first.

    Ends in -inf and -1 where there are fewer items. Users are the columns of a block of scores: a row of it is held
    against what each user's next must beat, all at once.
    """
    num_users = len(user_BD)
    user_DB = np.ascontiguousarray(user_BD.T)
    width = max(2 * k, k + SPARE)
    score_BW, row_BW = np.empty((num_users, width), np.float32), np.empty((num_users, width), np.int64)
    count_B, worst_B = np.zeros(num_users, np.int64), np.full(num_users, -np.inf, np.float32)
    score_CB = np.empty((min(ITEMS, len(item_ID)), num_users), np.float32)
    for first in range(0, len(item_ID), ITEMS):
        item_CD = item_ID[first : first + ITEMS]
        np.matmul(item_CD, user_DB, out=score_CB[: len(item_CD)])
        _hold(score_CB[: len(item_CD)], first, k, score_BW, row_BW, count_B, worst_B)
    score_BK, row_BK = np.empty((num_users, k), np.float32), np.empty((num_users, k), np.int64)
    for user in range(num_users):
        hand_over(score_BW[user], row_BW[user], int(count_B[user]), score_BK[user], row_BK[user])
    return score_BK, row_BK


@kernel
def _hold(
    score: np.ndarray,
    first: int,
    k: int,
    held_score: np.ndarray,
    held_row: np.ndarray,
    count: np.ndarray,
    worst: np.ndarray,
) -> None:
    """Adds a block's items, which begin at row `first`, to each user's candidates where they beat `worst`."""
    num_users = score.shape[1]
    for at in range(score.shape[0]):
        above = 0
        for user in range(num_users):
            above |= score[at, user] > worst[user]
        if not above:
            continue
        for user in range(num_users):
            if score[at, user] > worst[user]:
                held_score[user, count[user]] = score[at, user]
                held_row[user, count[user]] = first + at
                count[user] += 1
                if count[user] == held_score.shape[1]:
                    worst[user] = to_the_front(held_score[user], held_row[user], count[user], k)
                    count[user] = k


@kernel
def hand_over(held_score: np.ndarray, held_row: np.ndarray, count: int, score: np.ndarray, row: np.ndarray) -> None:
    """The best of the first `count` candidates in order, then -inf and -1."""
    k = score.size
    if count > k:
        to_the_front(held_score, held_row, count, k)
        count = k
    order = np.argsort(-held_score[:count])
    for i in range(count):
        score[i] = held_score[order[i]]
        row[i] = held_row[order[i]]
    score[count:] = -np.inf
    row[count:] = -1


@kernel
def to_the_front(score: np.ndarray, row: np.ndarray, count: int, k: int) -> float:
    """Puts the best `k` of the first `count` in front (Hoare's selection); returns the worst of them."""
    low, high = 0, count - 1
    while low < high:
        first, middle, last = score[low], score[(low + high) // 2], score[high]
        pivot = max(min(first, middle), min(max(first, middle), last))
        i, j = low, high
        while i <= j:
            while score[i] > pivot:
                i += 1
            while score[j] < pivot:
                j -= 1
            if i <= j:
                score[i], score[j] = score[j], score[i]
                row[i], row[j] = row[j], row[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    worst = score[0]
    for i in range(1, k):
        worst = min(worst, score[i])
    return worst
