"""Equal scores come by item row, whatever k is, whoever else is in the batch, and however the items are searched."""

from __future__ import annotations

import numpy as np
import pytest

from tests.index.test_index import settings
from trec_twotower.index import ExactItems, build_index, exact, exact_search
from trec_twotower.ops.ragged import Ragged
from trec_twotower.serving.business_rules import Rules, apply_rules

KINDS = (
    ("Flat", 1),
    ("Flat", 3),
    ("SQfp16", 1),
    ("IVF20,Flat", 1),
    ("IVF20,SQfp16", 1),
    ("IVF20,SQfp16", 3),
    ("IVF20,SQ8", 1),
    ("IVF20_HNSW32,SQfp16", 1),
    ("IVF20,PQ8", 1),
    ("IVF20,PQ8x4fs,Refine(SQfp16)", 1),
    ("IVF20,PQ8x4fs,RFlat", 2),
    ("OPQ8_16,IVF20,SQfp16", 1),
    ("PCA14,Flat", 1),
    ("RR16,IVF20,SQ8,Refine(SQfp16)", 2),
    ("HNSW16", 1),
)
LOSSY = ("PQ8", "PCA14", "SQ8")  # codes by which other items may score the same


@pytest.fixture(scope="module")
def world():
    """2,000 items of 300 vectors in half precision, which no kind but coarse codes rounds; one user is all zeros."""
    rng = np.random.default_rng(0)
    distinct_CD = rng.standard_normal((300, 16))
    distinct_CD /= np.linalg.norm(distinct_CD, axis=1, keepdims=True)
    which_I = rng.integers(0, 300, 2_000)
    user_BD = rng.standard_normal((400, 16))
    user_BD /= np.linalg.norm(user_BD, axis=1, keepdims=True)
    user_BD[7] = 0
    return distinct_CD.astype(np.float16).astype(np.float32)[which_I], user_BD.astype(np.float32), which_I


def best_by_row(item_ID, user_BD, k, which_I, excluded=None):
    """By float64 scores of the distinct vectors, one user at a time, in Python."""
    answers = []
    for user, vector_D in enumerate(user_BD.astype(np.float64)):
        score_I = item_ID.astype(np.float64) @ vector_D
        score_C = {int(which): score_I[row] for row, which in enumerate(which_I)}  # one score per distinct vector
        left = range(len(item_ID)) if excluded is None else sorted(set(range(len(item_ID))) - set(excluded[user]))
        answers.append(sorted(left, key=lambda row: (-score_C[int(which_I[row])], row))[:k])
    return answers


def assert_equals_by_row(score_BK, item_row_BK):
    """Whatever was found: scores fall, and among equal scores rows rise."""
    for score_K, row_K in zip(score_BK, item_row_BK, strict=True):
        score_K, row_K = score_K[row_K >= 0], row_K[row_K >= 0]
        assert (np.diff(score_K) <= 0).all()
        assert (np.diff(row_K)[np.diff(score_K) == 0] > 0).all()
        assert len(set(row_K.tolist())) == len(row_K)


@pytest.fixture(scope="module", params=KINDS, ids=[f"{factory}-{shards}" for factory, shards in KINDS])
def index(request, world):
    factory, shards = request.param
    item_ID, user_BD, _ = world
    return build_index(item_ID, user_BD, settings(factory=factory, shards=shards, target_recall=0.5, k=50))


@pytest.mark.parametrize("strategy", [None, "exact", "selector", "unfiltered"])
def test_an_answer_is_the_head_of_every_longer_one_alone_and_in_any_batch(world, index, strategy):
    user_BD = world[1][:60]
    rng = np.random.default_rng(1)
    seen = Ragged.from_lists([rng.integers(0, 2_000, size).tolist() for size in rng.integers(0, 40, 60)])
    mask_I = rng.random(2_000) < 0.4
    allowed = None if strategy == "unfiltered" else index.allow(mask_I, strategy)
    for lists in (None, seen):
        score_BK, longest_BK = index.search(user_BD, 50, seen=lists, allowed=allowed)
        assert_equals_by_row(score_BK, longest_BK)
        for k in (1, 2, 7, 10, 20, 33, 49):
            found = index.search(user_BD, k, seen=lists, allowed=allowed)
            np.testing.assert_array_equal(found[1], longest_BK[:, :k])
            np.testing.assert_array_equal(found[0], score_BK[:, :k])
        for size, stop in ((1, 12), (17, 60)):
            for start in range(0, stop, size):
                users = np.arange(start, min(start + size, 60))
                some = None if lists is None else lists.take(users)
                found = index.search(user_BD[users], 20, seen=some, allowed=allowed)
                np.testing.assert_array_equal(found[1], longest_BK[users, :20])


