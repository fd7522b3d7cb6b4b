"""Metrics over a few sampled items instead of the full catalogue, as in many papers.

They are far higher than those over the catalogue and may order contenders otherwise (Krichene & Rendle 2020), so they
are only computed where asked for, and named for what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trec_twotower.ops.compilation import kernel
from trec_twotower.ops.hashing import mix_key
from trec_twotower.ops.ragged import Ragged, offsets_of, side_by_side

TRIES = 20  # draws for each negative wanted, before a user gets fewer


@dataclass(frozen=True)
class Negatives:
    """Where the negatives of a positive are sampled from: all items, or those with the same value of a column."""

    name: str  # uniform, or same COLUMN
    count: int  # for each positive
    part_I: np.ndarray  # each item's part
    member_I: np.ndarray  # the items, part by part
    offsets: np.ndarray  # of the parts in `member_I`

    @classmethod
    def uniform(cls, num_items: int, count: int) -> Negatives:
        return cls.same("uniform", np.zeros(num_items, np.int64), count)

    @classmethod
    def same(cls, name: str, part_I: np.ndarray, count: int) -> Negatives:
        return cls(name, count, part_I, np.argsort(part_I, kind="stable"), offsets_of(np.bincount(part_I)))

    def ranks(
        self,
        item_ID: np.ndarray,
        user_BD: np.ndarray,
        positives: Ragged,
        excluded: Ragged,
        first_user: int,
        seed: int = 0,
    ) -> np.ndarray:
        """Return the place (from 1) of each of `positives.values` among itself and its negatives; ties count half.

        A positive on the user's list of `excluded` items has place infinity: no ranking lists it. Negatives are drawn
        with replacement from the items neither excluded nor to find, by a random number that depends on the user's
        number (`first_user` and on), the positive and the draw alone: all contenders meet the same, for any number of
        ranks. A positive whose part has hardly any other item gets fewer. Of users with several vectors, (B, M, D), an
        item's score is the highest by any of them.
        """
        user_BMD = user_BD if user_BD.ndim == 3 else user_BD[:, None]
        taboo = side_by_side(excluded, positives).distinct()
        place_P = np.empty(len(positives.values))
        _ranks(
            np.ascontiguousarray(item_ID, np.float32), np.ascontiguousarray(user_BMD, np.float32), positives.offsets,
            positives.values, taboo.offsets, taboo.values, self.part_I, self.member_I, self.offsets, self.count,
            np.uint64(first_user), np.uint64(seed), place_P,
        )  # fmt: skip
        place_P[excluded.hold(positives)] = np.inf
        return place_P


def sampled_metrics(place_P: np.ndarray, positives: Ragged, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return hit@k, ndcg@k (1 / log2(1 + place) within k) and mrr, (B,) each: the mean over the user's positives."""
    num_B = positives.lengths
    metrics = {}
    for k in ks:
        is_hit_P = place_P <= k
        metrics[f"hit@{k}"] = np.bincount(positives.rows, is_hit_P, minlength=len(positives)) / num_B
        metrics[f"ndcg@{k}"] = (
            np.bincount(positives.rows, is_hit_P / np.log2(1 + place_P), minlength=len(positives)) / num_B
        )
    metrics["mrr"] = np.bincount(positives.rows, 1 / place_P, minlength=len(positives)) / num_B
    return metrics


@kernel
def _ranks(
    item_ID: np.ndarray,
    user_BMD: np.ndarray,
    offsets: np.ndarray,
    positives: np.ndarray,
    taboo_offsets: np.ndarray,
    taboo: np.ndarray,
    part_I: np.ndarray,
    member_I: np.ndarray,
    part_offsets: np.ndarray,
    count: int,
    first_user: np.uint64,
    seed: np.uint64,
    place_P: np.ndarray,
) -> None:
    for user in range(offsets.size - 1):
        mine = taboo[taboo_offsets[user] : taboo_offsets[user + 1]]
        for at in range(offsets[user], offsets[user + 1]):
            positive = positives[at]
            goal = _score(user_BMD, user, item_ID, positive)
            low = part_offsets[part_I[positive]]
            size = part_offsets[part_I[positive] + 1] - low
            key = mix_key(mix_key(seed + first_user + np.uint64(user)) ^ np.uint64(positive))
            place, drawn = 1.0, 0
            for attempt in range(TRIES * count):
                if drawn == count:
                    break
                item = member_I[low + np.int64(mix_key(key + np.uint64(attempt)) % np.uint64(size))]
                where = np.searchsorted(mine, item)
                if where < mine.size and mine[where] == item:
                    continue
                drawn += 1
                score = _score(user_BMD, user, item_ID, item)
                if score > goal:
                    place += 1
                elif score == goal:
                    place += 0.5
            place_P[at] = place


@kernel
def _score(user_BMD: np.ndarray, user: int, item_ID: np.ndarray, item: int) -> float:
    """Return the highest inner product of the item with any of the user's vectors."""
    best = np.float32(-np.inf)
    for vector in range(user_BMD.shape[1]):
        score = np.float32(0)
        for axis in range(item_ID.shape[1]):
            score += user_BMD[user, vector, axis] * item_ID[item, axis]
        if score > best:
            best = score
    return float(best)
