"""The shards of a catalogue searched as one, to a given effort; equal scores come in order of item row."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trec_twotower.index.backends.faiss_backend import BLAS_BATCH, GPU_LIMIT, Answer, faiss, inner_products
from trec_twotower.index.backends.gpu import GpuCopies
from trec_twotower.index.backends.matrix import PIECE
from trec_twotower.index.backends.shard import Shard
from trec_twotower.index.exact import (
    SPARE,
    ExactItems,
    RunningBest,
    best_with_ties,
    empty_answer,
    is_settled,
    merge,
    order,
    padded,
)
from trec_twotower.index.filters import Allowed, Strategy, check_mask

SAMPLE_ITEMS = 2048  # items from which the rank of a score is estimated
FEWEST_ABOVE = 8  # of them must score higher for the rank to be known


@dataclass(frozen=True)
class SearchEffort:
    """How much a search for up to `k` neighbours scans."""

    k: int
    breadth: int  # nprobe of lists, efSearch of a graph; 0 where every search scans all items
    scanned_share: float  # items scored per user / items, mean of the users it was tuned for


def effort_for(efforts: Sequence[SearchEffort], k: int) -> SearchEffort:
    """Return the tuned effort for the least k that covers `k`; beyond the last, that one doubled as often as needed.

    A step function, so that answers of 10 and of 20 scan the same items and the first is the head of the second.
    """
    for effort in efforts:
        if k <= effort.k:
            return effort
    last = efforts[-1]
    factor = 2
    while last.k * factor < k:
        factor *= 2
    return SearchEffort(last.k * factor, last.breadth * factor, min(1.0, last.scanned_share * factor))


class Searcher(ABC):
    """All shards of one kind of index and, where wanted, their copies on GPUs."""

    num_lists = 0  # inverted lists
    growth = 1.0  # factor by which tuning widens a search that falls short although all wanted items are scanned
    scores_are_final = False  # whether FAISS's scores are those of the answer, not scored again

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        refine_factor: int = 1,
        blas_batch: int = BLAS_BATCH,
        gpu: GpuCopies | None = None,
    ) -> None:
        self.shards = list(shards)
        self.refine_factor = refine_factor  # candidates that are scored again, as a multiple of the effort's k
        self.blas_batch = blas_batch
        self.dim = self.shards[0].whole.d
        self.num_items = sum(shard.num_items for shard in shards)
        self.device = "gpu" if gpu is not None else "cpu"
        self._gpu = gpu
        self._lock = threading.Lock()

    # ------------------------------------------------------------ what a kind defines

    @property
    @abstractmethod
    def most_breadth(self) -> int:
        """Return the breadth at which everything is scanned."""

    @abstractmethod
    def breadth_for(self, user_BD: np.ndarray, item_row_BK: np.ndarray, share: float) -> int:
        """Return the least breadth that is expected to scan `share` of the given items of users."""

    @abstractmethod
    def scanned_shares(self, user_BD: np.ndarray, effort: SearchEffort) -> np.ndarray:
        """Return the share of the items (B,) that each user's search scans."""

    @abstractmethod
    def _scan(
        self,
        shard: Shard,
        vector_BD: np.ndarray,
        width: int,
        effort: SearchEffort,
        probes: Any,
        bits: np.ndarray | None,
    ) -> Answer:
        """Return the best `width` rows of a shard by FAISS; `bits` marks the rows that count."""

    def _probes(self, vector_BD: np.ndarray, effort: SearchEffort, allowed: Allowed | None) -> Any:
        """Return what all shards scan for these users."""
        return None

    def _limit(self, shard: Shard, pool: int, effort: SearchEffort) -> int:
        """Return how many candidates may be fetched to complete a pool with its ties."""
        return shard.num_items

    def _rescored(self, shard: Shard, vector_BD: np.ndarray, row_BC: np.ndarray) -> np.ndarray | None:
        """Return scores free of a batch's rounding, None where FAISS's own are."""
        return None

    def _slack(self, shard: Shard, vector_BD: np.ndarray) -> np.ndarray | float:
        """Return by how much FAISS's scores may be wrong for each user."""
        return 0.0

    # ------------------------------------------------------------ searching

    def everything(self, k: int) -> SearchEffort:
        return SearchEffort(k, self.most_breadth, 1.0)

    def search(self, user_BD: np.ndarray, k: int, effort: SearchEffort, allowed: Allowed | None = None) -> Answer:
        """Return the best `k` of the items that the effort scans, of the allowed ones; rows end in -inf and -1.

        At the greatest breadth a row is shorter than `k` only where fewer items are allowed.
        """
        found = self._search_gpu_or_cpu(user_BD, k, effort, allowed)
        if effort.breadth < self.most_breadth or not len(user_BD) or found[1][:, -1].min() >= 0:
            return found
        # Fast-scan codes lose items of the lowest possible score
        wanted = min(k, self.num_items if allowed is None else len(allowed.item_rows))
        short = np.flatnonzero((found[1] >= 0).sum(axis=1) < wanted)
        if len(short):
            found = found[0].copy(), found[1].copy()
            found[0][short], found[1][short] = self.search_exactly(np.ascontiguousarray(user_BD[short]), k, allowed)
        return found

    def _search_gpu_or_cpu(self, user_BD: np.ndarray, k: int, effort: SearchEffort, allowed: Allowed | None) -> Answer:
        if self._gpu is None or allowed is not None or max(k + 1, effort.breadth) > GPU_LIMIT:
            return self._search_cpu(user_BD, k, effort, allowed)
        width = min(k + 1, self.num_items)
        score_BC, row_BC = self._gpu.search(self.shards[0].query_vectors(user_BD), width, effort.breadth)
        score_BK, item_row_BK = order(score_BC, row_BC, k)
        if width > k:
            tied = np.flatnonzero((row_BC[:, -1] >= 0) & (score_BC[:, -1] >= score_BK[:, -1]))
            some_BD = np.ascontiguousarray(user_BD[tied])
            score_BK[tied], item_row_BK[tied] = self._search_cpu(some_BD, k, effort, None)
        return score_BK, item_row_BK

    def _search_cpu(self, user_BD: np.ndarray, k: int, effort: SearchEffort, allowed: Allowed | None) -> Answer:
        if not len(user_BD):
            return empty_answer(0, k)
        probes = self._probes(self.shards[0].query_vectors(user_BD), effort, allowed)
        answers = [self._search_shard(shard, user_BD, k, effort, probes, allowed) for shard in self.shards]
        return merge(answers, k)

    def _search_shard(
        self,
        shard: Shard,
        user_BD: np.ndarray,
        k: int,
        effort: SearchEffort,
        probes: Any,
        allowed: Allowed | None,
    ) -> Answer:
        vector_BD = shard.query_vectors(user_BD)
        bits = None if allowed is None else shard.bits(allowed.bitmap)
        num_found = min(k, shard.num_items)
        pool = num_found
        if shard.refine is not None:
            pool = min(max(k, effort.k * self.refine_factor), shard.num_items)
        first_width = min(pool + SPARE, shard.num_items)
        first = self._scan(shard, vector_BD, first_width, effort, probes, bits)
        if self.scores_are_final and shard.refine is None and k < first_width and is_settled(first):
            return first[0][:, :k], _moved(first[1][:, :k], shard.first_row)

        def search(users: np.ndarray, width: int) -> Answer:
            if len(users) == len(vector_BD):
                return first if width == first_width else self._scan(shard, vector_BD, width, effort, probes, bits)
            some = None if probes is None else probes.of(users)
            return self._scan(shard, np.ascontiguousarray(vector_BD[users]), width, effort, some, bits)

        def finish(users: np.ndarray, found: Answer) -> Answer:
            score_BC, row_BC = found
            if shard.refine is not None:
                row_BC = np.where(score_BC >= score_BC[:, pool - 1 : pool], row_BC, -1)
                score_BC = shard.score_again(user_BD[users], row_BC)
            else:
                rescored = self._rescored(shard, vector_BD[users], row_BC)
                score_BC = score_BC if rescored is None else rescored
            return order(score_BC, row_BC, num_found)

        score_BK, row_BK = best_with_ties(
            search,
            finish,
            len(user_BD),
            num_found,
            pool=pool,
            limit=self._limit(shard, pool, effort),
            slack_B=self._slack(shard, vector_BD),
        )
        return padded(score_BK, _moved(row_BK, shard.first_row), k)

    def search_exactly(self, user_BD: np.ndarray, k: int, allowed: Allowed | None) -> Answer:
        """Return the best `k` of the allowed items, or of all, by scoring their stored vectors."""
        user_BD = user_BD if self.shards[0].refine is not None else self.shards[0].query_vectors(user_BD)
        rows = np.arange(self.num_items) if allowed is None else allowed.item_rows
        if allowed is not None and allowed.fits(self.dim):
            score_BK, place_BK = self.exact_items(allowed).best(user_BD, k)
        else:
            best = RunningBest(user_BD, k)
            for start in range(0, len(rows), PIECE):
                best.add(self.vectors_of(rows[start : start + PIECE]), start)
            score_BK, place_BK = best.score_BK, best.item_row_BK
        return score_BK, np.where(place_BK >= 0, rows[place_BK], -1)

    # ------------------------------------------------------------ the items themselves

    def ranks(self, user_BD: np.ndarray, score_B: np.ndarray) -> np.ndarray:
        """Return the rank (B,) that each score has among all items of a user, by a sample of them; 0 if it is high."""
        user_BD = user_BD if self.shards[0].refine is not None else self.shards[0].query_vectors(user_BD)
        num_sampled = len(self._sample_SD)
        every_BS = np.broadcast_to(np.arange(num_sampled), (len(user_BD), num_sampled))
        above_B = (inner_products(user_BD, self._sample_SD, every_BS) > score_B[:, None]).sum(axis=1)
        return np.where(above_B >= FEWEST_ABOVE, above_B * (self.num_items / num_sampled), 0.0)

    @cached_property
    def _sample_SD(self) -> np.ndarray:
        rows = np.linspace(0, self.num_items - 1, min(SAMPLE_ITEMS, self.num_items)).astype(np.int64)
        return self.vectors_of(rows)

    def vectors_of(self, item_rows: np.ndarray) -> np.ndarray:
        """Return the vectors of item rows in rising order, as far as the index stores them."""
        vectors = []
        for shard in self.shards:
            first, stop = np.searchsorted(item_rows, [shard.first_row, shard.first_row + shard.num_items])
            with self._lock:
                if isinstance(shard.base, faiss.IndexIVF) and shard.refine is None and shard.base.direct_map.no():
                    shard.base.make_direct_map()
                vectors.append(shard.vectors_of(item_rows[first:stop] - shard.first_row))
        return np.concatenate(vectors)

    def drop_direct_maps(self) -> None:
        """Free the tables of where each item is in its list, which `vectors_of` makes again when it needs them."""
        for shard in self.shards:
            with self._lock:
                if isinstance(shard.base, faiss.IndexIVF):
                    shard.base.make_direct_map(False)

    def allow(self, mask_I: np.ndarray, strategy: Strategy | None = None) -> Allowed:
        """Return the filter of the marked items; raises ConfigError or DataError for a mask that cannot be."""
        return Allowed.build(check_mask(mask_I, self.num_items), None, 0, strategy)

    def exact_items(self, allowed: Allowed) -> ExactItems:
        """Return the allowed items' vectors, read from the index at the first call."""
        if not allowed.kept:
            allowed.kept.append(ExactItems(self.vectors_of(allowed.item_rows), blas_batch=self.blas_batch))
        return allowed.kept[0]


def _moved(row_BK: np.ndarray, first_row: int) -> np.ndarray:
    """Return a shard's rows as item rows."""
    return np.where(row_BK >= 0, row_BK + first_row, -1) if first_row else row_BK
