"""Metrics of rankings: functions on ranked item rows, one value per user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trec_twotower.ops.ragged import Ragged
from trec_twotower.ops.topk import MAX_CELLS, blocks_by_length, find_repeats, first_allowed


@dataclass(frozen=True)
class Hits:
    """The positions of each user's ranking that hold a positive."""

    is_hit_BK: np.ndarray
    positives: Ragged  # distinct, at least one per user

    @classmethod
    def of(cls, item_row_BK: np.ndarray, positives: Ragged) -> Hits:
        """Return the hits of rankings `item_row_BK`, best first, -1 for no item. A repeated positive counts once.

        Raises ValueError for an item ranked twice and for a user without positives, who has no recall.
        """
        if len(item_row_BK) != len(positives):
            raise ValueError(f"{len(item_row_BK):,} rankings against the positives of {len(positives):,} users.")
        void_B = np.any(find_repeats(item_row_BK), axis=1)
        if void_B.any():
            raise ValueError(
                f"{void_B.sum():,} of {len(void_B):,} rankings contain an item twice, the first is row "
                f"{void_B.argmax()}: such a ranking is void, rank every item at most once."
            )
        positives = positives.distinct()
        has_none_B = positives.lengths == 0
        if has_none_B.any():
            raise ValueError(
                f"{has_none_B.sum():,} of {len(positives):,} users have no positives, the first is "
                f"row {has_none_B.argmax()}: leave them out of the evaluation."
            )
        return cls(positives.contain(item_row_BK), positives)

    def metrics(self, ks: Sequence[int]) -> dict[str, np.ndarray]:
        return _metrics(self.is_hit_BK, self.positives.lengths, ks)

    def metrics_among(
        self, item_row_BK: np.ndarray, is_among_I: np.ndarray, ks: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Return the metrics with the items marked in `is_among_I` as positives, for users with such ones.

        The rankings do not change: all items compete.
        """
        wanted = np.bincount(self.positives.rows[is_among_I[self.positives.values]], minlength=len(self.positives))
        users = np.flatnonzero(wanted)
        is_hit_BK = self.is_hit_BK[users]
        return _metrics(is_hit_BK & is_among_I[item_row_BK[users, : is_hit_BK.shape[1]]], wanted[users], ks)


def ranking_metrics(item_row_BK: np.ndarray, positives: Ragged, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the METRICS at each k, float64 (B,) each, keyed "recall@20". Raises ValueError as Hits.of does.

    Columns a ranking lacks are misses. recall: hits / all the user's positives, also when those exceed k.
    ndcg: binary gains, over the ideal of min(k, positives) hits. hit: any. mrr: 1 / rank of the first hit within k,
    else 0. map: the average precision, which is the precision at each hit within k, summed, over min(k, positives).
    precision: hits / k.
    """
    if min(ks, default=0) < 1:
        raise ValueError(f"Metrics are asked at k = {list(ks)}: give at least one k, each 1 or more.")
    return Hits.of(item_row_BK[:, : max(ks)], positives).metrics(ks)


def _metrics(is_hit_BK: np.ndarray, num_positives_B: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    discount_K = 1 / np.log2(np.arange(2, max(ks) + 2))
    ideal_K = np.concatenate([[0.0], np.cumsum(discount_K)])
    precision_BK = np.cumsum(is_hit_BK, axis=1) / np.arange(1, is_hit_BK.shape[1] + 1) * is_hit_BK
    metrics: dict[str, np.ndarray] = {}
    for k in ks:
        hits_BK = is_hit_BK[:, :k]
        num_hits_B = hits_BK.sum(axis=1)
        has_hits_B = num_hits_B > 0
        most_B = np.minimum(num_positives_B, k)
        first_B = hits_BK.argmax(axis=1) if hits_BK.shape[1] else np.zeros(len(hits_BK))
        metrics[f"recall@{k}"] = num_hits_B / num_positives_B
        metrics[f"ndcg@{k}"] = hits_BK @ discount_K[: hits_BK.shape[1]] / ideal_K[most_B]
        metrics[f"hit@{k}"] = has_hits_B.astype(np.float64)
        metrics[f"mrr@{k}"] = np.where(has_hits_B, 1 / (first_B + 1), 0.0)
        metrics[f"map@{k}"] = precision_BK[:, :k].sum(axis=1) / most_B
        metrics[f"precision@{k}"] = num_hits_B / k
    return metrics


def list_metrics(
    item_row_BK: np.ndarray, ks: Sequence[int], count_I: np.ndarray, item_ID: np.ndarray
) -> dict[str, np.ndarray]:
    """Return metrics of ranked lists that need no positives, float64 (B,) at each k; NaN where a list is too short.

    popularity: the items' mean number of interactions in train. novelty: the mean self-information in bits, -log2 of
    an item's share of all interactions with add-one smoothing (Castells et al. 2011). diversity: the mean of 1 - cosine
    over the list's pairs of item vectors (intra-list distance, Ziegler et al. 2005); a zero vector has cosine 0.
    """
    interactions_I = np.asarray(count_I, np.float64)
    novelty_I = -np.log2((interactions_I + 1) / (interactions_I.sum() + len(interactions_I)))
    found = {f"{name}@{k}": np.full(len(item_row_BK), np.nan)
             for k in ks for name in ("popularity", "novelty", "diversity")}  # fmt: skip
    width = min(max(ks), item_row_BK.shape[1])
    block = max(1, MAX_CELLS // max(width * item_ID.shape[1], 1))
    for start in range(0, len(item_row_BK), block):
        rows = slice(start, min(start + block, len(item_row_BK)))
        item_BK = item_row_BK[rows, :width]
        is_item_BK = item_BK >= 0
        vector_BKD = item_ID[item_BK]  # the last item's for -1, masked below
        length_BK = np.linalg.norm(vector_BKD, axis=2)
        is_long_BK = is_item_BK & (length_BK > 0)
        vector_BKD *= np.divide(1, length_BK, where=is_long_BK, out=np.zeros_like(length_BK))[..., None]
        for k in ks:
            here_BK = is_item_BK[:, :k]
            num_B = here_BK.sum(axis=1)
            for name, value_I in (("popularity", interactions_I), ("novelty", novelty_I)):
                total_B = (value_I[item_BK[:, :k]] * here_BK).sum(axis=1)
                np.divide(total_B, num_B, where=num_B > 0, out=found[f"{name}@{k}"][rows])
            # |v_1 + ... + v_n|^2 is the sum of all cosines, of each item with itself too.
            sum_BD = vector_BKD[:, :k].sum(axis=1, dtype=np.float64)
            cosines_B = (sum_BD**2).sum(axis=1) - is_long_BK[:, :k].sum(axis=1)
            ordered_B = num_B * (num_B - 1)
            shared_B = np.divide(cosines_B, ordered_B, where=num_B > 1, out=np.full(len(num_B), np.nan))
            found[f"diversity@{k}"][rows] = 1 - shared_B
    return found


def resampled_sums(value_BM: np.ndarray, first_user: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Return each metric's sum and number of users in each bootstrap resample, float64 (resamples, 2, M).

    Poisson bootstrap (Chamandy et al. 2012): in each resample a user counts n times, n ~ Poisson(1), independently of
    the others. n depends on the user's number (from `first_user`) alone, so sums are the same for any number of ranks.
    NaN marks a user without that metric.
    """
    is_known_BM = ~np.isnan(value_BM)
    both = np.concatenate([np.where(is_known_BM, value_BM, 0), is_known_BM], axis=1)
    total = np.zeros((resamples, both.shape[1]))
    stop = first_user + len(both)
    for block in range(first_user // DRAWN_TOGETHER, -(-stop // DRAWN_TOGETHER)):
        low = max(block * DRAWN_TOGETHER, first_user)
        high = min((block + 1) * DRAWN_TOGETHER, stop)
        random = np.random.Generator(np.random.Philox(key=[seed, block]))
        times = _POISSON[random.integers(0, 1 << 16, (DRAWN_TOGETHER, resamples), np.uint16)]
        times = times[low - block * DRAWN_TOGETHER : high - block * DRAWN_TOGETHER]
        total += times.T @ both[low - first_user : high - first_user]
    return total.reshape(resamples, 2, -1)


DRAWN_TOGETHER = 1024  # users whose counts one generator draws


def _poisson_table() -> np.ndarray:
    """Return the Poisson(1) count for each value of 16 random bits, float64 (65536,)."""
    share = np.exp(-1.0) / np.cumprod([1.0, *range(1, 12)])
    ends = np.rint(np.cumsum(share) * (1 << 16)).astype(np.int64)
    return np.searchsorted(ends, np.arange(1 << 16), side="right").astype(np.float64)


_POISSON = _poisson_table()


def mean_metrics(per_user: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each metric over users; raises ValueError when there is no user."""
    sums = MetricSums()
    sums.add(per_user)
    return sums.means()


@dataclass
class MetricSums:
    """Sums of metrics over blocks of users; `merge` adds the sums of other blocks or ranks."""

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


def popularity_ranking(count_I: np.ndarray, seen: Ragged, k: int) -> np.ndarray:
    """Return each user's `k` unseen items with most interactions, int64 (B, k).

    `count_I` has the interactions of each item; ties are ordered by item row; -1 where items run out.
    """
    popular_I = np.argsort(-np.asarray(count_I), kind="stable").astype(np.int64)
    item_row_BK = np.full((len(seen), k), -1, dtype=np.int64)
    lengths = seen.lengths
    for users in blocks_by_length(lengths, extra=k):
        width = min(len(popular_I), k + int(lengths[users].max()))
        row_BC = np.broadcast_to(popular_I[:width], (len(users), width))
        (item_row_BK[users],) = first_allowed(~seen.take(users).contain(row_BC), k, (row_BC, -1))
    return item_row_BK
