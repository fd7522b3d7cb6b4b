"""The kinds of index: everything scanned, inverted lists, and a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from trec_twotower.errors import ConfigError
from trec_twotower.index.backends.faiss_backend import (
    BLAS_BATCH,
    Answer,
    Device,
    faiss,
    float_codes,
    inner_products,
    sequential_search,
    uses_gpu,
)
from trec_twotower.index.backends.gpu import gpu_copies, no_gpu_error
from trec_twotower.index.backends.shard import Shard
from trec_twotower.index.exact import SPARE, ExactItems
from trec_twotower.index.filters import Allowed, Strategy, check_mask
from trec_twotower.index.searcher import SearchEffort, Searcher

SORTED_FROM = 64  # users; a larger batch is scanned in order of best lists, which then are in the processor's cache
WIDER = 4  # times nprobe lists are looked at first for those with allowed items
CELLS = 1 << 20  # users x lists that are ranked together


class FlatSearcher(Searcher):
    """Every search scores all items: IndexFlat, or codes without lists."""

    def __init__(self, shards: Sequence[Shard], device: Device, **settings: Any) -> None:
        super().__init__(shards, **settings)
        on_gpu = isinstance(shards[0].base, faiss.IndexFlat) and uses_gpu(device) and torch.cuda.is_available()
        self.device = "gpu" if on_gpu else "cpu"
        self._exact_items: dict[int, ExactItems] = {}

    @property
    def most_breadth(self) -> int:
        return 0

    def breadth_for(self, user_BD: np.ndarray, item_row_BK: np.ndarray, share: float) -> int:
        return 0

    def scanned_shares(self, user_BD: np.ndarray, effort: SearchEffort) -> np.ndarray:
        return np.ones(len(user_BD))

    def _items(self, shard: Shard) -> ExactItems | None:
        """Return an IndexFlat's own vectors, not copied; None for codes."""
        if not isinstance(shard.base, faiss.IndexFlat):
            return None
        if shard.first_row not in self._exact_items:
            device = "cuda" if self.device == "gpu" else "cpu"
            items = ExactItems(float_codes(shard.base), device, blas_batch=self.blas_batch)
            self._exact_items[shard.first_row] = items
        return self._exact_items[shard.first_row]

    def _scan(
        self,
        shard: Shard,
        vector_BD: np.ndarray,
        width: int,
        effort: SearchEffort,
        probes: Any,
        bits: np.ndarray | None,
    ) -> Answer:
        items = self._items(shard)
        if items is not None and bits is None:
            return items.candidates(vector_BD, width)
        return shard.base.search(vector_BD, width, params=faiss.SearchParameters(**_selector(bits)))

    def _rescored(self, shard: Shard, vector_BD: np.ndarray, row_BC: np.ndarray) -> np.ndarray | None:
        items = self._items(shard)
        return None if items is None else inner_products(vector_BD, items.item_ID, row_BC)

    def _slack(self, shard: Shard, vector_BD: np.ndarray) -> np.ndarray | float:
        items = self._items(shard)
        return 0.0 if items is None else shard.rounding_slack(vector_BD, items.max_norm)


class GraphSearcher(Searcher):
    """A graph (HNSW) is walked from neighbour to neighbour; the breadth is efSearch."""

    growth = 1.5

    @property
    def most_breadth(self) -> int:
        return self.num_items

    def breadth_for(self, user_BD: np.ndarray, item_row_BK: np.ndarray, share: float) -> int:
        return item_row_BK.shape[1] + SPARE  # the number that a search fetches: a graph must be walked to know more

    def scanned_shares(self, user_BD: np.ndarray, effort: SearchEffort) -> np.ndarray:
        faiss.cvar.hnsw_stats.reset()
        self.search(user_BD, min(effort.k, self.num_items), effort)
        share = faiss.cvar.hnsw_stats.ndis / (len(user_BD) * self.num_items)
        return np.full(len(user_BD), min(1.0, share))

    def _limit(self, shard: Shard, pool: int, effort: SearchEffort) -> int:
        return min(shard.num_items, max(effort.breadth, pool + SPARE))

    def _scan(
        self,
        shard: Shard,
        vector_BD: np.ndarray,
        width: int,
        effort: SearchEffort,
        probes: Any,
        bits: np.ndarray | None,
    ) -> Answer:
        if effort.breadth >= self.num_items:  # a walk may not reach every item
            storage = faiss.downcast_index(shard.base.storage)
            return storage.search(vector_BD, width, params=faiss.SearchParameters(**_selector(bits)))
        parameters = faiss.SearchParametersHNSW(efSearch=effort.breadth, **_selector(bits))
        return shard.base.search(vector_BD, width, params=parameters)

    def _rescored(self, shard: Shard, vector_BD: np.ndarray, row_BC: np.ndarray) -> np.ndarray | None:
        storage = faiss.downcast_index(shard.base.storage)
        if not isinstance(storage, faiss.IndexFlat):
            return None
        return inner_products(vector_BD, float_codes(storage), row_BC)


