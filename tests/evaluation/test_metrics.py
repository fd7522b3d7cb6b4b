import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trec_twotower.config.evaluation import METRICS
from trec_twotower.evaluation.metrics import (
    DRAWN_TOGETHER,
    Hits,
    MetricSums,
    list_metrics,
    mean_metrics,
    popularity_ranking,
    ranking_metrics,
    resampled_sums,
)
from trec_twotower.ops.ragged import Ragged
from trec_twotower.ops.topk import blocks_by_length, find_repeats


def metrics_written_out(ranked, positives, k):
    """The definitions, one user at a time, with sets and loops."""
    goal = set(positives)
    found = [rank for rank, item in enumerate(ranked[:k], start=1) if item in goal]
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(goal)) + 1))
    return {
        f"recall@{k}": len(found) / len(goal),
        f"ndcg@{k}": sum(1 / math.log2(rank + 1) for rank in found) / ideal,
        f"hit@{k}": 1.0 if found else 0.0,
        f"mrr@{k}": 1 / found[0] if found else 0.0,
        f"map@{k}": sum(place / rank for place, rank in enumerate(found, start=1)) / min(k, len(goal)),
        f"precision@{k}": len(found) / k,
    }


def test_metrics_of_one_user_by_hand():
    """Items 5 3 8 9 ranked, 3 9 1 to find: hits at ranks 2 and 4."""
    metrics = ranking_metrics(np.array([[5, 3, 8, 9]]), Ragged.from_lists([[9, 1, 3]]), [1, 2, 4])
    assert {name: value[0] for name, value in metrics.items() if name.endswith("@1")} == {
        "recall@1": 0.0, "ndcg@1": 0.0, "hit@1": 0.0, "mrr@1": 0.0, "map@1": 0.0, "precision@1": 0.0
    }  # fmt: skip
    assert metrics["recall@2"][0] == 1 / 3 and metrics["precision@2"][0] == 1 / 2
    assert metrics["recall@4"][0] == 2 / 3 and metrics["hit@4"][0] == 1.0 and metrics["mrr@4"][0] == 1 / 2
    assert metrics["map@4"][0] == (1 / 2 + 2 / 4) / 3 and metrics["map@2"][0] == (1 / 2) / 2
    # 0.63093 = 1 / log2(3), 0.43068 = 1 / log2(5); ideal of two 1.63093, of three 2.13093
    assert metrics["ndcg@2"][0] == pytest.approx(0.63093 / 1.63093, abs=1e-5)
    assert metrics["ndcg@4"][0] == pytest.approx((0.63093 + 0.43068) / 2.13093, abs=1e-5)


def test_recall_divides_by_all_positives_also_when_they_exceed_k():
    metrics = ranking_metrics(np.array([[0, 1]]), Ragged.from_lists([range(10)]), [2])
    assert metrics["recall@2"][0] == 0.2
    assert metrics["ndcg@2"][0] == pytest.approx(1.0)


def test_a_positive_given_twice_counts_once():
    once, twice = (
        ranking_metrics(np.array([[4, 2, 7]]), Ragged.from_lists([wanted]), [3]) for wanted in ([7, 1], [7, 1, 7, 1, 1])
    )
    assert once == twice


def test_no_item_is_a_miss_even_for_a_user_who_wants_row_zero():
    metrics = ranking_metrics(np.array([[-1, -1, 0], [-1, -1, -1]]), Ragged.from_lists([[0], [0]]), [3])
    assert metrics["mrr@3"].tolist() == [1 / 3, 0.0]


def test_columns_a_ranking_lacks_are_misses():
    metrics = ranking_metrics(np.array([[3]]), Ragged.from_lists([[3, 4]]), [10])
    assert metrics["precision@10"][0] == 0.1 and metrics["recall@10"][0] == 0.5
    empty = ranking_metrics(np.empty((1, 0), dtype=np.int64), Ragged.from_lists([[3]]), [10])
    assert all(value.tolist() == [0.0] for value in empty.values())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_metrics_equal_the_definitions_written_out(data):
    num_users = data.draw(st.integers(1, 5))
    length = data.draw(st.integers(1, 12))
    items = st.integers(0, 15)
    ranked = [data.draw(st.lists(items, min_size=length, max_size=length, unique=True)) for _ in range(num_users)]
    cuts = [data.draw(st.integers(0, length)) for _ in range(num_users)]
    wanted = [data.draw(st.lists(items, min_size=1, max_size=20)) for _ in range(num_users)]
    ks = data.draw(st.lists(st.integers(1, 15), min_size=1, max_size=3, unique=True))
    item_row_BK = np.array([row[:cut] + [-1] * (length - cut) for row, cut in zip(ranked, cuts, strict=True)])
    metrics = ranking_metrics(item_row_BK, Ragged.from_lists(wanted), ks)
    assert metrics.keys() == {f"{name}@{k}" for name in METRICS for k in ks}
    for k in ks:
        for user in range(num_users):
            for name, expected in metrics_written_out(ranked[user][: cuts[user]], wanted[user], k).items():
                assert metrics[name].dtype == np.float64
                assert metrics[name][user] == pytest.approx(expected, abs=1e-12)


