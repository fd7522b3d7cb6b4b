"""Exact search: the items of highest inner product, equal scores in order of item row, on CPU or GPU.

FAISS and torch find candidates fast, but neither orders equal scores, and a matrix product may give two equal vectors
scores that differ in the last bit. So a few more than `k` are fetched and scored again one pair at a time; where the
k-th best may tie with an item beyond those, more are fetched. An answer of 10 is then the first 10 of an answer of 20,
whoever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from trec_twotower.errors import ConfigError
from trec_twotower.index.backends.faiss_backend import BLAS_BATCH, Answer, Device, inner_products, knn
from trec_twotower.index.backends.matrix import as_vectors, check_same_dim, norms
from trec_twotower.ops.ragged import Ragged
from trec_twotower.ops.topk import MAX_CELLS, blocks_by_length, find_repeats, first_allowed

SPARE = 8  # candidates fetched beyond k, to see whether the k-th best ties with the next
MORE = 4  # factor by which a repeated search fetches more
ROUNDING = 8 * 2.0**-24  # two float32 sums of one inner product differ by less, x sqrt(dim) |user| |item|
USER_BLOCK, ITEM_BLOCK = 256, 1 << 17  # scores that a GPU holds at a time: 128 MiB

Search = Callable[[np.ndarray, int], Answer]  # positions of users, width -> their best `width` candidates
Finish = Callable[[np.ndarray, Answer], Answer]  # positions of users, candidates -> the answer, k wide


class ExactItems:
    """The item vectors of many exact searches: checked once, and kept on a torch device where they fit."""

    def __init__(
        self, item_ID: np.ndarray, device: torch.device | str = "cpu", *, blas_batch: int = BLAS_BATCH
    ) -> None:
        self.item_ID, self.device, self.blas_batch = as_vectors(item_ID, "item"), torch.device(device), blas_batch
        self.max_norm = float(norms(self.item_ID).max(initial=0))
        self._kept: list[tuple[int, torch.Tensor]] | None = None
        if self.device.type == "cuda" and 2 * self.item_ID.nbytes <= torch.cuda.mem_get_info(self.device)[0]:
            self._kept = list(self._moved())

    @classmethod
    def build(cls, item_ID: np.ndarray, device: Device = "auto") -> ExactItems:
        """Build them on torch's GPU, where `device` wants one; raises ConfigError where it is demanded and missing."""
        has_gpu = torch.cuda.is_available()
        if device == "gpu" and not has_gpu:
            raise ConfigError("Exact search is asked for on a GPU, but torch finds none. Use device 'auto' or 'cpu'.")
        return cls(item_ID, "cuda" if device != "cpu" and has_gpu else "cpu")

    def __len__(self) -> int:
        return len(self.item_ID)

    @property
    def dim(self) -> int:
        return self.item_ID.shape[1]

    def candidates(self, user_BD: np.ndarray, width: int) -> Answer:
        """Return the best `width` of all items, up to rounding and the order of equals."""
        if self.device.type == "cpu":
            return knn(user_BD, self.item_ID, width, self.blas_batch)
        return self.torch_candidates(user_BD, width)

    def torch_candidates(self, user_BD: np.ndarray, width: int) -> Answer:
        """Return the same by torch on the device, in blocks of users x items."""
        best_BK = torch.full((len(user_BD), width), -torch.inf)
        item_row_BK = torch.full((len(user_BD), width), -1, dtype=torch.int64)
        for first_item, item_CD in self._moved() if self._kept is None else self._kept:
            for start in range(0, len(user_BD), USER_BLOCK):
                users = slice(start, start + USER_BLOCK)
                score_BC = torch.tensor(user_BD[users], device=self.device) @ item_CD.T
                block_BK, column_BK = (part.cpu() for part in score_BC.topk(min(width, len(item_CD)), dim=1))
                score_BC = torch.cat([best_BK[users], block_BK], dim=1)
                row_BC = torch.cat([item_row_BK[users], column_BK + first_item], dim=1)
                best_BK[users], place_BK = score_BC.topk(width, dim=1)
                item_row_BK[users] = row_BC.gather(1, place_BK)
        return best_BK.numpy(), item_row_BK.numpy()

    def best(self, user_BD: np.ndarray, k: int) -> Answer:
        """Return the best `k` items of each user; rows end in -inf and -1 where there are fewer."""
        num_found = min(k, len(self))
        if not len(user_BD) or not num_found:
            return empty_answer(len(user_BD), k)
        slack_B = 2 * ROUNDING * np.sqrt(self.dim) * self.max_norm * norms(user_BD)

        def search(users: np.ndarray, width: int) -> Answer:
            return self.candidates(np.ascontiguousarray(user_BD[users]), width)

        def finish(users: np.ndarray, found: Answer) -> Answer:
            return order(inner_products(user_BD[users], self.item_ID, found[1]), found[1], num_found)

        found = best_with_ties(
            search, finish, len(user_BD), num_found, pool=num_found, limit=len(self), slack_B=slack_B
        )
        return padded(*found, k)

    def _moved(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(0, len(self), ITEM_BLOCK):
            yield first, torch.tensor(self.item_ID[first : first + ITEM_BLOCK], device=self.device)


def exact_search(
    items: np.ndarray | ExactItems,
    user_BD: np.ndarray,
    k: int,
    seen: Ragged | None = None,
    *,
    device: Device = "auto",
) -> Answer:
    """Return the `k` unseen items of highest score per user by scoring all: float32 scores and int64 item rows.

    Best first, equal scores by item row; rows end in -inf and -1 where fewer than `k` unseen items exist. For users of
    several vectors, (B, M, D), an item's score is the highest by any of them. `items` on a device are scored there.
    Raises ConfigError for shapes that do not match, DataError for vectors with NaN or infinity.
    """
    if not isinstance(items, ExactItems):
        items = ExactItems.build(items, device)
    if np.ndim(user_BD) == 3:
        num_users, per_user, dim = user_BD.shape
        each = None if seen is None else seen.take(np.repeat(np.arange(num_users), per_user))
        return merge_vectors(exact_search(items, user_BD.reshape(-1, dim), k, each), num_users, k)
    user_BD = as_vectors(user_BD, "user")
    check_same_dim(items.dim, user_BD.shape[1])
    if seen is None or not len(seen.values):
        return items.best(user_BD, k)
    seen = seen.distinct()
    score_BK, item_row_BK = empty_answer(len(user_BD), k)
    for users in blocks_by_length(seen.lengths, extra=k):
        of_users = seen.take(users)
        width = min(k + int(of_users.lengths.max()), len(items))
        found = items.best(user_BD[users], width)
        score_BK[users], item_row_BK[users] = without_seen(found, of_users, k)
    return score_BK, item_row_BK


class RunningBest:
    """Exact search of items that are never in memory together: the best `k` of all pieces added so far."""

    def __init__(self, user_BD: np.ndarray, k: int, device: Device = "cpu") -> None:
        self.user_BD, self.k, self._device = user_BD, k, device
        self.score_BK, self.item_row_BK = empty_answer(len(user_BD), k)

    def add(self, item_CD: np.ndarray, first_row: int) -> None:
        """Add the items of rows `first_row` and following."""
        score_BC, row_BC = exact_search(item_CD, self.user_BD, min(self.k, len(item_CD)), device=self._device)
        found = [(self.score_BK, self.item_row_BK), (score_BC, row_BC + first_row)]
        self.score_BK, self.item_row_BK = merge(found, self.k)


# ---------------------------------------------------------------- order of answers


def best_with_ties(
    search: Search,
    finish: Finish,
    num_users: int,
    k: int,
    *,
    pool: int,
    limit: int,
    slack_B: np.ndarray | float = 0.0,
) -> Answer:
    """Return `finish` (k wide) of each user's best `pool` candidates and of all that tie with the last of them.

    `search` returns candidates by falling score; `limit` of them are all there are. A candidate ties with one that
    scores less than `slack_B` more.
    """
    users = np.arange(num_users)
    width = min(pool + SPARE, limit)
    answer: Answer | None = None
    while len(users):
        block = max(1, MAX_CELLS // width)
        open_users = [users[:0]]
        for start in range(0, len(users), block):
            part = users[start : start + block]
            found = search(part, width)
            of_part = finish(part, found)
            if len(part) == num_users:
                answer = of_part
            else:
                answer = empty_answer(num_users, k) if answer is None else answer
                answer[0][part], answer[1][part] = of_part
            if width < limit:
                slack = slack_B if np.ndim(slack_B) == 0 else slack_B[part]  # type: ignore[index]
                ties_B = found[0][:, -1] >= found[0][:, pool - 1] - slack
                if ties_B.any():
                    open_users.append(part[ties_B & (found[1][:, -1] >= 0)])
        users = np.concatenate(open_users) if len(open_users) > 1 else users[:0]
        width = min(MORE * width, limit)
    return empty_answer(num_users, k) if answer is None else answer


def order(score_BC: np.ndarray, item_row_BC: np.ndarray, k: int) -> Answer:
    """Return the best `k` of each row's candidates, equal scores by item row, row -1 last."""
    if is_settled((score_BC, item_row_BC)):
        return score_BC[:, :k], item_row_BC[:, :k]
    rest = np.flatnonzero(~are_settled((score_BC, item_row_BC)))
    score_BK, item_row_BK = score_BC[:, :k].copy(), item_row_BC[:, :k].copy()
    is_item_BC = item_row_BC[rest] >= 0
    score_BC = np.where(is_item_BC, score_BC[rest], -np.inf)
    last_BC = np.where(is_item_BC, item_row_BC[rest], np.iinfo(np.int64).max)
    order_BK = np.lexsort((last_BC, -score_BC))[:, :k]
    score_BK[rest] = np.take_along_axis(score_BC, order_BK, axis=1)
    item_row_BK[rest] = np.take_along_axis(item_row_BC[rest], order_BK, axis=1)
    return score_BK, item_row_BK


def is_settled(found: Answer) -> bool:
    """Return whether all rows are settled, see `are_settled`."""
    score_BC, item_row_BC = found
    return bool(item_row_BC[:, -1].min() >= 0) and bool((score_BC[:, :-1] > score_BC[:, 1:]).all())


def are_settled(found: Answer) -> np.ndarray:
    """Return which rows (B,) are full of items whose scores fall, so that their order is the only one."""
    score_BC, item_row_BC = found
    return (item_row_BC[:, -1] >= 0) & (score_BC[:, :-1] > score_BC[:, 1:]).all(axis=1)


def merge(answers: Sequence[Answer], k: int) -> Answer:
    """Return the best `k` of several answers that share no item."""
    if len(answers) == 1:
        return answers[0]
    score_BC, row_BC = (np.concatenate(parts, axis=1) for parts in zip(*answers, strict=True))
    return order(score_BC, row_BC, k)


def merge_vectors(found: Answer, num_users: int, k: int) -> Answer:
    """Return the best `k` items of each user, once each, from the answers to its vectors in successive rows."""
    score_BC, item_row_BC = (matrix.reshape(num_users, -1) for matrix in found)
    score_BC, item_row_BC = order(score_BC, item_row_BC, score_BC.shape[1])
    keep_BC = (item_row_BC >= 0) & ~find_repeats(item_row_BC)
    score_BK, item_row_BK = first_allowed(keep_BC, k, (score_BC, -np.inf), (item_row_BC, -1))
    return score_BK, item_row_BK


def without_seen(found: Answer, seen: Ragged, k: int) -> Answer:
    """Return the first `k` items of each row that are not on the user's list."""
    score_BC, item_row_BC = found
    keep_BC = (item_row_BC >= 0) & ~seen.contain(item_row_BC)
    score_BK, item_row_BK = first_allowed(keep_BC, k, (score_BC, -np.inf), (item_row_BC, -1))
    return score_BK, item_row_BK


def empty_answer(num_users: int, k: int) -> Answer:
    return np.full((num_users, k), -np.inf, np.float32), np.full((num_users, k), -1, np.int64)


def padded(score_BC: np.ndarray, item_row_BC: np.ndarray, k: int) -> Answer:
    """Return the answer with `k` columns, the missing ones -inf and -1."""
    if score_BC.shape[1] == k:
        return score_BC, item_row_BC
    score_BK, item_row_BK = empty_answer(len(score_BC), k)
    score_BK[:, : score_BC.shape[1]], item_row_BK[:, : item_row_BC.shape[1]] = score_BC, item_row_BC
    return score_BK, item_row_BK
