"""Training an inverted file: where its lists are, and the codes they store.

FAISS trains lists for inner products by direction alone (spherical k-means), on a random sample. Vectors of dot-product
models carry popularity in their length, and users want some items far more often than others. So lists are trained by
Euclidean distance, on items weighted by how often they are among users' best. Share of the items scanned for 99 %
recall of the best 100, held-out users, one nprobe for everybody (2 cores of an Intel Xeon, 2026-12-01):

    vectors                                      lists   FAISS's own   weighted by hits (ours)
    Gowalla, 40,981 x 128, length 1                256      .072          .059
    the same, lengths x exp(0.5 z)                 256      .258          .174
    Gowalla, 40,981 x 1,152, dot product           256      .173          .128
    generated, 1,000,000 x 64, length 1          2,048      .020          .020
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.errors import ConfigError
from trec_twotower.index.backends.faiss_backend import Device, error_text, faiss, to_gpu, uses_gpu
from trec_twotower.index.backends.kinds import rank_share
from trec_twotower.index.backends.matrix import Vectors
from trec_twotower.index.backends.shard import Shard
from trec_twotower.index.recipe import GRAPH_LISTS

POINTS = 48  # training points per list, if there are enough items
CODE_POINTS = 65_536  # training points of codes, if there are enough items
FEWEST_POINTS = 256  # centroids of 8-bit codes; fewer items are repeated
UNHIT = 1.0  # weight of an item that no user is known to want, where the mean number of hits counts 1


def train_codes(whole: Any, items: Vectors, config: IndexConfig) -> None:
    """Train an index without lists, on a random sample of the items."""
    if not whole.is_trained:
        rows = np.random.default_rng(config.seed).permutation(len(items))[:CODE_POINTS]
        with naming_the_factory(config, len(rows)):
            whole.train(_repeated(rows_of(items, np.sort(rows)), config))


def train_lists(whole: Any, items: Vectors, hits_I: np.ndarray, config: IndexConfig) -> np.ndarray:
    """Train an empty inverted file and return the centroids (L, D) to which items are assigned by distance."""
    shard = Shard(whole)
    num_lists = shard.base.nlist
    most = max(POINTS * num_lists, CODE_POINTS)
    if config.max_train_vectors is not None:
        most = min(most, max(config.max_train_vectors, num_lists))
    rows, weight_C = weighted_sample(np.sqrt(hits_I / hits_I.mean() + UNHIT), most, config.seed)
    sample_CD = rows_of(items, rows)
    repeated_CD = _repeated(sample_CD, config)
    with naming_the_factory(config, len(rows)):
        shard.train_transforms(repeated_CD)
    vector_CD = shard.transformed(sample_CD)
    centroid_LD = _cluster(vector_CD, weight_C, num_lists, config)
    shard.quantizer.add(centroid_LD)
    learned_CD = shard.transformed(repeated_CD) if shard.has_codes else vector_CD[:1]  # plain numbers need no training
    with naming_the_factory(config, len(rows)), assigned_by_distance(shard, centroid_LD, config.device):
        shard.base.train(learned_CD)  # the lists are trained already: this trains the codes
    if shard.refine is not None and not shard.refine.is_trained:
        with naming_the_factory(config, len(rows)):
            shard.refine.train(repeated_CD)
    for wrapper in shard.wrappers:
        wrapper.is_trained = True
    return centroid_LD


def _repeated(sample_CD: np.ndarray, config: IndexConfig) -> np.ndarray:
    """Return the sample, repeated where it is smaller than FAISS's own least for codes and the config allows more."""
    least = min(FEWEST_POINTS, config.max_train_vectors or FEWEST_POINTS)
    return sample_CD if len(sample_CD) >= least else np.resize(sample_CD, (least, sample_CD.shape[1]))


