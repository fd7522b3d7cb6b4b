"""Building an index, and tuning it against exact search on users' own vectors.

How the lists are drawn decides how much must be scanned. FAISS's own training for inner products (centroids of length
1) sorts items by direction alone, though vectors of dot-product models carry popularity in their length: the few long
items every user gets lie scattered over all lists. And it draws lists where the items are, not where users look. Here
lists are drawn and filled by Euclidean distance, so that items of like direction AND length lie together, from items
drawn the more often the more users have them among their best, and probed by inner product with their centroid. Share
of the items scanned for 99 % recall of the best 100, on held-out users, 809 lists, with the same lists for everybody:

    40,981 x 64 vectors                  length-1 centroids   distance   distance, by hits (ours)
    a trained Gowalla run, all of length 1     .060              .060          .047
    the same, lengths exp(0.5 z)                 -               .135          .071
    spectral factors of Gowalla (dot)            -               .023          .012

and with as many lists as each user needs (see probing.py) .033, .049 and .008 of ours. One recipe serves cosine and
dot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trec_twotower.config import IndexConfig, as_values
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index.engine import (
    BestSoFar,
    Device,
    Matrix,
    Vectors,
    as_vectors,
    check_same_dim,
    faiss,
    reason_of,
    to_gpu,
    uses_gpu,
)
from trec_twotower.index.recipe import GRAPH_LISTS, POINTS_PER_LIST, Recipe, choose_recipe
from trec_twotower.index.scan import Part
from trec_twotower.index.search import IndexReport, ItemIndex
from trec_twotower.index.tuning import Judge, tune
from trec_twotower.memory import give_back

POINTS = 48  # training points a list, where there are so many
CODE_POINTS = 65_536  # and at least so many where codes are trained
UNHIT = 0.1  # of the mean number of hits: what an item counts that nobody was found to want
USER_SHARE = 0.25  # users drawn as points of lists, as a share of the items drawn
USER_POINTS = 1 << 15  # at most
HALF_MAX = 65_504.0  # the largest half-precision number
TIES = 1e-6  # of |user| x |longest item|: two float32 sums of one inner product differ by less
LONG_USERS = 256  # users that longer answers are tuned for


def build_index(items: Vectors | np.ndarray, users: Vectors | np.ndarray, config: IndexConfig) -> ItemIndex:
    """An index of the items in their order, tuned to `config.target_recall` for users such as these.

    Of the users, `config.tune_users` are drawn: a third says where lists are needed, a third how much is scanned, a
    third what that reaches. The items are gone through four times (exact search, training, which list each is for,
    adding) and never held whole outside the index: lists are made as long as they become, what a step has done with is
    given back before the next. Raises DataError for vectors that are not finite, ConfigError for a recipe or a target
    that cannot be.
    """
    items = Matrix(items, "item") if isinstance(items, np.ndarray) else items
    if isinstance(users, np.ndarray):
        users = Matrix(users.reshape(-1, users.shape[-1]), "user")  # several vectors of a user are as many queries
    for vectors, what in ((items, "item"), (users, "user")):
        if not len(vectors):
            raise DataError(f"There is no {what} vector to build the index with: export the {what}s first.")
    check_same_dim(items.dim, users.dim)
    recipe = choose_recipe(len(items), items.dim, config, on_gpu=uses_gpu(config.device))
    started = time.perf_counter()
    template = _template(items.dim, recipe)
    drawn = _Users(users, config)
    truth = _Truth(drawn, items, recipe, config)
    give_back()
    centroid_LD = _train(template, items, drawn.points_BD, truth.hits_I, config)
    del drawn, truth.hits_I
    give_back()
    trained = time.perf_counter()
    wholes = _filled(template, centroid_LD, items, recipe, config)
    give_back()
    built = time.perf_counter()
    scanner, tuned = tune(wholes, truth.tuned_for, truth.reported_on, config)
    report = IndexReport(
        kind=recipe.factory,
        device=scanner.device,
        lists=scanner.num_lists,
        shards=len(wholes),
        target_recall=config.target_recall,
        bytes=sum(map(_file_bytes, wholes)),
        build_s=built - started,
        add_s=built - trained,
        tune_s=time.perf_counter() - built,
        settings=as_values(config),
        **tuned,
    )
    return ItemIndex(scanner, report)


# ---------------------------------------------------------------- users, and what exact search finds for them


class _Users:
    """Users for drawing lists, for tuning, and for saying what the tuning reaches; nobody is in two parts."""

    def __init__(self, users: Vectors, config: IndexConfig) -> None:
        rng = np.random.default_rng(config.seed)
        rows = rng.permutation(len(users))[: config.tune_users + USER_POINTS]
        drawn_BD = as_vectors(_rows_of(users, np.sort(rows)), "user")
        drawn_BD = drawn_BD[rng.permutation(len(drawn_BD))]
        tuning_BD, rest_BD = np.split(drawn_BD, [config.tune_users])
        parts = np.array_split(tuning_BD, 3) if len(tuning_BD) >= 3 else [tuning_BD] * 3
        self.lists_BD, self.tune_BD, self.report_BD = parts
        self.points_BD = np.concatenate([self.lists_BD, rest_BD])[:USER_POINTS]  # for drawing lists as well


class _Truth:
    """Exact search's answers: how often each item is among the best, and what judges hold against users' best items.

    Of those, `tuned_for` is of rising k, `reported_on` of the first k and of other users.
    """

    def __init__(self, users: _Users, items: Vectors, recipe: Recipe, config: IndexConfig) -> None:
        num_items, hits = len(items), recipe.lists is not None
        self.ks = sorted({min(config.k * factor, num_items) for factor in (1, 4, 16)})
        k = self.ks[0]
        long_BD = users.tune_BD[:LONG_USERS]
        found = {
            name: BestSoFar(user_BD, min(width, num_items), config.device)
            for name, user_BD, width in (
                ("lists", users.lists_BD if hits else users.lists_BD[:0], k),
                ("tune", users.tune_BD, 5 * k),
                ("report", users.report_BD, 5 * k),
                ("long", long_BD, self.ks[-1] + k if len(self.ks) > 1 else 1),
            )
        }
        first_row, longest = 0, 0.0
        for item_CD in items.pieces():
            item_CD = as_vectors(item_CD, "item")
            if "fp16" in recipe.factory and float(np.abs(item_CD).max(initial=0)) > HALF_MAX:
                raise DataError(
                    f"The items' vectors have numbers beyond {HALF_MAX:,.0f}, which the half precision of "
                    f"{recipe.factory} cannot hold: scale them, train with model.similarity: cosine, or set "
                    "index.factory to lists of Flat."
                )
            longest = max(longest, float(np.sqrt(np.einsum("id,id->i", item_CD, item_CD).max(initial=0))))
            for best in found.values():
                if len(best.user_BD):
                    best.add(item_CD, first_row)
            first_row += len(item_CD)
            del item_CD
        self.hits_I = np.bincount(found["lists"].item_row_BK.ravel(), minlength=num_items) if hits else None
        slack = TIES * longest
        self.tuned_for = [Judge(found["tune" if each == k else "long"], each, slack) for each in self.ks]
        self.reported_on = Judge(found["report"], k, slack)


# ---------------------------------------------------------------- lists, codes, items


def check_factory(factory: str, dim: int) -> None:
    """Raises ConfigError where FAISS makes no index of vectors of that dim by these words."""
    _template(dim, Recipe(factory))


def _template(dim: int, recipe: Recipe) -> Any:
    """The recipe's index, empty and untrained."""
    try:
        template = faiss.index_factory(dim, recipe.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"index.factory {recipe.factory!r} is no index of dim {dim} to FAISS ({reason_of(error)}): "
            "write it as in FAISS's index_factory, such as IVF1024,SQfp16."
        ) from None
    base = Part(template).base
    if isinstance(base, faiss.IndexIVFPQFastScan):
        base.by_residual = True  # as of all other kinds: codes of what the centroid leaves are finer
    return template


