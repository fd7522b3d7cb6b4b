"""Searching among some of the items: by every way of doing it, with seen items, and never short of what there is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tests.test_index import clustered, settings
from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import build_index, mask_of

WAYS = ("exact", "selector", "overfetch", None)


@pytest.fixture(scope="module")
def world():
    item_ID, user_QD = clustered(6_000, 900, spread=0.3)
    return item_ID, user_QD[:60], build_index(item_ID, user_QD, settings(target_recall=0.97))


def best_allowed(item_ID, user_BD, k, mask_I, seen=None):
    """By float64 scores of all items, one user at a time."""
    rows = []
    for user, vector_D in enumerate(user_BD.astype(np.float64)):
        score_I = np.where(mask_I, item_ID.astype(np.float64) @ vector_D, -np.inf)
        if seen is not None:
            score_I[seen[user]] = -np.inf
        best = np.argsort(-score_I, kind="stable")[:k]
        rows.append([int(row) if np.isfinite(score_I[row]) else -1 for row in best])
    return rows


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.002, 0.05, 0.6])
def test_allowed_items_alone_are_found_as_well_as_all_are(world, way, share):
    item_ID, user_BD, index = world
    mask_I = np.random.default_rng(5).random(len(item_ID)) < share
    allowed = index.allow(mask_I, way)
    _, found_BK = index.search(user_BD, 10, allowed=allowed)
    assert mask_I[found_BK].all()
    wanted = best_allowed(item_ID, user_BD, 10, mask_I)
    hits = [len(set(one) & set(other)) / 10 for one, other in zip(found_BK.tolist(), wanted, strict=True)]
    assert np.mean(hits) >= (1.0 if way == "exact" else 0.93)


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_never_short_of_items_that_there_are(world, way):
    """The allowed ones lie as far from the user as can be, and half of them are seen."""
    item_ID, user_BD, index = world
    for user_1D in (user_BD[:1], user_BD[7:8]):
        worst = np.argsort(item_ID @ user_1D[0])[:30]
        mask_I = np.zeros(len(item_ID), bool)
        mask_I[worst] = True
        seen = Lists(np.array([0, 12]), worst[:12])
        _, (found_K,) = index.search(user_1D, 25, seen=seen, allowed=index.allow(mask_I, way))
        assert set(found_K[:18]) == set(worst[12:].tolist())
        assert found_K[18:].tolist() == [-1] * 7


def test_a_filter_says_what_it_wants(world):
    item_ID, _, index = world
    with pytest.raises(ConfigError, match=r"float64 of shape \(6000,\): give one bool for each of the 6,000 item rows"):
        index.allow(np.ones(len(item_ID)))
    with pytest.raises(ConfigError, match=r"bool of shape \(5,\)"):
        index.allow(np.ones(5, bool))
    with pytest.raises(DataError, match="allows none of the 6,000 items"):
        index.allow(np.zeros(len(item_ID), bool))


def test_columns_become_masks():
    words = pa.array(["mug", None, "cup", "mug"])
    assert mask_of(words, ["mug"], "kind").tolist() == [True, False, False, True]
    assert mask_of(words.dictionary_encode(), ["cup", "jar"], "kind").tolist() == [False, False, True, False]
    assert mask_of(pa.array([3, 5, 5]), ["5"], "size").tolist() == [False, True, True]
    lists = pa.array([["a", "b"], [], None, ["c", "a"]])
    assert mask_of(lists, ["a"], "tags").tolist() == [True, False, False, True]
    assert mask_of(lists.slice(1), ["c"], "tags").tolist() == [False, False, True]
    with pytest.raises(ConfigError, match=r"filter on 'size', a column of int64, has \['large'\]"):
        mask_of(pa.array([3, 5]), ["large"], "size")
