"""Which lists a user's search scans: as many as that user needs, told from the scores of the lists' centroids.

A fixed nprobe gives every user as many lists as the hardest need. Here a user's k-th best score is foretold from the
centroid scores, and every list is scanned whose centroid scores within a margin of it:

    foretold = bias + weights . features,      scanned: centroid score >= foretold - margin

The features are the best centroid's score and the centroid scores at which the lists, best first, hold together k/4, k,
4k and 16k items; the weights are a ridge regression against exact search, the margin is what reaches the target recall.
With filters, only the allowed items of a list are counted, so that the same rule serves any filter. Share of the items
scanned for 99 % recall of the best 100 on held-out users of a Gowalla run (40,981 x 64): 256 lists, one nprobe .078,
foretold .043; knowing the true k-th score .042. Softmax over centroid scores cut at a mass: .057 at best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from trec_twotower.data.kernels import IS_COMPILED, kernel
from trec_twotower.index.engine import faiss

REACH = np.array([0.25, 1.0, 4.0, 16.0])  # of k: the items that the features look ahead to
RIDGE = 1e-3
STRIDE = 32  # lists whose scores are looked at together
CHOSEN_TOGETHER = 256  # users, whose scores of all centroids stay in the cache


@dataclass(frozen=True)
class Fit:
    """The rule for one k."""

    k: int
    bias: float
    weights: tuple[float, ...]  # of the best centroid's score, then of those that REACH names
    margin: float
    most_lists: int  # the worst case
    scanned_share: float = 1.0  # of the catalogue, per user, as tuned
    spread: float = math.inf  # the k-th best score is foretold by more than this too high for a user in a hundred

    def foretell(self, score_BP: np.ndarray, size_BP: np.ndarray, k: int) -> np.ndarray:
        """Each user's k-th best score (B,), from its best lists in order: their scores and their numbers of items."""
        return features(score_BP, size_BP, k) @ _array(self.weights) + self.bias

    def fitted(self, feature_BF: np.ndarray, worst_B: np.ndarray) -> Fit:
        """This rule with the weights that foretell `worst_B` best."""
        mean_F, mean = feature_BF.mean(axis=0), worst_B.mean()
        centred_BF = feature_BF - mean_F
        scale = max(float(centred_BF.var()), 1e-12)
        gram_FF = centred_BF.T @ centred_BF + RIDGE * scale * len(worst_B) * np.eye(len(mean_F))
        weights = np.linalg.solve(gram_FF, centred_BF.T @ (worst_B - mean))
        fit = replace(self, bias=float(mean - mean_F @ weights), weights=tuple(weights.tolist()))
        too_high_B = feature_BF @ weights + fit.bias - worst_B
        return replace(fit, spread=max(0.0, float(np.percentile(too_high_B, 99))))


def features(score_BP: np.ndarray, size_BP: np.ndarray, k: int) -> np.ndarray:
    """(B, 1 + len(REACH)) float64, see the head of this module."""
    held_BP = np.cumsum(size_BP, axis=1)
    if len(held_BP) == 1:
        place_BR = held_BP[0].searchsorted(REACH * k)[None]
    else:
        place_BR = (held_BP[:, :, None] < REACH * k).sum(axis=1)
    np.minimum(place_BR, score_BP.shape[1] - 1, out=place_BR)
    if (score_BP[:, -1] == -np.inf).any():  # lists that do not count, behind those that do
        np.minimum(place_BR, np.maximum((score_BP > -np.inf).sum(axis=1) - 1, 0)[:, None], out=place_BR)
    feature_BF = np.empty((len(score_BP), 1 + len(REACH)))
    feature_BF[:, 0] = score_BP[:, 0]
    feature_BF[:, 1:] = score_BP[np.arange(len(score_BP))[:, None], place_BR]
    return feature_BF


@lru_cache
def _array(weights: tuple[float, ...]) -> np.ndarray:
    return np.array(weights)


def fit_for(fits: tuple[Fit, ...], k: int) -> Fit:
    """The rule for `k`: in proportion, by log k, between the two tuned ones around it; more lists beyond the last."""
    if k <= fits[0].k:
        return fits[0]
    last = fits[-1]
    if k >= last.k:
        more = k / last.k
        return replace(
            last, most_lists=math.ceil(last.most_lists * more), scanned_share=min(1.0, last.scanned_share * more)
        )
    upper = next(i for i, fit in enumerate(fits) if fit.k >= k)
    low, high = fits[upper - 1], fits[upper]
    part = math.log(k / low.k) / math.log(high.k / low.k)

    def between(first: float, second: float) -> float:
        return first + part * (second - first)

    return Fit(
        k=k,
        bias=between(low.bias, high.bias),
        weights=tuple(map(between, low.weights, high.weights)),
        margin=between(low.margin, high.margin),
        most_lists=math.ceil(between(low.most_lists, high.most_lists)),
        scanned_share=between(low.scanned_share, high.scanned_share),
        spread=max(low.spread, high.spread),
    )


