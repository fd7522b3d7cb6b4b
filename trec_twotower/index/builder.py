"""Building an index and tuning it against exact search on users' own vectors."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from trec_twotower.config.base import as_values
from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.distributed.host_memory import give_back
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index.backends.faiss_backend import error_text, faiss, uses_gpu
from trec_twotower.index.backends.kinds import make_searcher
from trec_twotower.index.backends.matrix import Matrix, Vectors, as_vectors, check_same_dim, norms
from trec_twotower.index.backends.shard import HALF_MAX, PLAIN_TYPES, Shard
from trec_twotower.index.exact import ROUNDING, RunningBest
from trec_twotower.index.item_index import IndexReport, ItemIndex
from trec_twotower.index.recipe import Recipe, choose_recipe
from trec_twotower.index.training import (
    assigned_by_distance,
    nearest_index,
    probing_centroids,
    rows_of,
    train_codes,
    train_lists,
)
from trec_twotower.index.tuning import FACTORS, RecallJudge, tune

LONG_USERS = 256  # users that longer answers are tuned for


def build_index(items: Vectors | np.ndarray, users: Vectors | np.ndarray, config: IndexConfig) -> ItemIndex:
    """Build an index of the items in their order, tuned to `config.target_recall` for users such as these.

    `config.tune_users` of the users are drawn: for a third is counted which items they want, for a third is tuned how
    much is scanned, and a third measures what that reaches. The items are read four times (exact search, training,
    assignment to lists, adding) and are never in memory together outside the index: lists get their final size at
    once, and memory is freed before the next step. Raises DataError for vectors that are not finite, ConfigError for a
    recipe that cannot be built or a target that cannot be reached.
    """
    items = Matrix(items, "item") if isinstance(items, np.ndarray) else items
    if isinstance(users, np.ndarray):
        users = Matrix(users.reshape(-1, users.shape[-1]), "user")  # each of a user's several vectors is a query
    for vectors, what in ((items, "item"), (users, "user")):
        if not len(vectors):
            raise DataError(f"There is no {what} vector to build the index with: export the {what}s first.")
    check_same_dim(items.dim, users.dim)
    recipe = choose_recipe(len(items), items.dim, config, on_gpu=uses_gpu(config.device))
    started = time.perf_counter()
    whole = _template(items.dim, recipe)
    truth = _Truth(_Users(users, config), items, recipe, config)
    give_back()
    if truth.hits_I is None:
        train_codes(whole, items, config)
        centroid_LD = None
    else:
        centroid_LD = train_lists(whole, items, truth.hits_I, config)
    give_back()
    trained = time.perf_counter()
    wholes = _filled(whole, centroid_LD, items, recipe, truth, config)
    give_back()
    built = time.perf_counter()
    searcher = make_searcher(wholes, config.device, blas_batch=config.blas_batch)
    tuned = tune(searcher, truth.tuned_for, truth.reported_on, config)
    report = IndexReport(
        kind=recipe.factory,
        device=searcher.device,
        lists=searcher.num_lists,
        shards=len(wholes),
        target_recall=config.target_recall,
        bytes=sum(map(_file_bytes, wholes)),
        build_s=built - started,
        add_s=built - trained,
        tune_s=time.perf_counter() - built,
        settings=as_values(config),
        exact_users_per_s=truth.exact_users_per_s,
        **tuned,
    )
    return ItemIndex(searcher, report)


# ---------------------------------------------------------------- users, and what exact search finds for them


class _Users:
    """Users to count wanted items for, to tune for and to report on; nobody is in two parts."""

    def __init__(self, users: Vectors, config: IndexConfig) -> None:
        rng = np.random.default_rng(config.seed)
        rows = rng.permutation(len(users))[: config.tune_users]
        drawn_BD = as_vectors(rows_of(users, np.sort(rows)), "user")
        drawn_BD = drawn_BD[rng.permutation(len(drawn_BD))]
        parts = np.array_split(drawn_BD, 3) if len(drawn_BD) >= 3 else [drawn_BD] * 3
        self.hits_BD, self.tune_BD, self.report_BD = parts


class _Truth:
    """Exact search's answers: how often each item is among the best (`hits_I`), and judges of recall.

    `tuned_for` is for rising k, `reported_on` for the first k and other users.
    """

    def __init__(self, users: _Users, items: Vectors, recipe: Recipe, config: IndexConfig) -> None:
        num_items, has_lists = len(items), recipe.lists is not None
        ks = sorted({min(config.k * factor, num_items) for factor in FACTORS})
        k = ks[0]
        best = {
            name: RunningBest(user_BD, min(width, num_items), config.device)
            for name, user_BD, width in (
                ("hits", users.hits_BD if has_lists else users.hits_BD[:0], k),
                ("tune", users.tune_BD, 5 * k),
                ("report", users.report_BD, 5 * k),
                ("long", users.tune_BD[:LONG_USERS], ks[-1] + k if len(ks) > 1 else 1),
            )
        }
        first_row, longest, report_s = 0, 0.0, 0.0
        for item_CD in items.pieces():
            item_CD = as_vectors(item_CD, "item")
            if "fp16" in recipe.factory and float(np.abs(item_CD).max(initial=0)) > HALF_MAX:
                raise DataError(
                    f"The items' vectors have numbers beyond {HALF_MAX:,.0f}, which the half precision of "
                    f"{recipe.factory} cannot hold: scale them, train with model.similarity: cosine, or set "
                    "index.factory to lists of Flat."
                )
            longest = max(longest, float(norms(item_CD).max(initial=0)))
            for name, each in best.items():
                started = time.process_time()
                if len(each.user_BD):
                    each.add(item_CD, first_row)
                report_s += time.process_time() - started if name == "report" else 0.0
            first_row += len(item_CD)
            del item_CD  # before the next is read
        self.hits_I = np.bincount(best["hits"].item_row_BK.ravel(), minlength=num_items) if has_lists else None
        slack = ROUNDING * np.sqrt(items.dim) * longest
        self.tuned_for = [RecallJudge(best["tune" if each == k else "long"], each, slack) for each in ks]
        self.reported_on = RecallJudge(best["report"], k, slack)
        self.exact_users_per_s = len(users.report_BD) / max(report_s, 1e-9)


# ---------------------------------------------------------------- the recipe's index, and its items


def check_factory(factory: str, dim: int) -> None:
    """Raise ConfigError where FAISS makes no index of vectors of that dim from this factory string."""
    _template(dim, Recipe(factory))


def _template(dim: int, recipe: Recipe) -> Any:
    """Return the recipe's index, empty and untrained."""
    try:
        whole = faiss.index_factory(dim, recipe.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"index.factory {recipe.factory!r} is no index of dim {dim} to FAISS ({error_text(error)}): "
            "write it as in FAISS's index_factory, such as IVF1024,SQfp16."
        ) from None
    make_searcher([whole], "cpu")  # refuses other kinds
    base = Shard(whole).base
    if isinstance(base, faiss.IndexIVFPQFastScan):
        base.by_residual = True  # as for all other codes, which are finer if the centroid is subtracted
    if isinstance(base, faiss.IndexIVFScalarQuantizer) and base.sq.qtype in PLAIN_TYPES:
        base.by_residual = False  # equal vectors get equal codes, also in two lists; half precision loses nothing by it
    for codes in (base, Shard(whole).refine):
        if hasattr(codes, "pq"):
            codes.pq.cp.min_points_per_centroid = 1  # no warning for a small catalogue, all of which is used
        if hasattr(codes, "do_polysemous_training"):
            codes.do_polysemous_training = False  # half a minute for codes that only a Hamming pre-filter reads
    return whole


