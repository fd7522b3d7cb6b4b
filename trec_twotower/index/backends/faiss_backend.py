"""FAISS as this package uses it: the only module that imports it."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import torch

# isort: split
# After torch, whose CUDA libraries must be loaded first where there is a GPU.
import faiss as _faiss

from trec_twotower.errors import ConfigError

faiss: Any = _faiss  # FAISS's type stubs lack most methods of derived classes, and everything for GPUs

BLAS_BATCH = 4  # default of index.blas_batch
GPU_LIMIT = 2048  # FAISS's GPU kernels return at most this many neighbours and probe at most this many lists

Device = Literal["auto", "cpu", "gpu"]
Answer = tuple[np.ndarray, np.ndarray]  # scores (B, K) float32 and item rows (B, K) int64, ending in -inf and -1


def error_text(error: RuntimeError) -> str:
    """Return FAISS's error message without the source location it starts with."""
    return re.sub(r"^Error in .*?\.\w+:\d+: (Error: )?", "", " ".join(str(error).split()))


def knn(user_BD: np.ndarray, item_ID: np.ndarray, k: int, blas_batch: int = BLAS_BATCH) -> Answer:
    """Return the `k` items of highest inner product; neither equal scores nor the last bits follow a fixed order.

    FAISS multiplies matrices by BLAS where users x dim reaches its threshold, else runs a loop per user. BLAS pays from
    a few users on, whatever the dim, so the threshold is set for batches of `blas_batch` users.
    """
    faiss.cvar.distance_compute_blas_threshold = blas_batch * item_ID.shape[1]
    score_BK, item_row_BK = faiss.knn(user_BD, item_ID, k, metric=faiss.METRIC_INNER_PRODUCT)
    return score_BK, item_row_BK


def inner_products(user_BD: np.ndarray, item_ID: np.ndarray, item_row_BK: np.ndarray) -> np.ndarray:
    """Return the scores (B, K) of given items; -inf for row -1.

    A score depends on its two vectors alone, not on their places or on the batch, unlike that of a matrix product.
    """
    score_BK = np.empty(item_row_BK.shape, np.float32)
    user_BD, item_ID, item_row_BK = map(np.ascontiguousarray, (user_BD, item_ID, item_row_BK))
    num_users, width = item_row_BK.shape
    pointers = map(faiss.swig_ptr, (score_BK, user_BD, item_ID, item_row_BK))
    faiss.fvec_inner_products_by_idx(*pointers, item_ID.shape[1], num_users, width)
    return score_BK


def sequential_search() -> Any:
    """Return search parameters by which a flat index scores by a loop, never by BLAS.

    Its scores are then those of `inner_products`. FAISS uses the loop whenever a selector is given.
    """
    return faiss.SearchParameters(sel=faiss.IDSelectorAll())


def float_codes(codes: Any) -> np.ndarray:
    """Return the vectors (I, D) of an IndexFlat without copying them."""
    flat = faiss.rev_swig_ptr(codes.codes.data(), codes.ntotal * codes.code_size)
    return flat.view(np.float32).reshape(codes.ntotal, codes.d)


def code_bytes(codes: Any) -> np.ndarray:
    """Return the codes (I, bytes) of an index that stores them in item order, without copying them."""
    return faiss.rev_swig_ptr(codes.codes.data(), codes.ntotal * codes.code_size).reshape(codes.ntotal, codes.code_size)


def uses_gpu(device: Device) -> bool:
    """Return whether FAISS is to use a GPU; raises ConfigError where one is demanded and there is none."""
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and num_gpus == 0:
        raise ConfigError(
            f"index.device is 'gpu', but FAISS {faiss.__version__} finds no GPU. Set index.device = auto, or install "
            "faiss-gpu instead of faiss-cpu on a machine with a GPU."
        )
    return device != "cpu" and num_gpus > 0


def without_prefetch_threads(index: Any) -> None:
    """Let a memory-mapped index read its lists in the searching thread, in place.

    FAISS otherwise starts up to 32 threads per query, at ten times the cost of the search.
    """
    ivf = faiss.try_extract_index_ivf(index)
    lists = None if ivf is None else faiss.downcast_InvertedLists(ivf.invlists)
    if isinstance(lists, faiss.OnDiskInvertedLists):
        lists.prefetch_nthread = 0


def to_gpu(resources: Any, cpu_index: Any, gpu: int | None = None) -> Any:
    """Return a copy of a FAISS index on a GPU, by default this process's; `resources` must outlive it."""
    options = faiss.GpuClonerOptions()
    if hasattr(options, "use_cuvs"):
        options.use_cuvs = False  # FAISS's own kernels in every build: one behaviour to test
    if gpu is None:
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return faiss.index_cpu_to_gpu(resources, gpu, cpu_index, options)
