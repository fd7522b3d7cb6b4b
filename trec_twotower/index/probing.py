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

from trec_twotower.index.engine import faiss

REACH = np.array([0.25, 1.0, 4.0, 16.0])  # of k: the items that the features look ahead to
RIDGE = 1e-3


@dataclass(frozen=True)
class Fit:
    """The rule for one k."""

    k: int
    bias: float
    weights: tuple[float, ...]  # of the best centroid's score, then of those that REACH names
    margin: float
    most_lists: int  # the worst case
    scanned_share: float = 1.0  # of the catalogue, per user, as tuned

    def foretell(self, score_BP: np.ndarray, size_BP: np.ndarray, k: int) -> np.ndarray:
        """Each user's k-th best score (B,), from its best lists in order: their scores and their numbers of items."""
        return features(score_BP, size_BP, k) @ _array(self.weights) + self.bias

    def fitted(self, score_BP: np.ndarray, size_BP: np.ndarray, worst_B: np.ndarray) -> Fit:
        """This rule with the weights that foretell `worst_B` best."""
        feature_BF = features(score_BP, size_BP, self.k)
        mean_F, mean = feature_BF.mean(axis=0), worst_B.mean()
        centred_BF = feature_BF - mean_F
        scale = max(float(centred_BF.var()), 1e-12)
        gram_FF = centred_BF.T @ centred_BF + RIDGE * scale * len(worst_B) * np.eye(len(mean_F))
        weights = np.linalg.solve(gram_FF, centred_BF.T @ (worst_B - mean))
        return replace(self, bias=float(mean - mean_F @ weights), weights=tuple(weights.tolist()))


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
    )


class Coarse:
    """The centroids of the lists, and which of them score highest for a user."""

    def __init__(self, quantizer: Any, size_L: np.ndarray, *, on_gpu: bool = False) -> None:
        self.size_L = size_L
        self.num_lists = len(size_L)
        self._graph = quantizer if isinstance(quantizer, faiss.IndexHNSW) else None
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


def _columns(matrix_BC: np.ndarray, column_BP: np.ndarray) -> np.ndarray:
    """The named columns of each row, without take_along_axis's 10 µs."""
    return matrix_BC[0, column_BP[0]][None] if len(matrix_BC) == 1 else np.take_along_axis(matrix_BC, column_BP, axis=1)