def test_metrics_of_many_users_equal_the_definitions_written_out():
    rng = np.random.default_rng(0)
    item_row_BK = np.array([rng.permutation(200)[:50] for _ in range(400)])
    wanted = [rng.integers(0, 200, size=rng.integers(1, 60)).tolist() for _ in range(400)]
    means = mean_metrics(ranking_metrics(item_row_BK, Ragged.from_lists(wanted), [10, 50]))
    for k in (10, 50):
        each = [metrics_written_out(row, want, k) for row, want in zip(item_row_BK.tolist(), wanted, strict=True)]
        for name in each[0]:
            assert means[name] == pytest.approx(math.fsum(one[name] for one in each) / 400, abs=1e-9)


def test_a_ranking_with_an_item_twice_is_void():
    with pytest.raises(ValueError, match=r"1 of 2 rankings contain an item twice, the first is row 1"):
        ranking_metrics(np.array([[1, 2, -1, -1], [5, 3, 3, -1]]), Ragged.from_lists([[1], [1]]), [4])


def test_a_repeat_beyond_the_longest_k_is_not_looked_at():
    metrics = ranking_metrics(np.array([[5, 3, 5]]), Ragged.from_lists([[3]]), [2])
    assert metrics["recall@2"].tolist() == [1.0] and metrics["mrr@2"].tolist() == [0.5]


def test_a_user_without_positives_is_refused():
    with pytest.raises(ValueError, match=r"1 of 2 users have no positives, the first is row 1"):
        ranking_metrics(np.array([[1], [2]]), Ragged.from_lists([[1], []]), [1])


def test_rankings_and_positives_must_be_of_the_same_users():
    with pytest.raises(ValueError, match="2 rankings against the positives of 1 users"):
        ranking_metrics(np.array([[1], [2]]), Ragged.from_lists([[1]]), [1])
    with pytest.raises(ValueError, match=r"k = \[0, 5\]"):
        ranking_metrics(np.array([[1]]), Ragged.from_lists([[1]]), [0, 5])


def test_sums_over_blocks_and_ranks_give_the_mean_over_all_users():
    rng = np.random.default_rng(1)
    recall_B = rng.random(100)
    ranks = [MetricSums(), MetricSums(), MetricSums()]  # the third had no users
    for rank, parts in ((0, (slice(0, 7), slice(7, 40))), (1, (slice(40, 100),))):
        for part in parts:
            ranks[rank].add({"recall@5": recall_B[part], "hit@5": recall_B[part] > 0.5})
    total = MetricSums()
    for rank in ranks:
        total.merge(rank)
    assert total.num_users == 100
    assert total.means()["recall@5"] == pytest.approx(recall_B.mean(), abs=1e-12)
    assert total.means()["hit@5"] == pytest.approx((recall_B > 0.5).mean(), abs=1e-12)
    assert ranks[0].num_users == 40, "merging leaves the other as it was"


def test_a_mean_over_no_user_is_refused():
    with pytest.raises(ValueError, match="no user to average over"):
        MetricSums().means()


# ---------------------------------------------------------------- what lists are like, and how sure a mean is


def test_metrics_among_some_items_are_those_of_users_who_want_only_these():
    rng = np.random.default_rng(4)
    item_row_BK = np.array([rng.permutation(30)[:12] for _ in range(50)])
    item_row_BK[3, 5:] = -1
    wanted = [rng.integers(0, 30, size=rng.integers(1, 8)).tolist() for _ in range(50)]
    is_among_I = np.arange(30) % 3 == 0
    found = Hits.of(item_row_BK, Ragged.from_lists(wanted)).metrics_among(item_row_BK, is_among_I, [5, 12])
    left = [(row, [item for item in want if item % 3 == 0]) for row, want in zip(item_row_BK, wanted, strict=True)]
    left = [(row, want) for row, want in left if want]
    assert 20 < len(left) < 50
    for k in (5, 12):
        expected = [metrics_written_out(row.tolist(), want, k) for row, want in left]
        for name in expected[0]:
            assert found[name] == pytest.approx([each[name] for each in expected], abs=1e-12)


