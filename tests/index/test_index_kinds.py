"""Which index is chosen, and what every kind of index promises alike: recall, whole answers, filters, files."""

from __future__ import annotations

import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.index.test_index import best_written_out, clustered, recall, settings
from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import ItemIndex, Matrix, build_index, choose_recipe, faiss, training
from trec_twotower.index.backends.shard import Shard
from trec_twotower.index.builder import _Users
from trec_twotower.index.searcher import SearchEffort
from trec_twotower.index.training import rows_of
from trec_twotower.inference import export
from trec_twotower.inference.export import VectorFiles
from trec_twotower.ops.ragged import Ragged

KINDS = (
    ("Flat", 1),
    ("SQfp16", 2),
    ("IVF40,Flat", 2),
    ("IVF40,SQfp16", 1),
    ("IVF40,SQ8", 1),
    ("IVF40_HNSW32,SQfp16", 1),
    ("IVF40,PQ16x4fs,Refine(SQfp16)", 2),
    ("RR32,IVF40,SQfp16", 1),
    ("HNSW32", 1),
)


@pytest.fixture(scope="module")
def vectors():
    return clustered(2_000, 1_500, spread=0.3)


@pytest.mark.parametrize(("factory", "shards"), KINDS)
def test_every_kind_reaches_the_target_and_answers_whole_and_maps_to_the_same(vectors, factory, shards, tmp_path):
    item_ID, user_QD = vectors
    config = settings(factory=factory, shards=shards, target_recall=0.97, k=10)
    index = build_index(item_ID, user_QD, config)
    report = index.report
    assert (report.kind, report.shards, report.lists) == (factory, shards, 40 if "IVF" in factory else 0)
    assert report.reached_recall >= 0.93 and report.bytes > 0
    user_BD = user_QD[:40]
    assert recall(index.search(user_BD, 10)[1], best_written_out(item_ID, user_BD, 10)) >= 0.93

    rng = np.random.default_rng(1)
    seen = [rng.permutation(2_000)[:size].tolist() for size in rng.integers(0, 2_000, size=38)]
    seen += [list(range(2_000)), list(range(1_995))]
    for k in (10, 2_000):
        score_BK, item_row_BK = index.search(user_BD, k, seen=Ragged.from_lists(seen))
        for user, (score, row) in enumerate(zip(score_BK, item_row_BK, strict=True)):
            num_found = min(k, 2_000 - len(set(seen[user])))
            assert len(set(row[:num_found].tolist())) == num_found and not set(row.tolist()) & set(seen[user])
            assert (row[num_found:] == -1).all() and (score[num_found:] == -np.inf).all()
            assert (np.diff(score[:num_found]) <= 0).all()

    mask_I = rng.random(2_000) < 0.02
    for strategy in ("exact", "selector"):
        _, item_row_BK = index.search(user_BD, 10, allowed=index.allow(mask_I, strategy))
        assert mask_I[item_row_BK].all()
        few = index.allow(np.isin(np.arange(2_000), [3, 1_990]), strategy)
        _, item_row_BK = index.search(user_BD, 10, allowed=few)
        assert {tuple(sorted(row)) for row in item_row_BK.tolist()} == {(-1,) * 8 + (3, 1_990)}

    index.save(tmp_path / "index", model_version="m", item_ids=pa.array(range(2_000)), similarity="dot")
    for mapped in (False, True):
        loaded = ItemIndex.load(tmp_path / "index", model_version="m", device="cpu", mapped=mapped)
        for before, after in zip(index.search(user_BD, 10), loaded.search(user_BD, 10), strict=True):
            np.testing.assert_array_equal(before, after)
        filtered = loaded.search(user_BD, 10, allowed=loaded.allow(mask_I))[1]
        assert mask_I[filtered].all() and loaded.item_ids.to_pylist() == list(range(2_000))


