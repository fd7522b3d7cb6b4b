"""The metrics of the best possible ranking of the synthetic dataset, and of ranking by popularity."""

from __future__ import annotations

from typing import Any

import numpy as np

from trec_twotower.data.sources.synthetic.interaction_model import InteractionModel

SAMPLED_USERS = 20_000  # fewer for large catalogues, since all items are ranked for each of them
MOST_CELLS = 2_000_000_000
CELLS_AT_ONCE = 4_000_000
CUTOFFS = {"recall": (10, 20, 50, 100), "ndcg": (10, 20)}
HEAD_SHARE = 0.2  # share of the items with interactions in train that are the head, as in `evaluate --slice tail`
PARTS = ("cold", "tail", "head")


def reachable(model: InteractionModel, item_id: np.ndarray, train_count: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the test metrics of ranking by the true probability and of ranking by popularity.

    Both exclude the user's history. `expected_recall@k` is the true probability that the next item is among the best k,
    averaged over the users: the realised recall differs from it by sampling alone. `recall@k of PART` is the recall of
    the best ranking for users whose next item is cold (not in train), in the tail or in the head.
    """
    users = np.arange(model.options.users)
    most = min(SAMPLED_USERS, max(500, MOST_CELLS // model.options.items))
    if len(users) > most:
        users = np.sort(np.random.default_rng(model.options.seed).choice(len(users), most, replace=False))
    place = np.empty(len(train_count), np.int64)
    place[np.lexsort((item_id, -train_count))] = np.arange(len(train_count))

    best_ranks, popular_ranks, reach, parts = [], [], [], []
    part_of = _parts(train_count)
    for start in range(0, len(users), 4096):
        events = model.events(users[start : start + 4096])
        events = events.only(events.is_tested)
        if not len(events.user):
            continue
        last = events.offsets[1:] - 1
        test_item, owner = events.item[last], events.owner
        in_history = np.arange(len(events.item)) != last[owner]
        owner, seen_item = owner[in_history], events.item[in_history]
        before = place[seen_item] < place[test_item][owner]
        popular_ranks.append(place[test_item] - np.bincount(owner[before], minlength=len(test_item)))
        parts.append(part_of[test_item])
        everyone, situation = model.users(events.user), events.situation.take(last)
        block = max(1, CELLS_AT_ONCE // model.options.items)
        for first in range(0, len(test_item), block):
            rows = np.arange(first, min(first + block, len(test_item)))
            chance = model.probabilities(everyone.take(rows), situation.take(rows))
            mine = (owner >= first) & (owner < first + block)
            chance[owner[mine] - first, seen_item[mine]] = 0.0
            rank, reached = _best_ranking(chance, test_item[rows])
            best_ranks.append(rank)
            reach.append(reached)

    if not best_ranks:
        return {}
    best_rank, popular_rank = np.concatenate(best_ranks), np.concatenate(popular_ranks)
    expected, part = np.concatenate(reach).mean(axis=0), np.concatenate(parts)
    about = {"split": "test", "users_sampled": len(best_rank)}
    of_parts = {
        f"recall@{k} of {name}": round(float((best_rank[part == number] < k).mean()), 6)
        for number, name in enumerate(PARTS)
        if (part == number).any()
        for k in CUTOFFS["recall"]
    }
    return {
        "best_reachable": about
        | _metrics(best_rank)
        | {f"expected_recall@{k}": round(float(expected[k - 1]), 6) for k in CUTOFFS["recall"]}
        | of_parts,
        "popularity": about | _metrics(popular_rank),
    }


def _parts(train_count: np.ndarray) -> np.ndarray:
    """Return for each item the index of its part in PARTS."""
    order = np.argsort(-train_count, kind="stable")
    num_known = int((train_count > 0).sum())
    part = np.zeros(len(train_count), np.int64)
    part[order[:num_known]] = 1
    part[order[: int(np.ceil(HEAD_SHARE * num_known))]] = 2
    return part


def _best_ranking(chance_BI: np.ndarray, test_item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the test item's rank from 0, and the share of probability of the best 1, 2, ... 100 items."""
    own = np.take_along_axis(chance_BI, test_item[:, None], axis=1)
    most = max(CUTOFFS["recall"])
    top = chance_BI
    if chance_BI.shape[1] > most:
        top = np.partition(chance_BI, chance_BI.shape[1] - most, axis=1)[:, -most:]
    top = -np.sort(-top, axis=1)
    top = np.pad(top, ((0, 0), (0, most - top.shape[1])))
    return (chance_BI > own).sum(axis=1), np.cumsum(top, axis=1) / chance_BI.sum(axis=1, keepdims=True)


def _metrics(rank: np.ndarray) -> dict[str, float]:
    """Return recall (hit rate) and NDCG for one held-out item per user."""
    recall = {f"recall@{k}": float((rank < k).mean()) for k in CUTOFFS["recall"]}
    gain = 1 / np.log2(rank + 2.0)
    ndcg = {f"ndcg@{k}": float(np.where(rank < k, gain, 0).mean()) for k in CUTOFFS["ndcg"]}
    return {name: round(value, 6) for name, value in (recall | ndcg).items()}