def lists_written_out(ranked, k, count, vectors):
    """The definitions, an item and a pair at a time; None where there is nothing to tell."""
    items = [item for item in ranked[:k] if item >= 0]
    total = sum(count) + len(count)

    def cosine(one, other):
        lengths = math.hypot(*one) * math.hypot(*other)
        return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0

    pairs = [(a, b) for place, a in enumerate(items) for b in items[place + 1 :]]
    return {
        "popularity": sum(count[item] for item in items) / len(items) if items else None,
        "novelty": sum(-math.log2((count[item] + 1) / total) for item in items) / len(items) if items else None,
        "diversity": sum(1 - cosine(vectors[a], vectors[b]) for a, b in pairs) / len(pairs) if pairs else None,
    }


def test_what_lists_are_like_equals_the_definitions_written_out(monkeypatch):
    monkeypatch.setattr("trec_twotower.evaluation.metrics.MAX_CELLS", 200)  # several blocks
    rng = np.random.default_rng(5)
    count_I, item_ID = rng.integers(0, 50, size=40), rng.normal(size=(40, 6)).astype(np.float32)
    item_ID[7] = 0  # an item without a direction
    item_row_BK = np.array([rng.permutation(40)[:10] for _ in range(30)])
    item_row_BK[4, :3] = [7, 1, 2]
    for user, length in ((0, 0), (1, 1), (2, 2), (3, 7)):
        item_row_BK[user, length:] = -1
    found = list_metrics(item_row_BK, [1, 4, 10], count_I, item_ID)
    for k in (1, 4, 10):
        for user, ranked in enumerate(item_row_BK.tolist()):
            for name, expected in lists_written_out(ranked, k, count_I.tolist(), item_ID.tolist()).items():
                value = found[f"{name}@{k}"][user]
                assert np.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-6)


def test_resampled_means_spread_as_draws_with_replacement_do():
    """The second way draws whole samples of the users, as the bootstrap was first told (Efron 1979)."""
    rng = np.random.default_rng(6)
    value_BM = np.stack([rng.random(1500) < 0.2, rng.exponential(size=1500)], axis=1).astype(float)
    sums = resampled_sums(value_BM, 0, 2000)
    means = sums[:, 0] / sums[:, 1]
    plain = np.array([value_BM[rng.integers(0, 1500, size=1500)].mean(axis=0) for _ in range(2000)])
    for column in range(2):
        ends, expected = (np.percentile(each[:, column], [2.5, 97.5]) for each in (means, plain))
        assert ends == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
    # Both metrics are of the same draws, or no difference between contenders could be judged.
    assert np.array_equal(sums[:, 1, 0], sums[:, 1, 1]) and len(np.unique(sums[:, 1, 0])) > 50
    again = resampled_sums(value_BM, 0, 5)
    assert np.array_equal(again[:, 1], resampled_sums(value_BM * 7, 0, 5)[:, 1])


def test_intervals_hold_the_truth_as_often_as_they_say():
    """400 samples of 300 users whose metric is 1 with probability .3: 95 of 100 intervals hold .3."""
    rng = np.random.default_rng(7)
    value_BM = (rng.random((300, 400)) < 0.3).astype(float)
    sums = resampled_sums(value_BM, 0, 1000)
    low_M, high_M = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5], axis=0)
    assert 0.92 <= np.mean((low_M <= 0.3) & (high_M >= 0.3)) <= 0.975


def test_resampled_sums_do_not_depend_on_how_the_users_are_shared():
    value_BM = np.random.default_rng(8).random((2 * DRAWN_TOGETHER + 100, 3))
    value_BM[5, 1] = np.nan
    whole = resampled_sums(value_BM, 0, 7)
    for ends in ([0, 1000, 1001, len(value_BM)], [0, DRAWN_TOGETHER, len(value_BM)], [0, 0, len(value_BM)]):
        shares = [resampled_sums(value_BM[a:b], a, 7) for a, b in itertools.pairwise(ends)]
        assert sum(shares) == pytest.approx(whole, rel=1e-12)
    without = np.delete(value_BM[:, 1], 5)
    assert np.isfinite(whole).all() and (whole[:, 1, 1] <= whole[:, 1, 0]).all()
    assert whole[:, 0, 1].mean() == pytest.approx(without.sum(), rel=0.1)