def _filled(
    template: Any, centroid_LD: np.ndarray | None, items: Vectors, recipe: Recipe, config: IndexConfig
) -> list[Any]:
    """The trained template with all items, or copies of it that share them in their order."""
    rows_per_shard = -(-len(items) // (8 * recipe.shards)) * 8  # whole bytes of a filter's bitmap
    list_I = _list_of_each(Part(template), centroid_LD, items, config.device)
    wholes: list[Any] = []
    left = first_row = 0
    for item_CD in items.pieces():
        while len(item_CD):
            if left == 0:
                last = len(items) - len(wholes) * rows_per_shard <= rows_per_shard
                wholes.append(template if last else faiss.clone_index(template))
                left = rows_per_shard
                if list_I is not None:
                    _make_room(Part(wholes[-1]), list_I[first_row : first_row + left])
            part, item_CD = item_CD[:left], item_CD[left:]
            if list_I is not None:
                _add_to_lists(Part(wholes[-1]), part, list_I[first_row : first_row + len(part)])
            else:
                with _assigned_by_distance(Part(wholes[-1]), centroid_LD, config.device):
                    wholes[-1].add(part)
            left -= len(part)
            first_row += len(part)
        del item_CD, part  # before the next is read
    return wholes


def _list_of_each(part: Part, centroid_LD: np.ndarray | None, items: Vectors, device: Device) -> np.ndarray | None:
    """The list (I,) of the nearest centroid, int32; None where there are no lists, or FAISS alone fills them."""
    if centroid_LD is None or not isinstance(
        faiss.downcast_InvertedLists(part.base.invlists), faiss.ArrayInvertedLists
    ):
        return None
    nearest, _kept_alive = _nearest(part.base.d, len(centroid_LD), device)
    nearest.add(centroid_LD)
    list_I = np.empty(len(items), np.int32)
    first_row = 0
    for item_CD in items.pieces():
        list_I[first_row : first_row + len(item_CD)] = nearest.search(part.transformed(item_CD), 1)[1][:, 0]
        first_row += len(item_CD)
        del item_CD  # before the next is read
    return list_I


def _make_room(part: Part, list_I: np.ndarray) -> None:
    """Lists that grow item by item take half as much again, and leave holes where they were shorter."""
    lists = part.base.invlists
    for number, size in enumerate(np.bincount(list_I, minlength=part.base.nlist).tolist()):
        lists.resize(number, size)
        lists.resize(number, 0)  # the memory stays


def _add_to_lists(part: Part, item_CD: np.ndarray, list_C: np.ndarray) -> None:
    """As FAISS's own adding, with each item's list known."""
    inside_CD = np.ascontiguousarray(part.transformed(item_CD))
    number_C = list_C.astype(np.int64)
    pointer = faiss.swig_ptr
    part.base.add_core(len(inside_CD), pointer(inside_CD), None, pointer(number_C))
    if part.refine is not None:
        part.refine.add(item_CD)
    for wrapper in part.wrappers:
        wrapper.ntotal = part.base.ntotal


def _train(
    template: Any, items: Vectors, user_BD: np.ndarray, hits_I: np.ndarray | None, config: IndexConfig
) -> np.ndarray | None:
    """Make an empty index ready for items; returns the lists' centroids, where it has lists."""
    part = Part(template)
    if hits_I is None:
        if not template.is_trained:
            rows = np.random.default_rng(config.seed).permutation(len(items))[:CODE_POINTS]
            with _naming_the_factory(config, len(rows)):
                template.train(_rows_of(items, np.sort(rows)))
        return None
    num_lists = part.base.nlist
    num_trained = max(POINTS * num_lists, CODE_POINTS)
    if config.max_train_vectors is not None:
        num_trained = min(num_trained, max(config.max_train_vectors, num_lists))
    rows = _drawn_by_hits(hits_I, num_trained, config.seed)
    user_BD = user_BD[: int(USER_SHARE * len(rows))]
    point_CD = np.empty((len(rows) + len(user_BD), items.dim), np.float32)
    sample_CD = _rows_of(items, rows, point_CD[: len(rows)])
    point_CD[len(rows) :] = _as_long_as_their_items(user_BD, sample_CD, hits_I[rows])
    with _naming_the_factory(config, len(sample_CD)):
        part.train_transforms(sample_CD)
    centroid_LD = _draw_lists(part.transformed(point_CD), num_lists, config)
    part.quantizer.add(centroid_LD)
    learned_CD = sample_CD if part.has_codes else sample_CD[:1]  # of plain numbers nothing is learned
    with _naming_the_factory(config, len(rows)), _assigned_by_distance(part, centroid_LD, config.device):
        # The lists are there already: this trains the codes, of distances to centroids
        part.base.train(part.transformed(learned_CD))
    if part.refine is not None and not part.refine.is_trained:
        with _naming_the_factory(config, len(sample_CD)):
            part.refine.train(sample_CD)
    for wrapper in part.wrappers:
        wrapper.is_trained = True
    return centroid_LD


@contextmanager
def _naming_the_factory(config: IndexConfig, num_trained: int) -> Iterator[None]:
    """What FAISS cannot learn of so few vectors, or of such, as a mistake of the config."""
    try:
        yield
    except RuntimeError as error:
        asked = f"index.factory {config.factory!r}" if config.factory is not None else "This kind of index"
        raise ConfigError(
            f"{asked} cannot be learned of {num_trained:,} vectors ({reason_of(error)}): take one that learns "
            "less, such as Flat, SQfp16 or PQ16x4, or give it more items."
        ) from None


def _drawn_by_hits(hits_I: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Item rows in order, drawn with replacement by the root of how often they are among users' best."""
    reach_I = np.cumsum(np.sqrt(hits_I / hits_I.mean() + UNHIT))
    at = np.sort(np.random.default_rng(seed).random(count)) * reach_I[-1]
    return np.minimum(np.searchsorted(reach_I, at, side="right"), len(hits_I) - 1)


def _rows_of(items: Vectors, rows: np.ndarray, into_CD: np.ndarray | None = None) -> np.ndarray:
    """The items of some rows, which are in order."""
    sample_CD = np.empty((len(rows), items.dim), np.float32) if into_CD is None else into_CD
    first_row = 0
    for item_CD in items.pieces():
        start, stop = np.searchsorted(rows, [first_row, first_row + len(item_CD)])
        np.take(item_CD, rows[start:stop] - first_row, axis=0, out=sample_CD[start:stop], mode="clip")
        first_row += len(item_CD)
        del item_CD
    return sample_CD


def _as_long_as_their_items(user_BD: np.ndarray, sample_CD: np.ndarray, hits_C: np.ndarray) -> np.ndarray:
    """Users who stand among the items as points of lists, of the length of the items that they get."""
    length_B = np.linalg.norm(user_BD, axis=1, keepdims=True)
    length_C = np.sqrt(np.einsum("cd,cd->c", sample_CD, sample_CD))
    length = float((length_C * hits_C).sum() / max(hits_C.sum(), 1))
    return user_BD / np.maximum(length_B, 1e-12) * np.float32(length)


def _draw_lists(vector_CD: np.ndarray, num_lists: int, config: IndexConfig) -> np.ndarray:
    """Centroids (L, D) by k-means."""
    dim = vector_CD.shape[1]
    if len(vector_CD) < num_lists:  # fewer points than lists: every point is one
        return np.resize(vector_CD, (num_lists, dim))
    clustering = faiss.Clustering(dim, num_lists)
    clustering.niter = 10
    clustering.seed = config.seed % (1 << 31)
    clustering.min_points_per_centroid = 1  # says nothing of small lists; the rule keeps its own floor
    clustering.max_points_per_centroid = max(len(vector_CD) // num_lists + 1, POINTS_PER_LIST)
    nearest, _kept_alive = _nearest(dim, num_lists, config.device)
    clustering.train(vector_CD, nearest)
    return faiss.vector_to_array(clustering.centroids).reshape(num_lists, dim)


def _nearest(dim: int, num_lists: int, device: Device) -> tuple[Any, Any]:
    """An empty index of nearest centroids by distance, on a GPU where there is one, a graph if they are many."""
    if uses_gpu(device):
        resources = faiss.StandardGpuResources()
        return to_gpu(resources, faiss.IndexFlatL2(dim)), resources
    return (faiss.IndexHNSWFlat(dim, 32) if num_lists >= GRAPH_LISTS else faiss.IndexFlatL2(dim)), None


@contextmanager
def _assigned_by_distance(part: Part, centroid_LD: np.ndarray | None, device: Device) -> Iterator[None]:
    """Meanwhile the index chooses an item's list by distance; by the inner product the longest centroid gets most."""
    if centroid_LD is None:
        yield
        return
    base = part.base
    nearest, _kept_alive = _nearest(base.d, len(centroid_LD), device)
    nearest.add(centroid_LD)
    owned, base.own_fields = base.own_fields, False
    base.quantizer = nearest
    try:
        yield
    finally:
        base.quantizer = part.quantizer
        base.own_fields = owned


def _file_bytes(whole: Any) -> int:
    """What the index takes in a file, and about in memory."""
    written = 0

    def count(block: bytes) -> None:
        nonlocal written
        written += len(block)

    writer = faiss.BufferedIOWriter(faiss.PyCallbackIOWriter(count), 1 << 20)
    faiss.write_index(whole, writer)
    del writer
    return written