def test_a_mapped_index_is_refused_when_cut_or_damaged_where_its_layout_stands(vectors, tmp_path):
    item_ID, user_QD = vectors
    folder = tmp_path / "index"
    build_index(item_ID, user_QD, settings(lists=20)).save(
        folder, model_version="m", item_ids=pa.array(range(2_000)), similarity="dot"
    )
    [path] = folder.glob("*.faiss")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[200] ^= 1
    for content, said in ((bytes(damaged), "digest of its first"), (whole[:-1], "were written"), (b"", "has 0 bytes")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            ItemIndex.load(folder, mapped=True)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        ItemIndex.load(folder, mapped=True)


def test_a_mapped_index_starts_no_threads_for_a_query(vectors, tmp_path, monkeypatch):
    """FAISS would read ahead with 32 new threads in every search, ten times the cost of the search."""
    item_ID, user_QD = vectors
    build_index(item_ID, user_QD, settings(lists=20)).save(
        tmp_path / "index", model_version="m", item_ids=pa.array(range(2_000)), similarity="dot"
    )
    kept, read = [], faiss.read_index

    def keep(*arguments):
        kept.append(read(*arguments))
        return kept[-1]

    monkeypatch.setattr(faiss, "read_index", keep)
    ItemIndex.load(tmp_path / "index", device="cpu", mapped=True)
    lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(kept[0]).invlists)
    assert isinstance(lists, faiss.OnDiskInvertedLists) and lists.prefetch_nthread == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_a_loaded_index_keeps_its_ids_when_another_takes_its_place(mapped, vectors, tmp_path):
    """Those of a mapped one are read at their first use, which may be after a newer one was published."""
    item_ID, user_QD = vectors
    index = build_index(item_ID, user_QD, settings(lists=20))
    index.save(tmp_path / "index", model_version="old", item_ids=pa.array(range(2_000)), similarity="dot")
    loaded = ItemIndex.load(tmp_path / "index", device="cpu", mapped=mapped)
    index.save(tmp_path / "index", model_version="new", item_ids=pa.array(range(2_000, 4_000)), similarity="dot")
    assert loaded.item_ids.to_pylist() == list(range(2_000)) and loaded.model_version == "old"
    for before, after in zip(index.search(user_QD[:9], 10), loaded.search(user_QD[:9], 10), strict=True):
        np.testing.assert_array_equal(before, after)
    assert ItemIndex.load(tmp_path / "index", device="cpu").item_ids.to_pylist() == list(range(2_000, 4_000))


def test_users_of_several_vectors_get_the_best_by_any_of_them(vectors):
    item_ID, user_QD = vectors
    index = build_index(item_ID, user_QD, settings(factory="Flat"))
    shift_BMD = 0.1 * np.random.default_rng(1).standard_normal((20, 3, 32), dtype=np.float32)
    user_BMD = user_QD[:20, None] + shift_BMD  # so near each other that they share items
    seen = [[row] for row in np.random.default_rng(0).integers(0, 2_000, size=20).tolist()]
    score_BK, item_row_BK = index.search_merged(user_BMD, 15, seen=Ragged.from_lists(seen))
    for user in range(20):
        best_I = (item_ID.astype(np.float64) @ user_BMD[user].T.astype(np.float64)).max(axis=1)
        best_I[seen[user]] = -np.inf
        expected = np.argsort(-best_I)[:15]
        assert item_row_BK[user].tolist() == expected.tolist()
        np.testing.assert_allclose(score_BK[user], best_I[expected], rtol=1e-5)


def test_shards_whose_lists_run_short_are_searched_again(vectors):
    """A place left empty by the second shard is no item of the first."""
    item_ID, user_QD = vectors
    index = build_index(item_ID, user_QD, settings(factory="IVF40,Flat", shards=2, k=10))
    hasty = ItemIndex(index._searcher, replace(index.report, efforts=(SearchEffort(10_000, 1, 0.01),)))
    _, item_row_BK = hasty.search(user_QD[:20], 1_200)
    assert all(len(set(row)) == 1_200 and min(row) >= 0 for row in item_row_BK.tolist())