def test_copies_of_a_vector_come_by_row_up_to_the_whole_catalogue(world, index):
    """Each distinct vector's copies in rising order: of those found, none is skipped for a later one.

    A graph may miss copies. A linear transform may round equal vectors differently: BLAS has other kernels for the last
    rows of a block.
    """
    _, user_BD, which_I = world
    is_exempt = index.report.kind.startswith(("HNSW", "PCA", "OPQ", "RR"))
    for k in (20, 50, 300, 2_000):
        score_BK, item_row_BK = index.search(user_BD[:20], k)
        assert_equals_by_row(score_BK, item_row_BK)
        for row_K in item_row_BK:
            for which in set(which_I[row_K].tolist()):
                copies = np.flatnonzero(which_I == which)
                found = row_K[which_I[row_K] == which]
                assert is_exempt or (found == copies[: len(found)]).all()
    assert (np.sort(item_row_BK, axis=1) == np.arange(2_000)).all()


@pytest.mark.parametrize("k", [1, 10, 20, 50, 333, 2_000])
def test_an_index_that_scans_everything_answers_as_exact_search_does(world, index, k):
    item_ID, user_BD, which_I = world
    if any(word in index.report.kind for word in LOSSY):
        pytest.skip("other scores than those of the vectors")
    effort = index._searcher.everything(2_000)
    found = index._searcher.search(user_BD[:12], k, effort)[1]
    np.testing.assert_array_equal(found, best_by_row(item_ID, user_BD[:12], k, which_I))


@pytest.mark.parametrize("num_users", [1, 2, 5, 40])
@pytest.mark.parametrize("k", [1, 10, 333, 2_000, 2_100])
def test_exact_search_orders_equals_by_row(world, monkeypatch, num_users, k):
    """By FAISS's loop and by BLAS, in one block of candidates and in many, by torch, with seen items and by pieces."""
    item_ID, user_BD, which_I = world
    user_BD = user_BD[:num_users]
    expected = np.full((num_users, k), -1)
    expected[:, : min(k, 2_000)] = best_by_row(item_ID, user_BD, k, which_I)
    on_torch = ExactItems(item_ID)
    monkeypatch.setattr(on_torch, "candidates", on_torch.torch_candidates)
    monkeypatch.setattr(exact, "ITEM_BLOCK", 700)
    pieces = exact.RunningBest(user_BD, k)
    for start in range(0, 2_000, 650):
        pieces.add(item_ID[start : start + 650], start)
    found = {
        "numpy": exact_search(item_ID, user_BD, k, device="cpu")[1],
        "loop": exact_search(ExactItems(item_ID, blas_batch=100), user_BD, k)[1],
        "torch": exact_search(on_torch, user_BD, k)[1],
        "pieces": pieces.item_row_BK,
    }
    monkeypatch.setattr(exact, "MAX_CELLS", 3_000)
    found["blocks"] = exact_search(item_ID, user_BD, k, device="cpu")[1]
    for name, item_row_BK in found.items():
        np.testing.assert_array_equal(item_row_BK, expected, err_msg=name)
    rng = np.random.default_rng(2)
    seen = [rng.integers(0, 2_000, size).tolist() for size in rng.integers(0, 1_500, num_users)]
    rows = best_by_row(item_ID, user_BD, k, which_I, seen)
    item_row_BK = exact_search(item_ID, user_BD, k, Ragged.from_lists(seen), device="cpu")[1]
    for found_K, wanted in zip(item_row_BK, rows, strict=True):
        assert found_K[: len(wanted)].tolist() == wanted and (found_K[len(wanted) :] == -1).all()


def test_users_of_several_vectors_get_equals_by_row(world, index):
    user_BD = world[1]
    user_BMD = np.stack([user_BD[:15], user_BD[:15], user_BD[20:35]], axis=1)  # one vector twice: every score ties
    longest_BK = index.search_merged(user_BMD, 50)[1]
    assert_equals_by_row(*index.search_merged(user_BMD, 50))
    for k in (1, 9, 20):
        np.testing.assert_array_equal(index.search_merged(user_BMD, k)[1], longest_BK[:, :k])


def test_boosted_items_of_equal_scores_come_by_row():
    """A boost may lift an item to the score of one of a lower row that was found after it."""
    score_BK = np.array([[0.75, 0.5, 0.5, 0.5, -np.inf]], np.float32)
    item_row_BK = np.array([[8, 1, 4, 6, -1]])
    boost_I = np.zeros(9, np.float32)
    boost_I[[4, 1]] = 0.25
    score_BK, item_row_BK = apply_rules(score_BK, item_row_BK, 4, Rules(boost_I=boost_I))
    assert item_row_BK.tolist() == [[1, 4, 8, 6]]
    np.testing.assert_allclose(score_BK, [[0.75, 0.75, 0.75, 0.5]])