class Probes(NamedTuple):
    """The lists that each user's search scans."""

    score_BP: np.ndarray  # of their centroids, best first
    list_BP: np.ndarray  # -1: none

    def of(self, users: np.ndarray) -> Probes:
        return Probes(self.score_BP[users], self.list_BP[users])


class ListSearcher(Searcher):
    """Inverted lists (IVF), of which each user's nprobe best are scanned; the breadth is nprobe."""

    growth = 2.0
    scores_are_final = True

    def __init__(self, shards: Sequence[Shard], device: Device, **settings: Any) -> None:
        super().__init__(shards, gpu=gpu_copies(shards, device) if uses_gpu(device) else None, **settings)
        self.num_lists = shards[0].base.nlist
        self._quantizer = shards[0].quantizer
        self._is_graph = isinstance(self._quantizer, faiss.IndexHNSW)
        self._sequential = sequential_search()  # so that the chosen lists do not depend on the batch
        self._parameters: dict[int, Any] = {}

    @property
    def most_breadth(self) -> int:
        return self.num_lists

    @cached_property
    def centroid_LD(self) -> np.ndarray:
        storage = faiss.downcast_index(self._quantizer.storage) if self._is_graph else self._quantizer
        return storage.reconstruct_n(0, self.num_lists)

    @cached_property
    def size_L(self) -> np.ndarray:
        """Return the number of items in each list, over all shards."""
        lists = [shard.base.invlists for shard in self.shards]
        return np.array([sum(each.list_size(number) for each in lists) for number in range(self.num_lists)])

    @cached_property
    def list_of_item(self) -> np.ndarray:
        """Return the list of each item, (I,) int32."""
        list_I = np.zeros(self.num_items, np.int32)
        for shard in self.shards:
            lists = shard.base.invlists
            for number in range(self.num_lists):
                if size := lists.list_size(number):
                    list_I[faiss.rev_swig_ptr(lists.get_ids(number), size) + shard.first_row] = number
        return list_I

    def allow(self, mask_I: np.ndarray, strategy: Strategy | None = None) -> Allowed:
        return Allowed.build(check_mask(mask_I, self.num_items), self.list_of_item, self.num_lists, strategy)

    def breadth_for(self, user_BD: np.ndarray, item_row_BK: np.ndarray, share: float) -> int:
        """Count: an item is scanned if its list is among the user's nprobe best."""
        return rank_share(
            self.shards[0].query_vectors(user_BD), self.centroid_LD, self.list_of_item[item_row_BK], share
        )

    def scanned_shares(self, user_BD: np.ndarray, effort: SearchEffort) -> np.ndarray:
        num_lists = min(effort.breadth, self.num_lists)
        list_BP = self._best_lists(self.shards[0].query_vectors(user_BD), num_lists).list_BP
        return np.where(list_BP >= 0, self.size_L[list_BP], 0).sum(axis=1) / self.num_items

    def _probes(self, vector_BD: np.ndarray, effort: SearchEffort, allowed: Allowed | None) -> Probes | None:
        num_lists = min(effort.breadth, self.num_lists)
        if allowed is not None and num_lists < self.num_lists:
            return self._lists_with_allowed(vector_BD, num_lists, effort, allowed)
        if len(vector_BD) < SORTED_FROM and len(self.shards) == 1:
            return None  # FAISS chooses them in the same call, which spares a few microseconds of Python
        return self._best_lists(vector_BD, num_lists)

    def _lists_with_allowed(
        self, vector_BD: np.ndarray, num_lists: int, effort: SearchEffort, allowed: Allowed
    ) -> Probes:
        """Return the best lists, and further ones until they hold the usual number of allowed items.

        The usual number is the scanned share of all of them: a filter that excludes what a user would get leaves fewer
        in the best lists. Lists without any are skipped.
        """
        assert allowed.size_L is not None
        wanted = effort.scanned_share * len(allowed.item_rows)
        for looked_at in sorted({min(WIDER * num_lists, self.num_lists), self.num_lists}):
            score_BP, list_BP = self._best_lists(vector_BD, looked_at)
            size_BP = np.where(list_BP >= 0, allowed.size_L[list_BP], 0)
            held_BP = np.cumsum(size_BP, axis=1)
            if (held_BP[:, -1] >= wanted).all():
                break
        is_wanted_BP = (np.arange(looked_at) < num_lists) | (held_BP - size_BP < wanted)
        is_wanted_BP &= size_BP > 0
        last = max(1, int(np.flatnonzero(is_wanted_BP.any(axis=0)).max(initial=0)) + 1)
        list_BP = np.where(is_wanted_BP, list_BP, -1)[:, :last]
        return Probes(np.ascontiguousarray(score_BP[:, :last]), np.ascontiguousarray(list_BP))

    def _best_lists(self, vector_BD: np.ndarray, num_lists: int) -> Probes:
        parameters = self._list_parameters(num_lists).quantizer_params
        return Probes(*self._quantizer.search(vector_BD, num_lists, params=parameters))

    def _list_parameters(self, num_lists: int, bits: np.ndarray | None = None) -> Any:
        """Return FAISS's parameters for a number of lists; those without a filter are cached."""
        if bits is None and num_lists in self._parameters:
            return self._parameters[num_lists]
        parameters = faiss.SearchParametersIVF(nprobe=num_lists, **_selector(bits))
        if self._is_graph:
            parameters.quantizer_params = faiss.SearchParametersHNSW(efSearch=2 * num_lists)
        else:
            parameters.quantizer_params = self._sequential
        if bits is None:
            self._parameters[num_lists] = parameters
        return parameters

    def _scan(
        self,
        shard: Shard,
        vector_BD: np.ndarray,
        width: int,
        effort: SearchEffort,
        probes: Probes | None,
        bits: np.ndarray | None,
    ) -> Answer:
        if probes is None:
            parameters = self._list_parameters(min(effort.breadth, self.num_lists), bits)
            return shard.base.search(vector_BD, width, params=parameters)
        if len(vector_BD) < SORTED_FROM:
            return self._scan_lists(shard, vector_BD, width, probes, bits)
        by_list = np.argsort(probes.list_BP[:, 0], kind="stable")
        found = self._scan_lists(shard, vector_BD[by_list], width, probes.of(by_list), bits)
        back = np.empty_like(by_list)
        back[by_list] = np.arange(len(by_list))
        return found[0][back], found[1][back]

    def _scan_lists(
        self, shard: Shard, vector_BD: np.ndarray, width: int, probes: Probes, bits: np.ndarray | None
    ) -> Answer:
        """Search the given lists by FAISS's C++ function, since its Python wrapper accepts no parameters."""
        num_users, num_lists = probes.list_BP.shape
        parameters = self._list_parameters(num_lists, bits)
        score_BC = np.empty((num_users, width), np.float32)
        row_BC = np.empty((num_users, width), np.int64)
        pointer = faiss.swig_ptr
        shard.base.search_preassigned_c(
            num_users, pointer(vector_BD), width, pointer(probes.list_BP), pointer(probes.score_BP),
            pointer(score_BC), pointer(row_BC), False, parameters,
        )  # fmt: skip
        return score_BC, row_BC


