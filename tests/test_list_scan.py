"""Our own loop over lists finds what FAISS's search of the same lists finds."""

from __future__ import annotations

import numpy as np
import pytest

from trec_twotower.data.kernels import IS_COMPILED
from trec_twotower.exhaustive import best_of_few
from trec_twotower.index import faiss, list_scan
from trec_twotower.index.list_scan import ListScan
from trec_twotower.index.probing import Coarse, Fit
from trec_twotower.index.scan import scan_preassigned

ITEMS, USERS, LISTS, K = 3000, 40, 24, 30

needs_numba = pytest.mark.skipif(not IS_COMPILED, reason="numba is missing")


@pytest.fixture(
    scope="module", params=[("Flat", 32), ("SQfp16", 32), ("SQ8", 32), ("Flat", 21), ("SQfp16", 21), ("SQ8", 21)]
)
def lists(request):
    """An index, users, the scores and numbers of their lists: as many for each as for nobody else, then -1."""
    codes, dim = request.param
    rng = np.random.default_rng(0)
    items = rng.normal(size=(ITEMS, dim)).astype(np.float32)
    index = faiss.index_factory(dim, f"IVF{LISTS},{codes}", faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    index.add(items)
    users = rng.normal(size=(USERS, dim)).astype(np.float32)
    score_BP, list_BP = index.quantizer.search(users, LISTS)
    list_BP[np.arange(LISTS) > np.arange(USERS)[:, None] % LISTS] = -1
    return index, users, score_BP, list_BP


def by_faiss(lists, k, **more):
    index, users, score_BP, list_BP = lists
    return scan_preassigned(index, users, k, score_BP, list_BP, faiss.SearchParametersIVF(nprobe=LISTS, **more))


def assert_same(found, expected):
    assert np.allclose(found[0], expected[0], atol=2e-4)
    differ = found[1] != expected[1]  # neighbours whose scores are equal but for the rounding may change places
    assert differ.mean() < 0.01 and np.array_equal(found[1] < 0, expected[1] < 0)


@needs_numba
@pytest.mark.parametrize("few", [True, False], ids=["one by one", "together"])
@pytest.mark.parametrize("k", [1, K, 700])
def test_the_best_of_the_lists_are_those_that_faiss_finds(lists, k, few):
    index, users, score_BP, list_BP = lists
    scan = ListScan.of(index)
    if few:
        each = [scan.scan(users[i : i + 1], k, score_BP[i : i + 1], list_BP[i : i + 1]) for i in range(USERS)]
        found = tuple(np.concatenate(part) for part in zip(*each, strict=True))
    else:
        found = scan.scan(users, k, score_BP, list_BP)
    assert_same(found, by_faiss(lists, k))


@needs_numba
def test_only_items_whose_bit_is_set_are_found(lists):
    index, users, score_BP, list_BP = lists
    mask = np.random.default_rng(1).random(ITEMS) < 0.3
    bits = np.packbits(mask, bitorder="little")
    found = ListScan.of(index).scan(users, K, score_BP, list_BP, bits)
    assert mask[found[1][found[1] >= 0]].all()
    assert_same(found, by_faiss(lists, K, sel=faiss.IDSelectorBitmap(bits)))


@needs_numba
def test_a_bound_changes_nothing_be_it_too_high_or_too_low(lists):
    index, users, score_BP, list_BP = lists
    without = by_faiss(lists, K)
    worst_B = np.where(np.isfinite(without[0][:, -1]), without[0][:, -1], 0)
    for bound_B in (worst_B - 0.1, worst_B + 0.5, np.where(np.arange(USERS) % 2, worst_B - 0.01, 1e9)):
        assert_same(ListScan.of(index).scan(users, K, score_BP, list_BP, bound_B=bound_B), without)


@needs_numba
def test_lists_without_items_and_threads_change_nothing(lists):
    index, users, score_BP, list_BP = lists
    users, score_BP, list_BP = (np.tile(part, (5, 1)) for part in (users, score_BP, list_BP))
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        found = ListScan.of(index).scan(users, K, score_BP, list_BP)
    finally:
        faiss.omp_set_num_threads(threads)
    expected = by_faiss(lists, K)
    assert_same(found, tuple(np.tile(part, (5, 1)) for part in expected))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("codes", ["Flat", "SQfp16", "PQ4x4"])
def test_where_lists_lie_is_what_faiss_says_of_each(tmp_path, rng, monkeypatch, codes, mapped):
    """Also where it must be asked, and where lists are empty."""
    items = rng.normal(size=(900, 8)).astype(np.float32)
    index = faiss.index_factory(8, f"IVF50,{codes}", faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    index.add(items[:60])
    if mapped:
        faiss.write_index(index, str(tmp_path / "index"))
        index = faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP)
    lists = index.invlists
    expected = [
        (lists.list_size(each), int(lists.get_codes(each) or 0), int(lists.get_ids(each) or 0)) for each in range(50)
    ]
    assert min(expected)[0] == 0
    for _ in range(2):
        size_L, codes_L, ids_L = list_scan.list_places(index)
        held = size_L > 0
        assert size_L.tolist() == [size for size, _, _ in expected]
        assert codes_L[held].tolist() == [where for size, where, _ in expected if size]
        assert ids_L[held].tolist() == [where for size, _, where in expected if size]
        monkeypatch.setattr(list_scan, "_words", lambda *_: None)


@needs_numba
def test_other_kinds_are_left_to_faiss():
    for factory in ("IVF4,PQ4x4fs", "IVF4,PQ4", "IVF4,SQ4"):
        assert ListScan.of(faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)) is None
    assert ListScan.of(faiss.index_factory(16, "IVF4,Flat", faiss.METRIC_L2)) is None