def test_lists_trained_by_what_users_want_are_scanned_less(monkeypatch):
    """Long items are everybody's best: against the same index with lists trained on all items equally."""
    item_ID, user_QD = clustered(8_000, 1_000, spread=1.0)
    config = settings(factory="IVF100,Flat", target_recall=0.97)
    by_hits = build_index(item_ID, user_QD, config).report
    weighted = training.weighted_sample
    monkeypatch.setattr(training, "weighted_sample", lambda weight_I, *rest: weighted(np.ones(len(weight_I)), *rest))
    by_items = build_index(item_ID, user_QD, config).report
    assert min(by_hits.reached_recall, by_items.reached_recall) > 0.95
    assert by_hits.scanned_share < 0.8 * by_items.scanned_share


def test_a_weighted_sample_stands_for_all_items(rng):
    """Weighted sums of the sample are those of all items in the mean; items of great weight are drawn for certain."""
    weight_I = np.concatenate([rng.random(900) + 0.1, [50.0, 80.0]])
    value_I = rng.random(902)
    sums, counts = [], []
    for seed in range(300):
        rows, weight_C = training.weighted_sample(weight_I, 200, seed)
        assert (np.diff(rows) > 0).all() and {900, 901} <= set(rows.tolist())
        sums.append((weight_C * value_I[rows]).sum())
        counts.append(len(rows))
    assert np.mean(counts) == pytest.approx(200, rel=0.02)
    assert np.mean(sums) == pytest.approx((weight_I * value_I).sum(), rel=0.01)
    rows, weight_C = training.weighted_sample(weight_I, 902, 0)
    assert (rows == np.arange(902)).all() and np.allclose(weight_C, weight_I)


def test_a_small_catalogue_trains_codes_on_each_item_once(vectors, monkeypatch):
    """1,000 items are no 65,536 training points, and nobody reads the Hamming distances of codes."""
    item_ID, user_QD = vectors
    trained = []
    monkeypatch.setattr(training, "rows_of", lambda items, rows: trained.append(rows) or rows_of(items, rows))
    index = build_index(item_ID[:1_000], user_QD, settings(factory="IVF32,PQ16", target_recall=0.3))
    rows = trained[-1]  # the first are users
    assert (rows == np.arange(1_000)).all()
    assert not index._searcher.shards[0].base.do_polysemous_training


@pytest.mark.parametrize(("stretch", "is_stretched"), [(4.0, True), (1.0, False)])
def test_lists_are_probed_by_the_centroids_that_find_them_sooner(stretch, is_stretched):
    """A list whose items lie far apart has a short centroid, which hides items as good as any other list's."""
    centroid_LD = np.array([[1, 0], [0.9, 0.1], [0.95, 0.05]], np.float32)
    centroid_LD[2] /= stretch
    square_L = np.array([1.01, 0.83, 0.91])  # mean squared lengths
    user_BD = np.array([[1.0, 0.05]] * 4, np.float32)
    list_BK = np.full((4, 5), 2 if is_stretched else 0)
    probing_LD = training.probing_centroids(centroid_LD, square_L, list_BK, user_BD, np.array([10, 10, 10]))
    assert (probing_LD is not centroid_LD) == is_stretched
    if is_stretched:
        np.testing.assert_allclose(np.linalg.norm(probing_LD, axis=1) ** 2, square_L, rtol=1e-6)


def test_packed_codes_are_of_what_the_centroid_leaves(vectors):
    """As those of other kinds; FAISS's own way for them is the whole vector, of which the same bits tell less."""
    index = build_index(*vectors, settings(factory="IVF40,PQ16x4fs,Refine(SQfp16)", target_recall=0.9, k=10))
    base = index._searcher.shards[0].base
    assert base.by_residual
    item_ID, user_BD = vectors[0], vectors[1][:200]
    whole = faiss.index_factory(32, "IVF40,PQ16x4fs", faiss.METRIC_INNER_PRODUCT)
    whole.train(item_ID)
    whole.add(item_ID)
    base.nprobe = whole.nprobe = 40
    expected = best_written_out(item_ID, user_BD, 10)
    ours, stock = (recall(each.search(user_BD, 10)[1], expected) for each in (base, whole))
    assert ours > stock + 0.02


