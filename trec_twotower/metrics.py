"""Metrics of rankings: plain functions on ranked rows, one number per user, no model in sight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trec_twotower.data.lists import Lists

MAX_CELLS = 1 << 22  # of one block's user x item matrix: bounds the memory of what goes block by block


def first_kept(keep_BC: np.ndarray, k: int, *columns: tuple[np.ndarray, float]) -> tuple[np.ndarray, ...]:
    """The first `k` kept entries of each row, in order; `columns` are (matrix B x C, filling) pairs."""
    place_BC = np.cumsum(keep_BC, axis=1) - 1
    row, column = np.nonzero(keep_BC & (place_BC < k))
    place = place_BC[row, column]
    packed = []
    for matrix_BC, filling in columns:
        packed_BK = np.full((len(matrix_BC), k), filling, dtype=matrix_BC.dtype)
        packed_BK[row, place] = matrix_BC[row, column]
        packed.append(packed_BK)
    return tuple(packed)


def blocks_by_length(lengths: np.ndarray, extra: int) -> Iterator[np.ndarray]:
    """Users in groups of like list length, a group's users x (longest + extra) within MAX_CELLS.

    So that one user with a long list costs a small group its width and not everybody. A group's
    longest list (plus extra) is at most twice its shortest.
    """
    order = np.argsort(lengths, kind="stable")
    width = lengths[order] + extra
    start = 0
    while start < len(order):
        stop = int(np.searchsorted(width, 2 * max(int(width[start]), 1), side="right"))
        stop = min(stop, start + max(1, MAX_CELLS // max(int(width[stop - 1]), 1)))
        yield order[start:stop]
        start = stop


def find_repeats(item_row_BK: np.ndarray) -> np.ndarray:
    """Bool: this entry repeats an item that stands further left in its row; -1 (no item) does not count."""
    order_BK = np.argsort(item_row_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(item_row_BK, order_BK, axis=1)
    again_BK = np.zeros(item_row_BK.shape, dtype=bool)
    again_BK[:, 1:] = (sorted_BK[:, 1:] == sorted_BK[:, :-1]) & (sorted_BK[:, 1:] >= 0)
    repeats_BK = np.zeros(item_row_BK.shape, dtype=bool)
    np.put_along_axis(repeats_BK, order_BK, again_BK, axis=1)
    return repeats_BK


def ranking_metrics(item_row_BK: np.ndarray, positives: Lists, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Recall, NDCG, hit, MRR and precision at each k, float64 (B,) each, keyed "recall@20".

    `item_row_BK` is best first, -1 where there is no item; columns a ranking lacks are misses.
    Positives count once each. recall: hits / all the user's positives, also when those exceed k.
    ndcg: binary gains, over the ideal of min(k, positives) hits. hit: any. mrr: 1 / rank of the
    first hit within k, else 0. precision: hits / k. Raises ValueError for an item ranked twice
    (the ranking is void) and for a user without positives, who has no recall.
    """
    if min(ks, default=0) < 1:
        raise ValueError(f"Metrics are asked at k = {list(ks)}: give at least one k, each 1 or more.")
    if len(item_row_BK) != len(positives):
        raise ValueError(f"{len(item_row_BK):,} rankings against the positives of {len(positives):,} users.")
    item_row_BK = item_row_BK[:, : max(ks)]
    void_B = np.any(find_repeats(item_row_BK), axis=1)
    if void_B.any():
        raise ValueError(
            f"{void_B.sum():,} of {len(void_B):,} rankings name an item twice, the first is row "
            f"{void_B.argmax()}: such a ranking is void, rank every item at most once."
        )
    positives = positives.distinct()
    num_positives_B = positives.lengths
    if (num_positives_B == 0).any():
        raise ValueError(
            f"{(num_positives_B == 0).sum():,} of {len(positives):,} users have no positives, the first is "
            f"row {(num_positives_B == 0).argmax()}: leave them out of the evaluation."
        )
    is_hit_BK = positives.contain(item_row_BK)
    discount_K = 1 / np.log2(np.arange(2, max(ks) + 2))
    ideal_K = np.concatenate([[0.0], np.cumsum(discount_K)])
    metrics: dict[str, np.ndarray] = {}
    for k in ks:
        hits_BK = is_hit_BK[:, :k]
        num_hits_B = hits_BK.sum(axis=1)
        has_hits_B = num_hits_B > 0
        gain_B = hits_BK @ discount_K[: hits_BK.shape[1]]
        first_B = hits_BK.argmax(axis=1) if hits_BK.shape[1] else np.zeros(len(hits_BK))
        metrics[f"recall@{k}"] = num_hits_B / num_positives_B
        metrics[f"ndcg@{k}"] = gain_B / ideal_K[np.minimum(num_positives_B, k)]
        metrics[f"hit@{k}"] = has_hits_B.astype(np.float64)
        metrics[f"mrr@{k}"] = np.where(has_hits_B, 1 / (first_B + 1), 0.0)
        metrics[f"precision@{k}"] = num_hits_B / k
    return metrics


def mean_metrics(per_user: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean over users of each metric; raises ValueError when there is no user."""
    sums = MetricSums()
    sums.add(per_user)
    return sums.means()


@dataclass
class MetricSums:
    """Metrics summed over blocks of users, and over ranks by `merge`; `means` is the mean over all users."""

    sums: dict[str, float] = field(default_factory=dict)
    num_users: int = 0

    def add(self, per_user: Mapping[str, np.ndarray]) -> None:
        lengths = {len(value_B) for value_B in per_user.values()}
        assert len(lengths) == 1, f"metrics of differing numbers of users: {lengths}"
        sums = {name: float(value_B.sum()) for name, value_B in per_user.items()}
        self.merge(MetricSums(sums, lengths.pop()))

    def merge(self, other: MetricSums) -> None:
        """Add another block's or rank's sums; one without users changes nothing."""
        if other.num_users == 0:
            return
        if self.num_users == 0:
            self.sums = dict.fromkeys(other.sums, 0.0)
        assert self.sums.keys() == other.sums.keys(), f"{list(self.sums)} against {list(other.sums)}"
        self.sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        self.num_users += other.num_users

    def means(self) -> dict[str, float]:
        if self.num_users == 0:
            raise ValueError("There is no user to average over: the split holds no user with positives.")
        return {name: total / self.num_users for name, total in self.sums.items()}


def popularity_ranking(count_I: np.ndarray, seen: Lists, k: int) -> np.ndarray:
    """The baseline to beat: for each user the `k` most taken items not on their `seen` list, int64 (B, k).

    `count_I` is how often each item was taken; ties go to the smaller row; -1 where items run out.
    """
    popular_I = np.argsort(-np.asarray(count_I), kind="stable").astype(np.int64)
    item_row_BK = np.full((len(seen), k), -1, dtype=np.int64)
    lengths = seen.lengths
    for users in blocks_by_length(lengths, extra=k):
        width = min(len(popular_I), k + int(lengths[users].max()))
        row_BC = np.broadcast_to(popular_I[:width], (len(users), width))
        (item_row_BK[users],) = first_kept(~seen.take(users).contain(row_BC), k, (row_BC, -1))
    return item_row_BK