@needs_numba
@pytest.mark.parametrize("most", [3, 40, 100])
@pytest.mark.parametrize("filtered", [False, True])
def test_the_lists_chosen_at_once_are_those_of_the_rule_written_out(rng, most, filtered):
    centroids = rng.normal(size=(100, 8)).astype(np.float32)
    quantizer = faiss.IndexFlatIP(8)
    quantizer.add(centroids)
    coarse = Coarse(quantizer, rng.integers(0, 40, 100))
    users = rng.normal(size=(300, 8)).astype(np.float32)
    size_L = np.where(rng.random(100) < 0.5, coarse.size_L, 0) if filtered else None
    fit = Fit(10, 0.3, (0.3, 0.1, 0.2, 0.1, 0.2), 1.5, most)
    score_BP, list_BP, foretold_B = coarse.choose(users, 10, fit, size_L, None, most)

    score, number = coarse.nearest(users, most, None if size_L is None else size_L == 0)
    foretold = fit.foretell(score, (coarse.size_L if size_L is None else size_L)[number], 10)
    wanted = np.maximum((score >= (foretold - fit.margin)[:, None]).sum(axis=1), 1)
    number[np.arange(most) >= wanted[:, None]] = -1
    assert np.allclose(foretold_B, foretold)
    assert np.array_equal(list_BP, number[:, : wanted.max()]) and wanted.mean() > 1
    assert np.allclose(np.where(list_BP >= 0, score_BP, 0), np.where(list_BP >= 0, score[:, : wanted.max()], 0))


@pytest.mark.parametrize(("users", "k"), [(1, 1), (7, 50), (32, 500)])
def test_the_best_of_few_users_are_those_of_a_sort(rng, users, k):
    items, user_BD = rng.normal(size=(450, 5)).astype(np.float32), rng.normal(size=(users, 5)).astype(np.float32)
    score, row = best_of_few(items, user_BD, k)
    order = np.argsort(-(user_BD @ items.T), axis=1)[:, :k]
    assert np.array_equal(row[:, : order.shape[1]], order) and (row[:, order.shape[1] :] == -1).all()
    assert np.allclose(score[:, : order.shape[1]], np.take_along_axis(user_BD @ items.T, order, axis=1), atol=1e-5)
    assert (score[:, order.shape[1] :] == -np.inf).all()