def test_nobody_is_tuned_for_and_reported_on():
    user_QD = np.arange(3_000, dtype=np.float32).reshape(-1, 1) + 1
    users = _Users(Matrix(user_QD, "user"), IndexConfig(tune_users=900))
    parts = [set(part[:, 0].tolist()) for part in (users.tune_BD, users.report_BD, users.hits_BD)]
    assert [len(part) for part in parts] == [300, 300, 300]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


class Pieces:
    """Items of which each piece is made when asked for, and how many pieces were alive at once."""

    def __init__(self, item_ID, size):
        self.item_ID, self.size, self.dim = item_ID, size, item_ID.shape[1]
        self.alive = self.most_alive = 0

    def __len__(self):
        return len(self.item_ID)

    def pieces(self):
        for start in range(0, len(self), self.size):
            piece = self.item_ID[start : start + self.size].copy()
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(piece, self.let_go)
            yield piece

    def let_go(self):
        self.alive -= 1


@pytest.mark.parametrize(("factory", "shards"), [("IVF40,SQfp16", 1), ("Flat", 3), ("IVF40,PQ16x4fs,Refine(SQ8)", 2)])
def test_items_in_pieces_make_the_index_of_the_whole_and_are_not_kept(vectors, factory, shards):
    item_ID, user_QD = vectors
    config = settings(factory=factory, shards=shards, target_recall=0.9)
    pieces = Pieces(item_ID, 130)
    built = [build_index(items, user_QD, config) for items in (item_ID, pieces)]
    assert pieces.most_alive <= 3, "of 16"
    whole, streamed = (index._searcher.shards for index in built)
    assert [shard.num_items for shard in streamed] == [shard.num_items for shard in whole]
    for one, other in zip(whole, streamed, strict=True):
        assert (faiss.serialize_index(one.whole) == faiss.serialize_index(other.whole)).all()


def test_building_from_files_holds_a_small_part_of_them(tmp_path, monkeypatch):
    """Counted in Arrow's pool whenever a piece is handed on, and by numpy's own accounts; FAISS holds the index."""
    item_ID, user_QD = clustered(60_000, 600)
    write_export(tmp_path, item_ID)
    monkeypatch.setattr(export, "PIECE", 2048)
    held = []

    class Watched(VectorFiles):
        def pieces(self):
            for piece in super().pieces():
                held.append(pa.default_memory_pool().bytes_allocated() - held_before)
                yield piece
                del piece

    config = settings(factory="IVF64,SQfp16", k=10, tune_users=300, target_recall=0.9, max_train_vectors=4_000)
    build_index(item_ID[:2_000], user_QD, config)  # what is compiled and kept at the first call
    del item_ID
    held_before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    try:
        index = build_index(Watched(tmp_path, "items"), user_QD, config)
        _, most_of_numpy = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    vector_bytes = 4 * 32 * 60_000
    assert len(index) == 60_000 and index.report.reached_recall > 0.85
    assert len(held) == 4 * 30 and 0 < max(held) < vector_bytes / 2
    assert most_of_numpy < vector_bytes / 2


