import json
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import ExactItems, ItemIndex, build_index, exact, exact_search, faiss
from trec_twotower.index import item_index as search
from trec_twotower.index.backends import gpu, kinds
from trec_twotower.index.backends.faiss_backend import uses_gpu
from trec_twotower.index.searcher import SearchEffort
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.manifest import own_sha256, seal


def settings(**changed):
    """Lists of whole vectors, also where the rule would score every item."""
    given = {"k": 20, "tune_users": 1500, "device": "cpu"}
    if not {"factory", "lists", "memory_gb"} & changed.keys():
        given["factory"] = "IVF128,Flat"
    return IndexConfig(**(given | changed))


def clustered(num_items, num_users, dim=32, spread=0.0, seed=0):
    """Items and users around shared centres; items of length exp(spread x normal), users of length 1."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((40, dim))

    def around(num):
        vectors = centre[rng.integers(0, 40, size=num)] + 0.7 * rng.standard_normal((num, dim))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    items = around(num_items) * np.exp(spread * rng.standard_normal((num_items, 1)))
    return items.astype(np.float32), around(num_users).astype(np.float32)


def best_written_out(item_ID, user_BD, k, seen=None):
    """Scores in float64, one user at a time, sorted whole."""
    rows = []
    for user, vector in enumerate(user_BD.astype(np.float64)):
        score_I = item_ID.astype(np.float64) @ vector
        order = sorted(range(len(item_ID)), key=lambda item: -score_I[item])
        taken = set(seen[user]) if seen is not None else set()
        rows.append([item for item in order if item not in taken][:k])
    return rows


def recall(found, expected):
    return np.mean([len({*row} & {*best}) / len(best) for row, best in zip(found, expected, strict=True)])


def assert_well_formed(item_ID, user_BD, score_BK, item_row_BK, k, seen):
    """What every answer promises, whatever its recall."""
    assert score_BK.shape == item_row_BK.shape == (len(user_BD), k)
    assert score_BK.dtype == np.float32 and item_row_BK.dtype == np.int64
    for user, (score, row) in enumerate(zip(score_BK, item_row_BK, strict=True)):
        unseen = set(range(len(item_ID))) - set(seen[user])
        num_found = min(k, len(unseen))
        assert len(set(row[:num_found].tolist())) == num_found and set(row[:num_found].tolist()) <= unseen
        assert (row[num_found:] == -1).all() and (score[num_found:] == -np.inf).all()
        assert (np.diff(score[:num_found]) <= 0).all()
        np.testing.assert_allclose(score[:num_found], item_ID[row[:num_found]] @ user_BD[user], atol=1e-5)


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["length 1", "skewed lengths"])
def world(request):
    """5,000 items, an index tuned on 2,000 users, and 300 users it never met."""
    item_ID, user_QD = clustered(5_000, 2_300, spread=request.param)
    return SimpleNamespace(
        item_ID=item_ID, user_BD=user_QD[2_000:], index=build_index(item_ID, user_QD[:2_000], settings())
    )


def test_the_target_recall_is_reached_for_users_never_met(world):
    _, found = world.index.search(world.user_BD, 20)
    report = world.index.report
    reached = recall(found, best_written_out(world.item_ID, world.user_BD, 20))
    assert reached >= 0.985
    assert report.reached_recall == pytest.approx(reached, abs=0.01)
    assert report.target_recall == 0.99 and report.k == 20
    assert report.kind == "IVF128,Flat" and report.lists == 128
    assert 1 <= report.efforts[0].breadth < 64 and 0 < report.scanned_share < 0.5, "the index scans a part only"


def test_one_list_fewer_misses_the_target():
    """No more is scanned than need be. Of a single user, tuned on and measured on are the same."""
    item_ID, user_QD = clustered(3_000, 10, spread=0.3)
    for user_BD in np.split(user_QD, 10):
        index = build_index(item_ID, user_BD, settings())
        expected = best_written_out(item_ID, user_BD, 20)
        efforts = index.report.efforts
        assert [effort.k for effort in efforts] == [20, 40, 80, 160, 320]
        assert recall(index.search(user_BD, 20)[1], expected) >= 0.99
        fewer = replace(efforts[0], breadth=efforts[0].breadth - 1)
        if fewer.breadth:
            assert recall(index._searcher.search(user_BD, 20, fewer)[1], expected) < 0.99


def test_the_recall_holds_for_longer_answers(world):
    _, found = world.index.search(world.user_BD[:100], 300)
    assert recall(found, best_written_out(world.item_ID, world.user_BD[:100], 300)) >= 0.985


def test_the_recall_holds_for_users_who_have_seen_many_of_their_best_items(world):
    """Half of each user's best 150 are gone: what is left lies in more lists than their best 20 did."""
    user_BD = world.user_BD[:200]
    rng = np.random.default_rng(2)
    seen = [rng.permutation(best)[:75].tolist() for best in best_written_out(world.item_ID, user_BD, 150)]
    _, found = world.index.search_unseen(user_BD, 20, Ragged.from_lists(seen))
    assert recall(found, best_written_out(world.item_ID, user_BD, 20, seen)) >= 0.985