class Coarse:
    """The centroids of the lists, and which of them score highest for a user."""

    def __init__(self, quantizer: Any, size_L: np.ndarray, *, on_gpu: bool = False) -> None:
        self.size_L = size_L
        self.num_lists = len(size_L)
        self._graph: Any = quantizer if isinstance(quantizer, faiss.IndexHNSW) else None
        self.is_lossy = self._graph is not None  # may come back with fewer lists, which then score -inf
        self._centroid_LD: Any = None if self._graph is not None else quantizer.reconstruct_n(0, self.num_lists)
        self._on_gpu = torch.from_numpy(self._centroid_LD).cuda() if on_gpu and self._graph is None else None

    def nearest(
        self, user_BD: np.ndarray, num_lists: int, without_L: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best lists of each user in order: scores (B, P) float32 and lists (B, P) int64, a few less where told.

        Lists marked in `without_L` come last, with a score of -inf.
        """
        if self._graph is not None:
            parameters = faiss.SearchParametersHNSW()
            parameters.efSearch = 2 * num_lists
            score_BP, list_BP = self._graph.search(user_BD, num_lists, params=parameters)
            lost_BP = list_BP < 0  # a graph may come back short
            if without_L is not None:
                lost_BP |= without_L[list_BP]
            score_BP[lost_BP] = -np.inf
            order_BP = np.argsort(-score_BP, axis=1, kind="stable")
        elif self._on_gpu is not None:
            score_BL = torch.from_numpy(user_BD).cuda() @ self._on_gpu.T
            if without_L is not None:
                score_BL[:, torch.from_numpy(without_L).cuda()] = -torch.inf
            best_BP, found_BP = score_BL.topk(num_lists, dim=1)
            return best_BP.cpu().numpy(), found_BP.cpu().numpy()
        else:
            score_BP = user_BD @ self._centroid_LD.T
            if without_L is not None:
                score_BP[:, without_L] = -np.inf
            if num_lists == self.num_lists:
                order_BP = np.argsort(-score_BP, axis=1)
                return _columns(score_BP, order_BP), order_BP
            list_BP = np.argpartition(score_BP, self.num_lists - num_lists, axis=1)[:, -num_lists:]
            score_BP = _columns(score_BP, list_BP)
            order_BP = np.argsort(-score_BP, axis=1)
        return _columns(score_BP, order_BP), _columns(list_BP, order_BP)

    def scores(self, user_BD: np.ndarray, list_BK: np.ndarray) -> np.ndarray:
        """(B, K): how the centroids of the users' given lists score."""
        if self._centroid_LD is None:
            self._centroid_LD = self._graph.storage.reconstruct_n(0, self.num_lists)
        score_BK = np.empty(list_BK.shape, np.float32)
        for user in range(0, len(user_BD), CHOSEN_TOGETHER):
            users = slice(user, user + CHOSEN_TOGETHER)
            every_BL = user_BD[users] @ self._centroid_LD.T
            score_BK[users] = np.take_along_axis(every_BL, list_BK[users].astype(np.int64), axis=1)
        return score_BK

    def choose(
        self, user_BD: np.ndarray, k: int, fit: Fit, size_L: np.ndarray | None, known_B: np.ndarray | None, most: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The lists to scan: scores and lists (B, P), best first, then -1; each user's k-th best score as foretold.

        The same as by `nearest` and `Fit.foretell`, without sorting what is not chosen; None where that is not here.
        """
        if not IS_COMPILED or self._graph is not None or self._on_gpu is not None:
            return None
        skips_empty = size_L is not None
        size_L = self.size_L if size_L is None else size_L
        foretold_B = np.empty(len(user_BD)) if known_B is None else known_B.astype(np.float64)
        chosen = []
        for start in range(0, max(len(user_BD), 1), CHOSEN_TOGETHER):
            users = slice(start, start + CHOSEN_TOGETHER)
            score_BL = user_BD[users] @ self._centroid_LD.T
            list_BP = np.empty((len(score_BL), most), np.int64)
            score_BP = np.empty((len(score_BL), most), np.float32)
            longest = _choose(
                score_BL, size_L, skips_empty, REACH * k, fit.bias, _array(fit.weights), fit.margin, known_B is None,
                foretold_B[users], score_BP, list_BP,
            )  # fmt: skip
            chosen.append((score_BP[:, :longest], list_BP[:, :longest]))
            if len(user_BD) > CHOSEN_TOGETHER:
                chosen[-1] = chosen[-1][0].copy(), chosen[-1][1].copy()  # the rest of what is as wide as `most` goes
        if len(chosen) == 1:
            return *chosen[0], foretold_B
        longest = max(part.shape[1] for part, _ in chosen)
        score_BP = np.full((len(user_BD), longest), -np.inf, np.float32)
        list_BP = np.full((len(user_BD), longest), -1, np.int64)
        for number, (some_scores, some_lists) in enumerate(chosen):
            users = slice(number * CHOSEN_TOGETHER, (number + 1) * CHOSEN_TOGETHER)
            score_BP[users, : some_scores.shape[1]] = some_scores
            list_BP[users, : some_lists.shape[1]] = some_lists
        return score_BP, list_BP, foretold_B


@kernel
def _choose(
    score_BL: np.ndarray,
    size_L: np.ndarray,
    skips_empty: bool,
    reach_R: np.ndarray,
    bias: float,
    weight_F: np.ndarray,
    margin: float,
    foretells: bool,
    foretold_B: np.ndarray,
    best_BP: np.ndarray,
    list_BP: np.ndarray,
) -> int:
    """Fills each user's lists, best first, and their centroids' scores; returns how many the most have."""
    num_lists, most = size_L.size, list_BP.shape[1]
    score_P, number_P = np.empty(most, np.float32), np.empty(most, np.int64)
    longest = 1
    for user in range(score_BL.shape[0]):
        score_L = score_BL[user]
        if foretells:
            head, sought = 0, min(most, 16)
            while True:
                head = _best_lists(score_L, size_L, skips_empty, sought, score_P, number_P)
                held = 0
                for i in range(head):
                    held += size_L[number_P[i]]
                if held >= reach_R[-1] or sought == most:
                    break
                sought = min(most, 4 * sought)
            foretold = bias + weight_F[0] * score_P[0]
            held, at = size_L[number_P[0]], 0
            for each in range(reach_R.size):
                while held < reach_R[each] and at < head - 1:
                    at += 1
                    held += size_L[number_P[at]]
                foretold += weight_F[1 + each] * score_P[at]
            foretold_B[user] = foretold
        least = np.nextafter(np.float32(foretold_B[user] - margin), np.float32(-np.inf))
        count = 0
        for begin in range(0, num_lists, STRIDE):
            end = min(begin + STRIDE, num_lists)
            if not _any_above(score_L, begin, end, least):
                continue
            for number in range(begin, end):
                score = score_L[number]
                if score > least and not (skips_empty and size_L[number] == 0):
                    count = min(count + 1, most)
                    last = _insert(score, number, count, score_P, number_P)
                    if count == most:
                        least = last
        if count == 0:
            count = _best_lists(score_L, size_L, skips_empty, 1, score_P, number_P)
        best_BP[user, :count] = score_P[:count]
        list_BP[user, :count] = number_P[:count]
        best_BP[user, count:] = -np.inf
        list_BP[user, count:] = -1
        longest = max(longest, count)
    return longest


@kernel
def _best_lists(
    score_L: np.ndarray, size_L: np.ndarray, skips_empty: bool, most: int, score_P: np.ndarray, number_P: np.ndarray
) -> int:
    """The `most` lists of highest score in order; returns how many there are."""
    count, least = 0, np.float32(-np.inf)
    for begin in range(0, score_L.size, STRIDE):
        end = min(begin + STRIDE, score_L.size)
        if not _any_above(score_L, begin, end, least):
            continue
        for number in range(begin, end):
            if score_L[number] > least and not (skips_empty and size_L[number] == 0):
                count = min(count + 1, most)
                last = _insert(score_L[number], number, count, score_P, number_P)
                if count == most:
                    least = last
    return count


@kernel
def _any_above(score_L: np.ndarray, begin: int, end: int, least: float) -> bool:
    above = 0
    for number in range(begin, end):
        above |= score_L[number] > least
    return above != 0


@kernel
def _insert(score: float, number: int, count: int, score_P: np.ndarray, number_P: np.ndarray) -> float:
    """Puts a list in its place among the first `count`, of which the last is free or goes; returns the last's score."""
    at = count - 1
    while at > 0 and score_P[at - 1] < score:
        score_P[at] = score_P[at - 1]
        number_P[at] = number_P[at - 1]
        at -= 1
    score_P[at] = score
    number_P[at] = number
    return score_P[count - 1]


def _columns(matrix_BC: np.ndarray, column_BP: np.ndarray) -> np.ndarray:
    """The named columns of each row, without take_along_axis's 10 µs."""
    return matrix_BC[0, column_BP[0]][None] if len(matrix_BC) == 1 else np.take_along_axis(matrix_BC, column_BP, axis=1)