def write_export(folder, item_ID):
    """In row groups, as exports are."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(item_ID.reshape(-1)), item_ID.shape[1])
    table = pa.table({"item_id": np.arange(len(item_ID)), "vector": column})
    pq.write_table(table, folder / "items-0.parquet", row_group_size=8_192, use_dictionary=False)


# ---------------------------------------------------------------- which kind


@pytest.mark.parametrize(
    ("num_items", "given", "factory"),
    [
        (16_384, {}, "Flat"),
        (16_385, {}, "IVF384,SQfp16"),
        (1_000_000, {}, "IVF3000,SQfp16"),
        (1_000_000, {"memory_gb": 0.1}, "IVF3000,SQ8"),
        (1_000_000, {"lists": 64}, "IVF64,SQfp16"),
        (100_000_000, {}, "IVF30000_HNSW32,SQfp16"),
        (100_000_000, {"max_train_vectors": 390_000}, "IVF10000,SQfp16"),
        (1_000_000, {"factory": "IVF7,Flat"}, "IVF7,Flat"),
    ],
)
def test_size_memory_and_use_choose_the_kind(num_items, given, factory):
    assert choose_recipe(num_items, 64, IndexConfig(**given)).factory == factory


def test_a_large_catalogue_is_shared_by_several_indexes():
    assert choose_recipe(100_000_000, 64, IndexConfig()).shards == 1
    assert choose_recipe(200_000_000, 64, IndexConfig()).shards == 2  # 27 GB of at most 17 each
    assert choose_recipe(1_000, 64, IndexConfig(shards=3)).shards == 3


@pytest.mark.parametrize(("num_items", "shards", "most"), [(20_000, 30_000, 256), (1_000, 16, 15), (63, 2, 1)])
def test_shards_of_hardly_any_items_are_refused(num_items, shards, most):
    for given in ({}, {"factory": "Flat"}):
        with pytest.raises(ConfigError, match=rf"index.shards is {shards:,} but .* at most {most} indexes"):
            choose_recipe(num_items, 64, IndexConfig(shards=shards, **given))


@pytest.mark.parametrize("factory", ["SQ8,Refine(PQ16)", "IVF4,PQ16", "IVF4,SQfp16,Refine(PQ16)", "OPQ16,IVF4,Flat"])
def test_codes_that_cannot_be_learned_of_so_few_items_are_refused(vectors, factory):
    item_ID, user_QD = vectors
    with pytest.raises(ConfigError, match=r"index.factory .* cannot be learned of 100 vectors \((?!Error in)"):
        build_index(item_ID[:100], user_QD, settings(factory=factory, max_train_vectors=100))


def test_memory_that_holds_no_kind_is_refused():
    with pytest.raises(ConfigError, match=r"memory_gb is 0.05, but 1,000,000 items of dim 64 take at least 0.07"):
        choose_recipe(1_000_000, 64, IndexConfig(memory_gb=0.05))


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("IVF20,Flot", "no index of dim 32 to FAISS"),
        ("IDMap,IVF20,Flat", "has an IDMap, which hides the lists"),
        ("LSH", "'metric == METRIC_L2' failed"),
        ("IVF16(PQ4x4),Flat", "finds its lists by a IndexPQ"),
        ("IVF16,SQ8,Refine(HNSW8)", "refines by a IndexHNSWFlat, which does not store"),
        ("NSG16", "makes a IndexNSGFlat, which cannot be tuned"),
        ("PQ16x4fs,Refine(SQfp16)", "makes a IndexPQFastScan, which cannot be tuned"),
        ("PQ16", "makes a IndexPQ, which cannot be tuned or filtered"),
    ],
)
def test_a_factory_that_cannot_be_tuned_is_refused(vectors, factory, said):
    with pytest.raises(ConfigError, match=said):
        build_index(*vectors, settings(factory=factory))


def test_a_target_out_of_reach_says_how_far_the_codes_come_and_what_would_help(vectors):
    with pytest.raises(
        ConfigError, match=r"target_recall 0.99 cannot be reached .* finds 0\.\d+ .* such as IVF20,Flat"
    ):
        build_index(*vectors, settings(factory="IVF20,PQ4x4"))


def test_numbers_beyond_half_precision_are_refused_where_it_is_used(vectors):
    item_ID, user_QD = vectors[0].copy(), vectors[1]
    item_ID[5, 0] = 1e5
    with pytest.raises(DataError, match="beyond 65,504, which the half precision of IVF20,SQfp16"):
        build_index(item_ID, user_QD, settings(factory="IVF20,SQfp16"))
    build_index(item_ID, user_QD, settings(factory="IVF20,Flat"))


@pytest.mark.parametrize(
    "make", [lambda: faiss.IndexFlat(8), lambda: faiss.IndexIVFFlat(faiss.IndexFlatL2(8), 8, 2, 0)]
)
def test_an_index_by_another_metric_is_refused(make):
    """FAISS's metric left out is L2; and lists chosen by L2 under an inner product are another trap."""
    with pytest.raises(ConfigError, match="compares by another metric than the inner product"):
        Shard(make())