def test_an_answer_is_sorted_whole_and_of_unseen_items(world):
    rng = np.random.default_rng(1)
    sizes = [0, 1, 5, 300, 4_990, 5_000, 4_985, 40, 40, 7]
    seen = [rng.permutation(5_000)[:size].tolist() for size in sizes]
    seen[7] += seen[7]  # given twice
    seen[8] += [-1, 5_000, 99_999]  # not in the catalogue
    user_BD = world.user_BD[: len(seen)]
    for k in (1, 20, 300):
        score_BK, item_row_BK = world.index.search_unseen(user_BD, k, Ragged.from_lists(seen))
        assert_well_formed(world.item_ID, user_BD, score_BK, item_row_BK, k, seen)
    score_BK, item_row_BK = world.index.search(user_BD, 20)
    assert_well_formed(world.item_ID, user_BD, score_BK, item_row_BK, 20, [[] for _ in seen])


def test_the_whole_catalogue_can_be_asked_for(world):
    _, item_row_BK = world.index.search(world.user_BD[:3], 5_000)
    assert (np.sort(item_row_BK, axis=1) == np.arange(5_000)).all()


@pytest.mark.parametrize("num_seen", [0, 3_000])
def test_rows_that_run_short_are_searched_again_in_more_lists(world, num_seen):
    """An index that scans one list, too short for the answer, still answers whole; all lists are exact."""
    efforts = (SearchEffort(1, 1, 0.01), SearchEffort(40_000, 1, 0.01))
    hasty = ItemIndex(world.index._searcher, replace(world.index.report, efforts=efforts))
    user_BD = world.user_BD[:20]
    best = best_written_out(world.item_ID, user_BD, 5_000)
    seen = [each[:num_seen] for each in best]
    for k in (20, 1_900, 5_000):
        score_BK, item_row_BK = hasty.search_unseen(user_BD, k, Ragged.from_lists(seen))
        assert_well_formed(world.item_ID, user_BD, score_BK, item_row_BK, k, seen)
    num_unseen = 5_000 - num_seen
    found, expected = item_row_BK[:, :num_unseen], np.array([each[num_seen:] for each in best])
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))


def test_a_row_does_not_depend_on_the_others_in_the_batch(world):
    _, together = world.index.search(world.user_BD[:50], 20)
    alone = np.concatenate([world.index.search(world.user_BD[i : i + 1], 20)[1] for i in range(50)])
    np.testing.assert_array_equal(together, alone)