ragged = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(ragged, st.data())
def test_lists_behave_as_the_lists_they_stand_for(lists, data):
    held = Ragged.from_lists(lists)

    def as_lists(each):
        return [each.values[a:b].tolist() for a, b in zip(each.offsets, each.offsets[1:], strict=False)]

    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    assert len(held) == len(lists) and as_lists(held) == lists
    assert held.lengths.tolist() == [len(each) for each in lists]
    assert held.rows.tolist() == [user for user, each in enumerate(lists) for _ in each]
    assert as_lists(held.take(np.array(rows, dtype=np.int64))) == [lists[row] for row in rows]
    assert as_lists(held.distinct()) == [sorted(set(each)) for each in lists]
    asked = np.array([data.draw(st.lists(st.integers(-1, 12), min_size=4, max_size=4)) for _ in lists])
    assert held.contain(asked).tolist() == [
        [item in each for item in row] for each, row in zip(lists, asked.tolist(), strict=True)
    ]


def test_no_item_is_on_no_list_even_one_that_holds_minus_one():
    lists = Ragged.from_lists([[-1, 2], [-1]])
    assert lists.contain(np.array([[-1, 2], [-1, 3]])).tolist() == [[False, True], [False, False]]


def test_repeats_are_the_later_ones():
    assert find_repeats(np.array([[3, 1, 3, 3], [-1, -1, 0, 0]])).tolist() == [
        [False, False, True, True],
        [False, False, False, True],
    ]


def test_blocks_cover_every_user_once_and_bound_their_cells(monkeypatch):
    monkeypatch.setattr("trec_twotower.ops.topk.MAX_CELLS", 500)
    lengths = np.random.default_rng(2).integers(0, 1000, size=300)
    lengths[5] = 100_000
    blocks = list(blocks_by_length(lengths, extra=10))
    assert sorted(np.concatenate(blocks).tolist()) == list(range(300))
    for users in blocks:
        widest = lengths[users].max() + 10
        assert len(users) == 1 or widest * len(users) <= 500
        assert widest <= 2 * (lengths[users].min() + 10)


def test_popularity_leaves_out_what_each_user_has_seen():
    count_I = np.array([5, 9, 1, 9, 0])  # order: 1 3 0 2 4
    seen = Ragged.from_lists([[], [1, 0], [0, 1, 2, 3], [4, 4, 3]])
    assert popularity_ranking(count_I, seen, 3).tolist() == [[1, 3, 0], [3, 2, 4], [4, -1, -1], [1, 0, 2]]


def test_popularity_equals_a_loop_over_users(monkeypatch):
    monkeypatch.setattr("trec_twotower.ops.topk.MAX_CELLS", 1000)  # many blocks
    rng = np.random.default_rng(3)
    count_I = rng.integers(0, 20, size=150)
    seen = [rng.integers(0, 150, size=size).tolist() for size in (0, 3, 150, 40, 400, 10, 10, 75)]
    order = sorted(range(150), key=lambda item: (-count_I[item], item))
    for k in (1, 20, 200):
        expected = [[item for item in order if item not in set(each)][:k] for each in seen]
        expected = [each + [-1] * (k - len(each)) for each in expected]
        assert popularity_ranking(count_I, Ragged.from_lists(seen), k).tolist() == expected


def test_metrics_are_those_of_trec_eval(rng):
    """An independent library, of which only the users' means are asked for."""
    ir_measures = pytest.importorskip("ir_measures")
    users, items, ks = 40, 60, (1, 5, 20)
    ranked = np.stack([rng.permutation(items)[: max(ks)] for _ in range(users)])
    positives = [rng.choice(items, rng.integers(1, 25), replace=False) for _ in range(users)]
    ours = mean_metrics(ranking_metrics(ranked, Ragged.from_lists(positives), ks))
    wanted = {str(user): {str(item): 1 for item in taken} for user, taken in enumerate(positives)}
    run = {str(user): {str(item): float(-place) for place, item in enumerate(row)} for user, row in enumerate(ranked)}
    measures = {"recall": "R", "ndcg": "nDCG", "hit": "Success", "mrr": "RR", "precision": "P"}
    theirs = {(name, k): ir_measures.parse_measure(f"{word}@{k}") for name, word in measures.items() for k in ks}
    means = ir_measures.calc_aggregate(list(theirs.values()), wanted, run)
    for (name, k), measure in theirs.items():
        assert ours[f"{name}@{k}"] == pytest.approx(means[measure], abs=1e-12), measure
    # Its average precision divides by all positives, ours by as many as k places could hold
    [precision] = [ir_measures.parse_measure(f"AP@{ks[-1]}")]
    few = [user for user, taken in enumerate(positives) if len(taken) <= ks[-1]]
    each = {found.query_id: found.value for found in ir_measures.iter_calc([precision], wanted, run)}
    of_ours = ranking_metrics(ranked, Ragged.from_lists(positives), ks)[f"map@{ks[-1]}"]
    assert [of_ours[user] for user in few] == pytest.approx([each[str(user)] for user in few], abs=1e-12)
