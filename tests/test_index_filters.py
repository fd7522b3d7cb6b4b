"""Searching among some of the items: by every way of doing it, with seen items, and never short of what there is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tests.test_index import clustered, settings
from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import build_index, filters, mask_of
from trec_twotower.index.filters import Race, likely_ways, num_to_fetch
from trec_twotower.index.probing import REACH, Fit

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


def test_the_fewer_are_allowed_the_more_is_scored_of_them():
    """All of a few; of many what is found as if all were allowed; and no way comes back once another took its place."""
    catalogue = SimpleNamespace(num_items=1_000_000, dim=64)
    fits = tuple(
        Fit(k, 0.0, (0.0,) * (1 + len(REACH)), 0.0, 300, share)
        for k, share in ((100, 0.02), (400, 0.025), (1600, 0.04))
    )
    for k in (10, 100, 400):
        first = [
            likely_ways(catalogue, fits, int(share * 1_000_000), k)[0]
            for share in np.geomspace(2 * k / 1e6, 0.999, 200)
        ]
        changes = [one for one, other in zip(["", *first], first, strict=False) if one != other]
        assert first[0] == "exact" and first[-1] == "overfetch" and len(changes) == len(set(first))
    wide = SimpleNamespace(num_items=1_000_000, dim=1024)
    assert "exact" in likely_ways(catalogue, fits, 30_000, 100)
    assert "exact" not in likely_ways(wide, fits, 30_000, 100), "scoring costs by the number of axes, asking does not"


def test_enough_is_fetched_in_all_but_few_searches(rng):
    """By drawing which of the neighbours are allowed."""
    for k, share in ((10, 0.5), (100, 0.1), (100, 0.9), (1, 0.02)):
        fetched = num_to_fetch(k, share)
        allowed = rng.binomial(fetched, share, size=100_000)
        assert (allowed < k).mean() < 0.002
        assert (rng.binomial(int(k / share), share, size=20_000) < k).mean() > 0.1, "as few as expected do not do"


def test_the_way_that_took_the_least_time_is_taken_from_then_on(world, monkeypatch):
    """By a clock that a slow way puts forward."""
    item_ID, user_BD, index = world
    mask_I = np.random.default_rng(5).random(len(item_ID)) < 0.3
    clock, by_way, taken = [0.0], type(index)._by_way, []
    monkeypatch.setattr("trec_twotower.index.search.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr("trec_twotower.index.search.likely_ways", lambda *_: ["exact", "overfetch", "selector"])

    def slow(self, way, *rest):
        clock[0] += {"exact": 3, "selector": 1, "overfetch": 2}[way]
        taken.append(way)
        return by_way(self, way, *rest)

    monkeypatch.setattr(type(index), "_by_way", slow)
    allowed = index.allow(mask_I)
    assert index.way_of(allowed, 10) == "exact", "what is likeliest, as long as nothing is known"
    for number in range(32):
        index.search(user_BD[number : number + 1], 10, allowed=allowed)
    assert sorted(taken[:27]) == sorted(9 * ["exact", "selector", "overfetch"]) and set(taken[27:]) == {"selector"}
    assert index.way_of(allowed, 10) == "selector"
    assert index.way_of(allowed, 11) == "exact", "of another k nothing is known"


def test_a_single_likely_way_is_not_timed():
    assert Race(["overfetch"]).next_way() == ("overfetch", False)


def test_vectors_of_allowed_items_are_read_once(world, monkeypatch):
    """Also for a k of which nobody knew when the filter was made; but not kept beyond a size."""
    item_ID, user_BD, index = world
    mask_I = np.random.default_rng(5).random(len(item_ID)) < 0.9
    calls, scanner = [], index._scanner
    read = scanner.vectors_of
    monkeypatch.setattr(scanner, "vectors_of", lambda rows: calls.append(len(rows)) or read(rows))
    allowed = index.allow(mask_I, "overfetch")
    assert not calls
    for number in range(3):
        index.search(user_BD[number : number + 1], int(mask_I.sum()), allowed=allowed)
    assert calls == [mask_I.sum()]
    monkeypatch.setattr(filters, "KEPT_BYTES", 1000)
    large = index.allow(mask_I, "exact")
    index.search(user_BD[:1], 10, allowed=large)
    assert len(calls) == 3 and not large.kept


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