def test_searching_from_many_threads_gives_each_its_own_answer(world):
    answers = {}

    def ask(k):
        answers[k] = world.index.search(world.user_BD[:50], k)[1]

    threads = [threading.Thread(target=ask, args=(k,)) for k in (1, 10, 20, 100, 200, 400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, found in answers.items():
        assert (found == world.index.search(world.user_BD[:50], k)[1]).all()


def test_skewed_lengths_do_not_spoil_the_lists():
    """The long items lie in a few lists: less is scanned than by lists of direction alone."""
    item_ID, user_QD = clustered(8_000, 1_000, spread=0.7)
    index = build_index(item_ID, user_QD, settings(factory="IVF200,Flat", target_recall=0.95))

    quantizer = faiss.IndexFlatIP(32)
    by_direction = faiss.IndexIVFFlat(quantizer, 32, 200, faiss.METRIC_INNER_PRODUCT)
    by_direction.train(item_ID)  # FAISS's own way
    by_direction.add(item_ID)
    expected = best_written_out(item_ID, user_QD[:100], 20)
    for nprobe in range(1, 201):
        by_direction.nprobe = nprobe
        if recall(by_direction.search(user_QD[:100], 20)[1], expected) >= 0.95:
            break
    size_L = np.array([by_direction.invlists.list_size(each) for each in range(200)])
    scanned = size_L[quantizer.search(user_QD[:100], nprobe)[1]].sum(axis=1).mean() / 8_000
    assert index.report.scanned_share < 0.7 * scanned


@pytest.mark.parametrize("num_items", [1, 3, 50, 100])
def test_tiny_catalogues_are_searched_exactly(num_items):
    item_ID, user_QD = clustered(num_items, 30, dim=8, spread=0.3)
    whole = build_index(item_ID, user_QD, settings(lists=None))
    assert (whole.report.kind, whole.report.lists, whole.report.reached_recall) == ("Flat", 0, 1.0)
    in_lists = build_index(item_ID, user_QD, settings(lists=max(1, num_items // 39)))
    assert in_lists.report.lists == max(1, num_items // 39) and in_lists.report.k == min(20, num_items)
    for index in (whole, in_lists):
        assert len(index) == num_items and index.dim == 8
        for k in {1, num_items}:
            _, item_row_BK = index.search(user_QD, k)
            if index.report.lists <= 1 or k == num_items:
                assert item_row_BK.tolist() == best_written_out(item_ID, user_QD, k)


def test_one_user_is_enough_to_tune_for():
    item_ID, user_QD = clustered(500, 1)
    index = build_index(item_ID, user_QD, settings())
    assert index.report.reached_recall >= 0.99


def test_items_of_equal_vectors_do_not_hide_the_recall():
    """Cold items often share one vector: any of the equals is as good as another."""
    item_ID, user_QD = clustered(40, 300, dim=8)
    index = build_index(np.repeat(item_ID, 30, axis=0), user_QD, settings(k=10, factory="IVF30,SQfp16"))
    assert index.report.reached_recall >= 0.97  # of other users than it is tuned for, each all or nothing
    _, item_row_BK = index.search(user_QD, 100)
    assert all(len(set(row)) == 100 for row in item_row_BK.tolist())


@pytest.mark.parametrize("k", [80, 100])
def test_answers_as_long_as_the_catalogue_can_be_tuned_for(k):
    """Their worst item scores lower than any centroid."""
    item_ID, user_QD = clustered(100, 50)
    index = build_index(item_ID, user_QD, settings(k=k, lists=2))
    best = best_written_out(item_ID, user_QD, k)
    found = index.search(user_QD, k)[1].tolist()
    assert all(len(set(one) & set(other)) >= 0.8 * k for one, other in zip(found, best, strict=True))


def test_a_target_of_one_is_reached():
    item_ID, user_QD = clustered(2_000, 400, dim=16, spread=0.5)
    index = build_index(item_ID, user_QD, settings(target_recall=1.0, factory="IVF50,Flat"))
    assert index.report.reached_recall >= 0.999 and index.report.scanned_share < 1


def test_building_is_repeatable_and_follows_the_seed():
    item_ID, user_QD = clustered(2_000, 400)
    first, again, other = (build_index(item_ID, user_QD, settings(seed=seed)) for seed in (3, 3, 4))
    centroids = [each._searcher.centroid_LD for each in (first, again, other)]
    assert (centroids[0] == centroids[1]).all() and (centroids[0] != centroids[2]).any()
    assert first.report.efforts == again.report.efforts != other.report.efforts


def test_an_index_that_cannot_be_is_refused():
    item_ID, user_QD = clustered(100, 50)
    with pytest.raises(ConfigError, match=r"index.lists is 101 but the catalogue has 100 items"):
        build_index(item_ID, user_QD, settings(lists=101))
    with pytest.raises(ConfigError, match=r"items' vectors have 32 numbers and the users' 31"):
        build_index(item_ID, user_QD[:, :31], settings())
    with pytest.raises(ConfigError, match=r"shape \(32,\)"):
        build_index(item_ID[0], user_QD, settings())
    with pytest.raises(ConfigError, match=r"factory asks for 128 lists but the catalogue has 100 items"):
        build_index(item_ID, user_QD, settings())
    with pytest.raises(DataError, match="no user vector"):
        build_index(item_ID, user_QD[:0], settings())
    with pytest.raises(DataError, match="no item vector"):
        build_index(item_ID[:0], user_QD, settings())
    item_ID[[4, 17], 3] = np.nan, np.inf
    with pytest.raises(DataError, match=r"2 of 100 item vectors .* in rows \[4, 17\]"):
        build_index(item_ID, user_QD, settings(lists=5))


@pytest.mark.skipif(uses_gpu("auto"), reason="this machine has the GPU the test wants missing")
def test_a_gpu_that_is_not_there_is_refused():
    item_ID, user_QD = clustered(100, 50)
    with pytest.raises(ConfigError, match="finds no GPU"):
        build_index(item_ID, user_QD, settings(device="gpu", lists=2))
    assert build_index(item_ID, user_QD, settings(device="auto", lists=2)).device == "cpu"


def test_codes_that_faiss_has_on_no_gpu_stay_on_the_cpu(monkeypatch):
    """What there is of a kind's codes on a GPU, FAISS says when it is to copy them."""

    def fails(shards):
        raise RuntimeError("Error in void verify() at GpuIndexIVF.cu:98: Error: 'isSQSupported' failed: no such codes")

    monkeypatch.setattr(kinds, "uses_gpu", lambda device: device != "cpu")
    monkeypatch.setattr(gpu, "GpuCopies", fails)
    item_ID, user_QD = clustered(400, 60)
    index = build_index(item_ID, user_QD, settings(factory="IVF8,SQbf16", device="auto"))
    assert index.device == "cpu"
    with pytest.raises(ConfigError, match=r"there \('isSQSupported' failed: no such codes\)"):
        kinds.make_searcher([shard.whole for shard in index._searcher.shards], "gpu")


def test_shards_on_gpus_share_their_scratch_memory_and_find_what_they_find_apart(monkeypatch):
    """Copies that stay where they are, in place of FAISS's: what is asked of them is the same."""
    made = []
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: made.append(object()) or made[-1], raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    given = []
    monkeypatch.setattr(gpu, "to_gpu", lambda resources, on_cpu, gpu: given.append((resources, gpu)) or on_cpu)
    item_ID, user_QD = clustered(400, 60)
    index = build_index(item_ID, user_QD, settings(factory="IVF8,Flat", shards=3))
    expected = index.search(user_QD, 20)[1]
    index._searcher._gpu = gpu.GpuCopies(index._searcher.shards)
    assert len(made) == 1 and given == [(made[0], 0), (made[0], 1), (made[0], 0)]
    np.testing.assert_array_equal(index.search(user_QD, 20)[1], expected)
    # Items of equal vectors are finished on the CPU, which alone can fetch as many as tie
    index = build_index(np.repeat(item_ID[:40], 10, axis=0), user_QD, settings(factory="IVF4,Flat"))
    expected = index.search(user_QD, 7)[1]
    index._searcher._gpu = gpu.GpuCopies(index._searcher.shards)
    np.testing.assert_array_equal(index.search(user_QD, 7)[1], expected)


@pytest.mark.skipif(not uses_gpu("auto"), reason="FAISS sees no GPU here")
def test_the_gpu_answers_as_the_cpu_does(tmp_path):
    item_ID, user_QD = clustered(20_000, 2_000, spread=0.5)
    index = build_index(item_ID, user_QD, settings(device="gpu"))
    assert index.device == index.report.device == "gpu"
    index.save(tmp_path / "index", model_version="m1", item_ids=pa.array(range(20_000)), similarity="dot")
    on_cpu = ItemIndex.load(tmp_path / "index", device="cpu")
    for k in (1, 20, 2_048, 2_049):  # the last is beyond the GPU's limit
        found, expected = index.search(user_QD[:200], k)[1], on_cpu.search(user_QD[:200], k)[1]
        assert recall(found, expected) > 0.999


def test_a_search_that_cannot_be_is_refused(world):
    user_BD = world.user_BD[:4]
    with pytest.raises(ConfigError, match=r"k is 5,001 but the catalogue has 5,000 items"):
        world.index.search(user_BD, 5_001)
    with pytest.raises(ConfigError, match="k is 0"):
        world.index.search(user_BD, 0)
    with pytest.raises(ConfigError, match=r"have 5 numbers but the items' of the index 32"):
        world.index.search(user_BD[:, :5], 10)
    with pytest.raises(ConfigError, match="4 users but 2 lists"):
        world.index.search_unseen(user_BD, 10, Ragged.empty(2))
    user_BD = user_BD.copy()
    user_BD[2, 0] = np.nan
    with pytest.raises(DataError, match=r"1 of 4 user vectors .* in rows \[2\]"):
        world.index.search(user_BD, 10)


def test_no_users_get_no_rows(world):
    score_BK, item_row_BK = world.index.search(world.user_BD[:0], 10)
    assert score_BK.shape == item_row_BK.shape == (0, 10)


@pytest.mark.parametrize(
    ("blocks", "keeps"),
    [(None, False), ((256, 1 << 17), True), ((7, 100), True), ((7, 100), False)],
    ids=["faiss", "one block", "many blocks", "blocks moved anew"],
)
def test_exact_search_equals_sorting_every_score(monkeypatch, blocks, keeps):
    """FAISS's, and torch's on any device, which holds all items or is given each block anew."""
    item_ID, user_BD = clustered(530, 30, spread=0.5)
    items = item_ID
    if blocks is not None:
        monkeypatch.setattr(exact, "USER_BLOCK", blocks[0])
        monkeypatch.setattr(exact, "ITEM_BLOCK", blocks[1])
        items = ExactItems(item_ID, "cpu")
        items._kept = list(items._moved()) if keeps else None
        monkeypatch.setattr(items, "candidates", items.torch_candidates)
    rng = np.random.default_rng(1)
    seen = [rng.permutation(530)[: rng.integers(0, 530)].tolist() for _ in range(30)]
    seen[3], seen[4] = list(range(530)), list(range(528)) * 2
    user_BD.flags.writeable = False  # as Arrow gives them
    for k in (1, 25, 530, 600):
        score_BK, item_row_BK = exact_search(items, user_BD, k, Ragged.from_lists(seen), device="cpu")
        assert_well_formed(item_ID, user_BD, score_BK, item_row_BK, k, seen)
        for row, best in zip(item_row_BK, best_written_out(item_ID, user_BD, k, seen), strict=True):
            np.testing.assert_array_equal(row[: len(best)], best)
    _, item_row_BK = exact_search(items, user_BD, 25, device="cpu")
    assert item_row_BK.tolist() == best_written_out(item_ID, user_BD, 25)


@pytest.fixture
def saved(tmp_path):
    item_ID, user_BD = clustered(1_000, 200, spread=0.3)
    index = build_index(item_ID, user_BD, settings())
    folder = tmp_path / "run" / "index"
    item_ids = pa.array([f"item {row}" for row in range(1_000)])
    index.save(folder, model_version="m1", item_ids=item_ids, similarity="dot")
    return SimpleNamespace(index=index, folder=folder, item_ids=item_ids, user_BD=user_BD)


def test_a_loaded_index_answers_as_the_saved_one(saved):
    loaded = ItemIndex.load(saved.folder, model_version="m1", device="cpu")
    seen = Ragged.from_lists([list(range(user)) for user in range(200)])
    for before, after in zip(
        saved.index.search_unseen(saved.user_BD, 30, seen),
        loaded.search_unseen(saved.user_BD, 30, seen),
        strict=True,
    ):
        assert (before == after).all()
    assert loaded.report == saved.index.report
    assert loaded.item_ids.equals(saved.item_ids)
    assert (loaded.similarity, loaded.model_version) == ("dot", "m1")
    assert sorted(path.name for path in saved.folder.iterdir()) == [
        "index-00000-of-00001.faiss",
        "items.parquet",
        "manifest.json",
    ]


def test_an_index_of_another_model_is_refused(saved):
    with pytest.raises(ConfigError, match=r"from model m1, .* now m2: .*trec-twotower index RUN"):
        ItemIndex.load(saved.folder, model_version="m2")
    assert ItemIndex.load(saved.folder).model_version == "m1"


@pytest.mark.parametrize("name", ["index-00000-of-00001.faiss", "items.parquet", "manifest.json"])
def test_one_flipped_bit_anywhere_is_noticed(saved, name):
    path = saved.folder / name
    whole = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(whole), size=20):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        if name == "manifest.json" and _reads_the_same(whole, damaged):
            continue
        with pytest.raises(DataError, match=name):
            ItemIndex.load(saved.folder, model_version="m1")
    path.write_bytes(whole)
    ItemIndex.load(saved.folder, model_version="m1")


def _reads_the_same(whole, damaged):
    """JSON in other white space says the same."""
    try:
        return json.loads(whole) == json.loads(damaged)
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["index-00000-of-00001.faiss", "items.parquet", "manifest.json"])
def test_a_missing_or_cut_file_is_named(saved, name):
    path = saved.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name):
        ItemIndex.load(saved.folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.*trec-twotower index RUN"):
        ItemIndex.load(saved.folder)


def test_an_index_that_agrees_with_its_manifest_is_not_trusted_either(saved):
    """Whoever can write the folder can write both: another place, no index, a part of one, vectors of 2^60."""
    path, manifest = saved.folder / "index-00000-of-00001.faiss", saved.folder / "manifest.json"
    whole, facts = path.read_bytes(), json.loads(manifest.read_text())

    def resealed(**changes):
        kept = {name: value for name, value in (facts | changes).items() if name not in ("files", "sha256")}
        seal(saved.folder, kept)

    resealed(heads={"../../index-00000-of-00001.faiss": "0" * 64})
    with pytest.raises(DataError, match=r"names '\.\./\.\./index.*' but does not list it: do not trust it"):
        ItemIndex.load(saved.folder)
    for content in (b"\x80\x04N." * 40, whole[:40], whole[:30] + (2**60).to_bytes(8, "little") * 40 + whole[350:]):
        path.write_bytes(content)
        resealed()
        with pytest.raises(DataError, match=r"index-00000-of-00001\.faiss is no index that FAISS reads"):
            ItemIndex.load(saved.folder)


def test_a_newer_index_takes_the_place_of_the_older(saved):
    item_ID, user_BD = clustered(300, 100)
    newer = build_index(item_ID, user_BD, settings(lists=7))
    newer.save(saved.folder, model_version="m2", item_ids=pa.array(range(300)), similarity="cosine")
    loaded = ItemIndex.load(saved.folder, model_version="m2", device="cpu")
    assert len(loaded) == 300 and loaded.item_ids.type == pa.int64()
    assert [path.name for path in saved.folder.parent.iterdir()] == ["index"], "nothing is left lying about"


def test_a_save_that_fails_leaves_the_older_index(saved, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(search.pq, "write_table", lambda *_, **__: fail())
        with pytest.raises(OSError, match="disk full"):
            saved.index.save(saved.folder, model_version="m2", item_ids=saved.item_ids, similarity="dot")
    assert ItemIndex.load(saved.folder, model_version="m1").model_version == "m1"
    saved.index.save(saved.folder, model_version="m2", item_ids=saved.item_ids, similarity="dot")
    assert [path.name for path in saved.folder.parent.iterdir()] == ["index"]


def test_item_ids_must_be_as_many_as_the_items(saved):
    with pytest.raises(DataError, match="3 item ids for an index of 1,000 items"):
        saved.index.save(saved.folder, model_version="m1", item_ids=pa.array([1, 2, 3]), similarity="dot")


def test_an_index_of_another_format_is_refused(saved, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(saved.folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["format"] = 99
    manifest["sha256"] = own_sha256(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="format 99, but this version reads 1"):
        ItemIndex.load(other)
