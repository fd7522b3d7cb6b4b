"""An index answers in rows of the catalogue, whatever order and further items that has."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import ItemIndex, build_index
from trec_twotower.index.aligned_index import CatalogueIndex, aligned
from trec_twotower.ops.hashing import id_keys
from trec_twotower.ops.ragged import Ragged

NUM_ITEMS, NUM_USERS, K = 60, 12, 10


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((count, 8), dtype=np.float32) for count in (NUM_ITEMS, NUM_USERS))


@pytest.fixture
def index(vectors, tmp_path) -> ItemIndex:
    """Items 100 .. 159, in this order, saved and loaded."""
    item_ID, user_BD = vectors
    made = build_index(item_ID, user_BD, IndexConfig(tune_users=NUM_USERS))
    ids = pa.array(np.arange(100, 100 + NUM_ITEMS))
    made.save(tmp_path / "index", model_version="m", item_ids=ids, similarity="dot")
    return ItemIndex.load(tmp_path / "index")


class Items:
    """What `aligned` asks of a catalogue with these ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = pa.array(ids)
        self.keys = id_keys(self.ids, "here")
        self.split = SimpleNamespace(folder="data/items")
        self._row_of = {key: row for row, key in enumerate(self.keys.tolist())}

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of_keys(self, keys: np.ndarray) -> np.ndarray:
        return np.array([self._row_of.get(key, -1) for key in keys.tolist()])


def test_the_same_ids_in_the_same_order_need_no_translation(index):
    catalogue = Items(np.arange(100, 100 + NUM_ITEMS))
    assert aligned(index, catalogue, warns=True) is index


@pytest.mark.parametrize("num_new", [0, 25])
def test_searches_find_what_all_scores_say_in_rows_of_the_catalogue(index, vectors, num_new, capsys):
    item_ID, user_BD = vectors
    rng = np.random.default_rng(1)
    ids = rng.permutation(np.concatenate([np.arange(100, 100 + NUM_ITEMS), np.arange(500, 500 + num_new)]))
    catalogue = Items(ids)
    found = aligned(index, catalogue, warns=True)
    assert isinstance(found, CatalogueIndex) and len(found) == NUM_ITEMS
    said = capsys.readouterr().err
    assert ("the index lacks 25 items of data/items, such as item_id" in said) == bool(num_new)
    seen = Ragged.from_lists([rng.choice(len(ids), 7, replace=False) for _ in range(NUM_USERS)])
    mask_I = rng.random(len(ids)) < 0.6
    for allowed in (None, mask_I):
        score_BK, row_BK = found.search(user_BD, K, seen=seen, allowed=None if allowed is None else found.allow(mask_I))
        for user in range(NUM_USERS):
            is_there = (ids < 500) if allowed is None else (ids < 500) & mask_I
            is_there[seen.values[seen.offsets[user] : seen.offsets[user + 1]]] = False
            rows = np.flatnonzero(is_there)
            score = item_ID[ids[rows] - 100] @ user_BD[user]
            best = np.argsort(-score)[:K]
            assert row_BK[user].tolist() == rows[best].tolist()
            np.testing.assert_allclose(score_BK[user], score[best], rtol=1e-4)


def test_rows_that_run_short_end_in_none(index, vectors):
    ids = np.arange(100, 100 + NUM_ITEMS)[::-1].copy()
    found = aligned(index, Items(ids), warns=False)
    allowed = found.allow(np.arange(NUM_ITEMS) < 3)
    score_BK, row_BK = found.search_unseen(vectors[1], K, Ragged.empty(NUM_USERS))
    assert (row_BK >= 0).all() and np.isfinite(score_BK).all()
    score_BK, row_BK = found.search(vectors[1], K, allowed=allowed)
    assert (np.sort(row_BK[:, :3]) == [0, 1, 2]).all() and (row_BK[:, 3:] == -1).all()
    assert (score_BK[:, 3:] == -np.inf).all()
    with pytest.raises(ConfigError, match="k is 61 but the catalogue has 60 items"):
        found.search(vectors[1], NUM_ITEMS + 1)


def test_an_index_with_items_that_the_catalogue_lacks_is_refused(index):
    catalogue = Items(np.arange(103, 100 + NUM_ITEMS))
    with pytest.raises(
        DataError, match="has 3 items that data/items lacks, such as item_id 100: export and index again"
    ):
        aligned(index, catalogue, warns=True)
