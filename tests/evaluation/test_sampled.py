"""Metrics over drawn negatives: each positive's place among them, the same whoever is judged and on how many ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trec_twotower.evaluation.sampled_metrics import Negatives, sampled_metrics
from trec_twotower.ops.ragged import Ragged


def test_a_negative_is_of_the_positives_own_part_and_neither_seen_nor_to_find():
    """Parts {0, 1, 2} and {3, 4}: of the first only item 1 may stand beside 0, item 2 is seen; of the second only 3."""
    item_ID = np.array([[5.0], [7.0], [100.0], [1.0], [2.0]])
    user_BD = np.ones((1, 1))
    negatives = Negatives.same("same kind", np.array([0, 0, 0, 1, 1]), 4)
    places = negatives.ranks(item_ID, user_BD, Ragged.from_lists([[0, 4]]), Ragged.from_lists([[2]]), 0)
    assert places.tolist() == [5.0, 1.0]  # all four draws are item 1, which is better; all four item 3, which is worse


def test_a_positive_with_nothing_beside_it_comes_first_and_ties_count_half():
    alone = Negatives.same("same kind", np.array([0, 1, 1]), 9)
    item_ID = np.array([[1.0], [2.0], [2.0]])
    places = alone.ranks(item_ID, np.ones((1, 1)), Ragged.from_lists([[0, 1]]), Ragged.empty(1), 0)
    assert places.tolist() == [1.0, 1 + 9 / 2]


def test_the_mean_place_is_that_of_the_better_items_share(rng):
    """Of 1000 items 30 are better: among n uniform draws the place is 1 + 30/998 n on average (one item is seen)."""
    item_ID = np.arange(1000.0)[:, None]
    users, count = 400, 50
    positives, seen = Ragged.from_lists([[969]] * users), Ragged.from_lists([[5]] * users)
    places = Negatives.uniform(1000, count).ranks(item_ID, np.ones((users, 1)), positives, seen, 0)
    share = 30 / 998
    assert places.mean() == pytest.approx(1 + count * share, abs=4 * math.sqrt(count * share / users))
    assert len(set(places.tolist())) > 3  # not the same draws for everybody


def test_a_users_draws_do_not_depend_on_who_is_beside_him(rng):
    item_ID, user_BD = rng.normal(size=(200, 8)), rng.normal(size=(30, 8))
    positives = Ragged.from_lists([rng.choice(200, 3, replace=False) for _ in range(30)])
    seen = Ragged.from_lists([rng.choice(200, 5) for _ in range(30)])
    negatives = Negatives.uniform(200, 20)
    whole = negatives.ranks(item_ID, user_BD, positives, seen, 100)
    rest = np.arange(12, 30)
    part = negatives.ranks(item_ID, user_BD[12:], positives.take(rest), seen.take(rest), 112)
    assert part.tolist() == whole[36:].tolist()


def test_of_several_vectors_the_one_that_scores_an_item_highest_counts(rng):
    item_ID, user_BMD = rng.normal(size=(50, 4)), rng.normal(size=(9, 3, 4))
    positives, seen = Ragged.from_lists([[user] for user in range(9)]), Ragged.empty(9)
    negatives = Negatives.uniform(50, 200)
    places = negatives.ranks(item_ID, user_BMD, positives, seen, 0)
    best_BI = (user_BMD @ item_ID.T).max(axis=1)
    share = [(best_BI[user] > best_BI[user, user]).sum() / 49 for user in range(9)]
    assert (places - 1) / 200 == pytest.approx(share, abs=4 * math.sqrt(0.25 / 200))


def test_metrics_of_places_by_hand():
    """A user with items at places 1 and 3, one with an item at 11."""
    metrics = sampled_metrics(np.array([1.0, 3.0, 11.0]), Ragged.from_lists([[7, 8], [9]]), [2, 10])
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "hit@2": [0.5, 0.0], "ndcg@2": [0.5, 0.0], "hit@10": [1.0, 0.0], "ndcg@10": [0.75, 0.0],
        "mrr": [(1 + 1 / 3) / 2, 1 / 11],
    }  # fmt: skip