def rank_share(vector_BD: np.ndarray, centroid_LD: np.ndarray, list_BK: np.ndarray, share: float) -> int:
    """Return the least number of best lists of each user that contain `share` of the items in `list_BK`."""
    ranks = [
        np.take_along_axis(rank_BL, list_BK[users], axis=1).ravel()
        for users, rank_BL in _list_ranks(vector_BD, centroid_LD)
    ]
    rank_N = np.sort(np.concatenate(ranks))
    return int(rank_N[max(math.ceil(min(share, 1.0) * len(rank_N)) - 1, 0)]) + 1


def _list_ranks(vector_BD: np.ndarray, centroid_LD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Return blocks of users with the rank (B, L) of each list by the score of its centroid, the best 0."""
    num_lists = len(centroid_LD)
    step = max(1, CELLS // num_lists)
    for start in range(0, len(vector_BD), step):
        users = slice(start, start + step)
        order_BL = np.argsort(-(vector_BD[users] @ centroid_LD.T), axis=1, kind="stable")
        rank_BL = np.empty_like(order_BL)
        np.put_along_axis(rank_BL, order_BL, np.arange(num_lists)[None], axis=1)
        yield users, rank_BL


def _selector(bits: np.ndarray | None) -> dict[str, Any]:
    """Return FAISS's search parameter for the rows whose bits are set."""
    return {} if bits is None else {"sel": faiss.IDSelectorBitmap(bits)}


def make_searcher(
    wholes: Sequence[Any], device: Device, *, refine_factor: int = 1, blas_batch: int = BLAS_BATCH
) -> Searcher:
    """Return the searcher of FAISS indexes that share the items in order; raises ConfigError for other kinds."""
    shards: list[Shard] = []
    for whole in wholes:
        shards.append(Shard(whole, shards[-1].first_row + shards[-1].num_items if shards else 0))
    first = shards[0]
    settings: dict[str, Any] = {"refine_factor": refine_factor, "blas_batch": blas_batch}
    if isinstance(first.base, faiss.IndexIVF):
        if not isinstance(first.quantizer, faiss.IndexFlat | faiss.IndexHNSWFlat):
            raise ConfigError(
                f"index.factory finds its lists by a {type(first.quantizer).__name__}. Use IVF1024 or the like, or "
                "IVF65536_HNSW32."
            )
        return ListSearcher(shards, device, **settings)
    if device == "gpu" and not isinstance(first.base, faiss.IndexFlat):
        raise no_gpu_error(first)
    if isinstance(first.base, faiss.IndexHNSW):
        return GraphSearcher(shards, **settings)
    if isinstance(first.base, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return FlatSearcher(shards, device, **settings)
    raise ConfigError(
        f"index.factory makes a {type(first.base).__name__}, which cannot be tuned or filtered here. Use Flat or SQ "
        "codes, IVF lists of them or of PQ codes, or HNSW; with OPQ, PCA or RR before and Refine or RFlat after."
    )
