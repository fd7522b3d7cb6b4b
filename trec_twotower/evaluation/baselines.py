"""Baselines: item-to-item co-occurrence, and two towers from a truncated SVD."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from trec_twotower.config.training import SpectralConfig
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.evaluation.metrics import popularity_ranking
from trec_twotower.index import ExactItems, exact_search
from trec_twotower.ops.compilation import kernel
from trec_twotower.ops.ragged import Ragged, offsets_of, side_by_side
from trec_twotower.training.spectral_initialization import Interactions, spectral_tables

MOST_NEIGHBOURS = 100  # of an item
MOST_TAKEN = (
    1000  # items of a user; users with more are not counted, as they carry little information about co-occurrence
)
KEPT_CELLS = 1 << 27  # neighbours of all items


@dataclass(frozen=True)
class ItemToItem:
    """Each item's nearest by the cosine of their users (Sarwar et al. 2001): |both| / sqrt(|one| |other|)."""

    neighbour_IN: np.ndarray  # int32 item rows, nearest first; -1 where there are no more
    likeness_IN: np.ndarray  # float32
    count_I: np.ndarray

    @classmethod
    def of(cls, interactions: Interactions, count_I: np.ndarray, ranks: Ranks) -> ItemToItem:
        """Build the baseline from the pairs of all ranks; each rank finds the neighbors of its share of the items.

        `count_I` orders what is left where an item has too few neighbours.
        """
        pairs = ranks.collect((interactions.user_P, interactions.item_P, interactions.num_users))
        first_user = offsets_of([num_users for _, _, num_users in pairs])
        user_P = np.concatenate([user + first for (user, _, _), first in zip(pairs, first_user, strict=False)])
        item_P = np.concatenate([item for _, item, _ in pairs])
        of_user = offsets_of(np.bincount(user_P, minlength=int(first_user[-1])))
        of_item = offsets_of(np.bincount(item_P, minlength=interactions.num_items))
        by_item = user_P[np.argsort(item_P, kind="stable")]
        mine = ranks.share(interactions.num_items)
        most = max(1, min(MOST_NEIGHBOURS, KEPT_CELLS // interactions.num_items))
        neighbour = np.full((mine.stop - mine.start, most), -1, np.int32)
        likeness = np.zeros(neighbour.shape, np.float32)
        _find_neighbours(of_user, item_P, of_item, by_item, mine.start, MOST_TAKEN, neighbour, likeness)
        parts = ranks.collect((neighbour, likeness))
        return cls(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), count_I)

    def rankings(self, history: Ragged, k: int, excluded: Ragged | None = None) -> np.ndarray:
        """Return (users, k) item rows by the summed likeness to the items of the user's history; ties go by item row.

        Items on `excluded`, by default those of the history, are left out. After the items that are like any of the
        history come the most popular of the rest; -1 where items run out.
        """
        seen, excluded = history.distinct(), history if excluded is None else excluded
        ranked = np.full((len(seen), k), -1, np.int64)
        _rank(seen.offsets, seen.values, excluded.offsets, excluded.values, self.neighbour_IN, self.likeness_IN,
              len(self.count_I), ranked)  # fmt: skip
        found = ranked >= 0
        short = np.flatnonzero(~found[:, -1])
        if len(short):
            already_ranked = Ragged(offsets_of(found[short].sum(axis=1)), ranked[short][found[short]])
            rest = popularity_ranking(self.count_I, side_by_side(excluded.take(short), already_ranked), k)
            for row, more in zip(short, rest, strict=True):
                begun = int(found[row].sum())
                ranked[row, begun:] = more[: k - begun]
        return ranked


@dataclass(frozen=True)
class SpectralTowers:
    """Untrained towers from a truncated SVD: a user is the sum over the history, scored by the inner product."""

    history_ID: np.ndarray
    item_ID: np.ndarray
    count_I: np.ndarray

    @classmethod
    def of(cls, interactions: Interactions, dim: int, count_I: np.ndarray, ranks: Ranks) -> SpectralTowers:
        """Build the baseline from the pairs of all ranks, of rank `dim` at most. All ranks call together."""
        num_users = int(ranks.sum(np.array([interactions.num_users]))[0])
        dim = min(dim, num_users, interactions.num_items)
        start = SpectralConfig(history="all interactions of a user")
        history, item = spectral_tables(interactions, dim, start, 0, ranks)
        return cls(history.cpu().numpy(), item.cpu().numpy(), count_I)

    def users(self, seen: Ragged) -> np.ndarray:
        """Return (users, D) float32; zero for users without items."""
        seen = seen.distinct()
        bags = (torch.from_numpy(part) for part in (seen.values, self.history_ID, seen.offsets[:-1]))
        return functional.embedding_bag(*bags, mode="sum").numpy()

    def rankings(self, history: Ragged, k: int, excluded: Ragged | None = None) -> np.ndarray:
        """Return (users, k) item rows without those on `excluded`, by default the history.

        Users without a known item in their history get the most popular items.
        """
        excluded = history if excluded is None else excluded
        user_BD = self.users(history)
        _, ranked = exact_search(ExactItems(self.item_ID), user_BD, k, excluded)
        lost = np.flatnonzero(~user_BD.any(axis=1))
        ranked[lost] = popularity_ranking(self.count_I, excluded.take(lost), k)
        return ranked


def popularity_vectors(count_I: np.ndarray, num_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Return items (I, 1) and users (B, 1) whose inner products are the numbers of interactions."""
    return np.asarray(count_I, np.float32)[:, None], np.ones((num_users, 1), np.float32)


@kernel
def _find_neighbours(
    of_user: np.ndarray,
    items: np.ndarray,
    of_item: np.ndarray,
    users: np.ndarray,
    first: int,
    most_taken: int,
    neighbour: np.ndarray,
    likeness: np.ndarray,
) -> None:
    """Fills a row for each item from `first` on; `items` by user and `users` by item."""
    num_items = of_item.size - 1
    both = np.zeros(num_items)
    met = np.empty(num_items, np.int64)
    for row in range(neighbour.shape[0]):
        item = first + row
        num_met = 0
        for place in range(of_item[item], of_item[item + 1]):
            user = users[place]
            if of_user[user + 1] - of_user[user] > most_taken:
                continue
            for other_place in range(of_user[user], of_user[user + 1]):
                other = items[other_place]
                if other == item:
                    continue
                if both[other] == 0:
                    met[num_met] = other
                    num_met += 1
                both[other] += 1
        others = np.sort(met[:num_met])
        value = np.empty(num_met)
        for i in range(num_met):
            other = others[i]
            num_one, num_other = of_item[item + 1] - of_item[item], of_item[other + 1] - of_item[other]
            value[i] = both[other] / np.sqrt(float(num_one) * float(num_other))
            both[other] = 0
        order = np.argsort(-value, kind="mergesort")
        for i in range(min(num_met, neighbour.shape[1])):
            neighbour[row, i] = others[order[i]]
            likeness[row, i] = value[order[i]]


@kernel
def _rank(
    offsets: np.ndarray,
    seen: np.ndarray,
    excluded_offsets: np.ndarray,
    excluded: np.ndarray,
    neighbour: np.ndarray,
    likeness: np.ndarray,
    num_items: int,
    ranked: np.ndarray,
) -> None:
    score = np.zeros(num_items)
    is_met = np.zeros(num_items, np.bool_)
    met = np.empty(num_items, np.int64)
    for user in range(ranked.shape[0]):
        num_met = 0
        for place in range(offsets[user], offsets[user + 1]):
            for i in range(neighbour.shape[1]):
                other = neighbour[seen[place], i]
                if other < 0:
                    break
                if not is_met[other]:
                    is_met[other] = True
                    met[num_met] = other
                    num_met += 1
                score[other] += likeness[seen[place], i]
        for place in range(excluded_offsets[user], excluded_offsets[user + 1]):
            is_met[excluded[place]] = False  # not to be listed
        others = np.sort(met[:num_met])
        order = np.argsort(-score[others], kind="mergesort")
        listed = 0
        for i in order:
            other = others[i]
            if is_met[other] and listed < ranked.shape[1]:
                ranked[user, listed] = other
                listed += 1
        for i in range(num_met):
            score[met[i]] = 0
            is_met[met[i]] = False