def _filled(
    template: Any, centroid_LD: np.ndarray | None, items: Vectors, recipe: Recipe, truth: _Truth, config: IndexConfig
) -> list[Any]:
    """Return the trained template with all items, or copies of it that share them in their order."""
    rows_per_shard = -(-len(items) // (8 * recipe.shards)) * 8  # whole bytes of a filter's bitmap
    list_I = None
    if centroid_LD is not None and _accepts_lists(Shard(template)):
        list_I, square_L = _assign(Shard(template), centroid_LD, items, config)
        if not Shard(template).base.by_residual:  # codes of residuals are trained for the centroids as they are
            _set_probing_centroids(Shard(template), centroid_LD, square_L, list_I, truth.tuned_for[0])
    wholes: list[Any] = []
    left = first_row = 0
    for item_CD in items.pieces():
        while len(item_CD):
            if left == 0:
                last = len(items) - len(wholes) * rows_per_shard <= rows_per_shard
                wholes.append(template if last else faiss.clone_index(template))
                left = rows_per_shard
                if list_I is not None:
                    _make_room(Shard(wholes[-1]), list_I[first_row : first_row + left])
            part, item_CD = item_CD[:left], item_CD[left:]
            if list_I is not None:
                _add_to_lists(Shard(wholes[-1]), part, list_I[first_row : first_row + len(part)])
            else:
                with assigned_by_distance(Shard(wholes[-1]), centroid_LD, config.device):
                    wholes[-1].add(part)
            left -= len(part)
            first_row += len(part)
        del item_CD, part  # before the next is read
    return wholes


def _accepts_lists(shard: Shard) -> bool:
    """Return whether items can be added to lists of our choice; FAISS alone packs fast-scan codes."""
    return isinstance(faiss.downcast_InvertedLists(shard.base.invlists), faiss.ArrayInvertedLists)


def _assign(
    shard: Shard, centroid_LD: np.ndarray, items: Vectors, config: IndexConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the list (I,) of each item's nearest centroid, int32, and the mean squared length (L,) in each list."""
    nearest, _kept_alive = nearest_index(shard.base.d, len(centroid_LD), config.device)
    nearest.add(centroid_LD)
    list_I = np.empty(len(items), np.int32)
    square_L = np.zeros(len(centroid_LD))
    first_row = 0
    for item_CD in items.pieces():
        vector_CD = shard.transformed(item_CD)
        list_C = nearest.search(vector_CD, 1)[1][:, 0]
        list_I[first_row : first_row + len(item_CD)] = list_C
        square_L += np.bincount(list_C, norms(vector_CD) ** 2, minlength=len(centroid_LD))
        first_row += len(item_CD)
        del item_CD, vector_CD  # before the next is read
    return list_I, square_L / np.maximum(np.bincount(list_I, minlength=len(centroid_LD)), 1)


def _set_probing_centroids(
    shard: Shard, centroid_LD: np.ndarray, square_L: np.ndarray, list_I: np.ndarray, judge: RecallJudge
) -> None:
    """Give the quantizer the centroids by which lists are probed, in place of those that items were assigned by."""
    size_L = np.bincount(list_I, minlength=len(centroid_LD))
    vector_BD = shard.query_vectors(judge.user_BD)
    chosen_LD = probing_centroids(centroid_LD, square_L, list_I[judge.best_BK], vector_BD, size_L)
    if chosen_LD is not centroid_LD:
        shard.quantizer.reset()
        shard.quantizer.add(chosen_LD)


def _make_room(shard: Shard, list_I: np.ndarray) -> None:
    """Allocate each list once, since lists that grow item by item need 1.5 times the memory and fragment it."""
    lists = shard.base.invlists
    for number, size in enumerate(np.bincount(list_I, minlength=shard.base.nlist).tolist()):
        lists.resize(number, size)
        lists.resize(number, 0)  # the memory stays


def _add_to_lists(shard: Shard, item_CD: np.ndarray, list_C: np.ndarray) -> None:
    """Add items to given lists, as FAISS's own `add` does to the nearest."""
    inside_CD = np.ascontiguousarray(shard.transformed(item_CD))
    number_C = list_C.astype(np.int64)
    pointer = faiss.swig_ptr
    shard.base.add_core(len(inside_CD), pointer(inside_CD), None, pointer(number_C))
    if shard.refine is not None:
        shard.refine.add(item_CD)
    for wrapper in shard.wrappers:
        wrapper.ntotal = shard.base.ntotal


def _file_bytes(whole: Any) -> int:
    """Return the index's bytes in a file, about those in memory."""
    written = 0

    def count(block: bytes) -> None:
        nonlocal written
        written += len(block)

    writer = faiss.BufferedIOWriter(faiss.PyCallbackIOWriter(count), 1 << 20)
    faiss.write_index(whole, writer)
    del writer
    return written
