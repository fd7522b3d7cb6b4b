"""Searching among some of the items: by every strategy, with seen items, and never short of what there is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tests.index.test_index import clustered, settings
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import build_index, filters, mask_of
from trec_twotower.index.filters import choose_strategy
from trec_twotower.ops.ragged import Ragged

STRATEGIES = ("exact", "selector", None)


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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("share", [0.002, 0.05, 0.6])
def test_allowed_items_alone_are_found_as_well_as_all_are(world, strategy, share):
    item_ID, user_BD, index = world
    mask_I = np.random.default_rng(5).random(len(item_ID)) < share
    allowed = index.allow(mask_I, strategy)
    _, found_BK = index.search(user_BD, 10, allowed=allowed)
    assert mask_I[found_BK].all()
    wanted = best_allowed(item_ID, user_BD, 10, mask_I)
    hits = [len(set(one) & set(other)) / 10 for one, other in zip(found_BK.tolist(), wanted, strict=True)]
    assert np.mean(hits) >= (1.0 if strategy == "exact" else 0.95)


def test_items_that_a_user_likes_less_than_chance_would_have_it_are_found(world):
    """A filter that knows of scores leaves few good items: lists chosen by its share alone would hold .4 of them."""
    item_ID, user_BD, index = world
    hits = []
    for user_1D in user_BD[:20, None]:
        mask_I = np.zeros(len(item_ID), bool)
        mask_I[np.argsort(-(item_ID @ user_1D[0]))[len(item_ID) // 5 : len(item_ID) // 2]] = True
        _, found_1K = index.search(user_1D, 10, allowed=index.allow(mask_I, "selector"))
        [wanted] = best_allowed(item_ID, user_1D, 10, mask_I)
        hits.append(len(set(found_1K[0].tolist()) & set(wanted)) / 10)
    assert np.mean(hits) >= 0.95


@pytest.mark.parametrize("factory", ["OPQ8_16,IVF16,SQfp16", "OPQ8_16,IVF16,SQ8,Refine(SQfp16)", "PCAR24,SQfp16"])
def test_few_allowed_items_are_scored_in_the_space_that_their_vectors_are_kept_in(factory):
    """Turned or cut by a transform, or as they were given, where the index has them to score the best again."""
    item_ID, user_QD = clustered(2_000, 300, spread=0.3)
    index = build_index(item_ID, user_QD, settings(factory=factory, target_recall=0.6))
    mask_I = np.zeros(len(item_ID), bool)
    mask_I[::40] = True
    _, found_BK = index.search(user_QD[:50], 5, allowed=index.allow(mask_I, "exact"))
    wanted = best_allowed(item_ID, user_QD[:50], 5, mask_I)
    hits = [len(set(one) & set(other)) / 5 for one, other in zip(found_BK.tolist(), wanted, strict=True)]
    assert np.mean(hits) >= (0.98 if "Refine" in factory else 0.7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_answer_is_never_short_of_items_that_there_are(world, strategy):
    """The allowed ones lie as far from the user as can be, and half of them are seen."""
    item_ID, user_BD, index = world
    for user_1D in (user_BD[:1], user_BD[7:8]):
        worst = np.argsort(item_ID @ user_1D[0])[:30]
        mask_I = np.zeros(len(item_ID), bool)
        mask_I[worst] = True
        seen = Ragged(np.array([0, 12]), worst[:12])
        _, (found_K,) = index.search(user_1D, 25, seen=seen, allowed=index.allow(mask_I, strategy))
        assert set(found_K[:18]) == set(worst[12:].tolist())
        assert found_K[18:].tolist() == [-1] * 7


def test_allowed_items_are_all_scored_where_they_are_no_more_than_a_search_scans(world):
    """The rule of docs/retrieval-index.md, from counts alone: the same strategy for the same filter, k and index."""
    item_ID, _, index = world
    for k in (1, 10, 20, 200):
        for num_allowed in (1, 15, 100, 400, 1_000, 3_000, 5_999):
            mask_I = np.zeros(len(item_ID), bool)
            mask_I[:num_allowed] = True
            allowed = index.allow(mask_I)
            tuned_k = min(each.k for each in index.report.efforts if each.k >= k)
            neighbours = min(round(tuned_k * len(item_ID) / num_allowed), len(item_ID))
            share = next(
                (each.scanned_share for each in index.report.efforts if each.k >= neighbours),
                min(1, index.report.efforts[-1].scanned_share * 2 ** np.ceil(np.log2(neighbours / 320))),
            )
            is_exact = num_allowed <= max(k, share * len(item_ID))
            assert index.strategy_of(allowed, k) == ("exact" if is_exact else "selector"), (k, num_allowed)
    few, many = (index.allow(np.arange(len(item_ID)) < count) for count in (30, 5_900))
    assert index.strategy_of(few, 20) == "exact" and index.strategy_of(many, 20) == "selector"


def test_vectors_too_many_to_keep_are_not_all_scored(world, monkeypatch):
    _, _, index = world
    allowed = index.allow(np.arange(6_000) < 100)
    assert choose_strategy(allowed, 10, 500, 32) == "exact"
    monkeypatch.setattr(filters, "KEPT_BYTES", 99 * 4 * 32)
    assert choose_strategy(allowed, 10, 500, 32) == "selector"
    assert choose_strategy(allowed, 100, 500, 32) == "exact", "all of them are asked for"


def test_vectors_of_allowed_items_are_read_once(world, monkeypatch):
    """Also for a k that was unknown when the filter was made; but not kept beyond a size."""
    item_ID, user_BD, index = world
    mask_I = np.random.default_rng(5).random(len(item_ID)) < 0.9
    calls, searcher = [], index._searcher
    read = searcher.vectors_of
    monkeypatch.setattr(searcher, "vectors_of", lambda rows: calls.append(len(rows)) or read(rows))
    allowed = index.allow(mask_I, "selector")
    assert not calls
    for _ in range(3):
        expected = index.search(user_BD[:3], int(mask_I.sum()), allowed=allowed)[1]
    assert calls == [mask_I.sum()]
    monkeypatch.setattr(filters, "KEPT_BYTES", 1000)
    large = index.allow(mask_I, "exact")
    np.testing.assert_array_equal(index.search(user_BD[:3], int(mask_I.sum()), allowed=large)[1], expected)
    assert len(calls) == 2 and not large.kept


def test_a_filter_says_what_it_wants(world):
    item_ID, _, index = world
    with pytest.raises(ConfigError, match=r"float64 of shape \(6000,\). Expected one bool for each of the 6,000 item"):
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


def test_integers_beyond_int64_are_found_where_the_column_has_them():
    large = pa.array([1, 2**63, 2**64 - 1], pa.uint64())
    assert mask_of(large, [2**64 - 1, 1], "item_id").tolist() == [True, False, True]
    assert mask_of(large, [str(2**63)], "item_id").tolist() == [False, True, False]
    for cells, value in (
        (pa.array([3, 5]), 2**63),
        (large, 2**64),
        (pa.array(["a"]), 2**63),
        (pa.array(["a"]), "\ud800"),
    ):
        with pytest.raises(ConfigError, match="filter on 'item_id'"):
            mask_of(cells, [value], "item_id")