def weighted_sample(weight_I: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rising rows, about `count` without repeats, and weights by which they stand for all items.

    Each row is drawn with a probability in proportion to its weight, or for certain; its weight over that probability
    makes up for it (Horvitz & Thompson 1952). All rows, with their own weights, where there are no more than `count`.
    """
    if count >= len(weight_I):
        return np.arange(len(weight_I)), weight_I.astype(np.float32)
    probability_I = _inclusion(weight_I, count)
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(weight_I)) < probability_I)
    return rows, (weight_I[rows] / probability_I[rows]).astype(np.float32)


def _inclusion(weight_I: np.ndarray, count: int) -> np.ndarray:
    """Return probabilities in proportion to the weights, at most 1, that add up to `count`."""
    is_certain_I = np.zeros(len(weight_I), bool)
    while True:
        left = count - is_certain_I.sum()
        probability_I = np.where(is_certain_I, 1.0, weight_I * left / weight_I[~is_certain_I].sum())
        if (probability_I[~is_certain_I] <= 1).all():
            return probability_I
        is_certain_I |= probability_I > 1


def probing_centroids(
    centroid_LD: np.ndarray, square_L: np.ndarray, list_BK: np.ndarray, vector_BD: np.ndarray, size_L: np.ndarray
) -> np.ndarray:
    """Return the centroids (L, D) by whose score lists are probed: as trained, or as long as the items of their list.

    A list's centroid is shorter than its items by how far they lie apart, and far-apart items may score far above it.
    Which of the two finds the lists of users' best items (`list_BK`) by scanning fewer items is counted. `square_L` is
    the mean squared length of a list's items.
    """
    length_L = np.linalg.norm(centroid_LD, axis=1)
    scale_L = np.sqrt(square_L) / np.maximum(length_L, 1e-12)
    stretched_LD = centroid_LD * np.where((square_L > 0) & (length_L > 0), scale_L, 1.0)[:, None].astype(np.float32)
    return min((centroid_LD, stretched_LD), key=lambda each: _scanned(each, list_BK, vector_BD, size_L))


def _scanned(centroid_LD: np.ndarray, list_BK: np.ndarray, vector_BD: np.ndarray, size_L: np.ndarray) -> float:
    """Return the items per user in the number of best lists that contains 99 % of the given ones."""
    nprobe = rank_share(vector_BD, centroid_LD, list_BK, 0.99)
    best_BP = np.argsort(-(vector_BD @ centroid_LD.T), axis=1, kind="stable")[:, :nprobe]
    return float(size_L[best_BP].sum(axis=1).mean())


def rows_of(items: Vectors, rows: np.ndarray) -> np.ndarray:
    """Return the items of some rows, which are in rising order."""
    sample_CD = np.empty((len(rows), items.dim), np.float32)
    first_row = 0
    for item_CD in items.pieces():
        start, stop = np.searchsorted(rows, [first_row, first_row + len(item_CD)])
        np.take(item_CD, rows[start:stop] - first_row, axis=0, out=sample_CD[start:stop], mode="clip")
        first_row += len(item_CD)
        del item_CD  # before the next is read
    return sample_CD


def _cluster(vector_CD: np.ndarray, weight_C: np.ndarray, num_lists: int, config: IndexConfig) -> np.ndarray:
    """Return centroids (L, D) by weighted k-means; repeated points where there are fewer than lists."""
    dim = vector_CD.shape[1]
    if len(vector_CD) < num_lists:
        return np.resize(vector_CD, (num_lists, dim))
    clustering = faiss.Clustering(dim, num_lists)
    clustering.niter = 10
    clustering.seed = config.seed % (1 << 31)
    clustering.min_points_per_centroid = 1  # no warning for small lists: the recipe has its own floor
    clustering.max_points_per_centroid = len(vector_CD) // num_lists + 1  # no subsampling
    nearest, _kept_alive = nearest_index(dim, num_lists, config.device)
    clustering.train(vector_CD, nearest, weight_C)
    return faiss.vector_to_array(clustering.centroids).reshape(num_lists, dim)


def nearest_index(dim: int, num_lists: int, device: Device) -> tuple[Any, Any]:
    """Return an empty index of nearest centroids by distance (on a GPU if wanted), and what must outlive it."""
    if uses_gpu(device):
        resources = faiss.StandardGpuResources()
        return to_gpu(resources, faiss.IndexFlatL2(dim)), resources
    return (faiss.IndexHNSWFlat(dim, 32) if num_lists >= GRAPH_LISTS else faiss.IndexFlatL2(dim)), None


@contextmanager
def assigned_by_distance(shard: Shard, centroid_LD: np.ndarray | None, device: Device) -> Iterator[None]:
    """Let the index assign items by distance meanwhile: by inner product the longest centroid would get most."""
    if centroid_LD is None:
        yield
        return
    base = shard.base
    nearest, _kept_alive = nearest_index(base.d, len(centroid_LD), device)
    nearest.add(centroid_LD)
    owned, base.own_fields = base.own_fields, False
    base.quantizer = nearest
    try:
        yield
    finally:
        base.quantizer = shard.quantizer
        base.own_fields = owned


@contextmanager
def naming_the_factory(config: IndexConfig, num_trained: int) -> Iterator[None]:
    """Turn FAISS's error for too few or unsuitable training vectors into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        asked = f"index.factory {config.factory!r}" if config.factory is not None else "This kind of index"
        raise ConfigError(
            f"{asked} cannot be learned of {num_trained:,} vectors ({error_text(error)}). Use one that learns less, "
            "such as Flat, SQfp16 or PQ16x4, or give it more items."
        ) from None
