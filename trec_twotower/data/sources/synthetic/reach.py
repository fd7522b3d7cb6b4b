"""The metrics of the best possible ranking of the synthetic dataset, and of ranking by popularity."""

from __future__ import annotations

from typing import Any

import numpy as np

from trec_twotower.data.sources.synthetic.interaction_model import InteractionModel

SAMPLED_USERS = 20_000
CUTOFFS = {"recall": (10, 20, 50, 100), "ndcg": (10, 20)}


def reachable(model: InteractionModel, train_count: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the test metrics of ranking by the true probability and of ranking by popularity.

    Both exclude the user's history. `expected_recall@k` is the true probability that the next item is
    among the best k, averaged over the users: the realised recall differs from it by sampling alone.
    """
    users = np.arange(model.options.users)
    if len(users) > SAMPLED_USERS:
        chosen = np.random.default_rng(model.options.seed).choice(len(users), SAMPLED_USERS, replace=False)
        users = np.sort(chosen)
    place = np.empty(len(train_count), np.int64)
    place[np.lexsort((model.item_id, -train_count))] = np.arange(len(train_count))

    best_ranks, popular_ranks, reach = [], [], []
    for start in range(0, len(users), 512):
        events = model.events(users[start : start + 512])
        events = events.only(events.is_tested)
        if not len(events.user):
            continue
        test_item = events.item[events.offsets[1:] - 1]
        owner = events.owner
        in_history = np.arange(len(events.item)) != events.offsets[1:][owner] - 1
        owner, seen_item = owner[in_history], events.item[in_history]
        before = place[seen_item] < place[test_item][owner]
        popular_ranks.append(place[test_item] - np.bincount(owner[before], minlength=len(test_item)))
        rank, reached = _best_ranking(model, events.user, owner, seen_item, test_item)
        best_ranks.append(rank)
        reach.append(reached)

    if not best_ranks:
        return {}
    best_rank, popular_rank = np.concatenate(best_ranks), np.concatenate(popular_ranks)
    expected = np.concatenate(reach).mean(axis=0)
    about = {"split": "test", "users_sampled": len(best_rank)}
    return {
        "best_reachable": about
        | _metrics(best_rank)
        | {f"expected_recall@{k}": round(float(expected[k - 1]), 6) for k in CUTOFFS["recall"]},
        "popularity": about | _metrics(popular_rank),
    }


def _best_ranking(
    model: InteractionModel, user: np.ndarray, owner: np.ndarray, seen_item: np.ndarray, test_item: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the test item's rank from 0 by P(item | user), and the total probability of the best 1, 2, ... 100 items.

    Only the heads of the two clusters and of the whole catalogue can be among the best.
    A rank of 100 or more is returned as the number of items.
    """
    items = model.options.items
    depth = max(CUTOFFS["recall"]) + int(np.bincount(owner).max())
    main, second = (cluster[:, None] for cluster in model.interests(user))
    head = np.arange(depth)[None, :]
    popular = model.by_global_share[:depth]
    candidates, is_real = [], []
    for cluster in (main, second):
        item = model.cluster_starts[cluster] + head
        is_real.append(item < model.cluster_starts[cluster + 1])
        candidates.append(np.minimum(item, items - 1))
    popular_item = np.broadcast_to(popular, (len(user), len(popular)))
    candidates.append(popular_item)
    is_real.append((model.cluster_of[popular_item] != main) & (model.cluster_of[popular_item] != second))
    candidate, real = np.concatenate(candidates, axis=1), np.concatenate(is_real, axis=1)

    row = np.arange(len(user))[:, None]
    real &= ~np.isin(row * items + candidate, owner * items + seen_item)
    chance = np.where(real, model.probability(candidate, main, second), -1.0)
    order = np.argsort(-chance, axis=1, kind="stable")[:, : max(CUTOFFS["recall"])]
    best, chance = np.take_along_axis(candidate, order, axis=1), np.take_along_axis(chance, order, axis=1)
    is_test = (best == test_item[:, None]) & (chance > 0)
    rank = np.where(is_test.any(axis=1), is_test.argmax(axis=1), items)

    seen_chance = np.bincount(
        owner, model.probability(seen_item, main[owner, 0], second[owner, 0]), minlength=len(user)
    )
    chance = np.maximum(chance, 0)
    short = max(CUTOFFS["recall"]) - chance.shape[1]  # a catalogue smaller than the largest cutoff
    chance = np.pad(chance, ((0, 0), (0, max(0, short))))
    return rank, np.cumsum(chance, axis=1) / (1 - seen_chance)[:, None]


def _metrics(rank: np.ndarray) -> dict[str, float]:
    """Return recall (hit rate) and NDCG for one held-out item per user."""
    recall = {f"recall@{k}": float((rank < k).mean()) for k in CUTOFFS["recall"]}
    gain = 1 / np.log2(rank + 2.0)
    ndcg = {f"ndcg@{k}": float(np.where(rank < k, gain, 0).mean()) for k in CUTOFFS["ndcg"]}
    return {name: round(value, 6) for name, value in (recall | ndcg).items()}
