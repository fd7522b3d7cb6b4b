"""FAISS itself: one IVF index on CPU or GPU behind one search, and exact search to judge it by."""

from __future__ import annotations

import threading
from typing import Any, Literal

import numpy as np
import torch

# isort: split
# After torch, whose CUDA libraries have to be loaded first where there is a GPU.
import faiss

from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError, DataError

GPU_LIMIT = 2048  # FAISS's GPU kernels select no more than this, neither neighbours nor lists
USER_BLOCK, ITEM_BLOCK = 256, 1 << 17  # exact search's matrix: 128 MiB

Device = Literal["auto", "cpu", "gpu"]


def exact_search(
    item_ID: np.ndarray, user_BD: np.ndarray, k: int, seen: Lists | None = None, *, device: Device = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` unseen items of highest score per user by scoring all: float32 and item rows int64, best first.

    Rows end in -inf and -1 where fewer than `k` unseen items exist. Memory is bounded by blocks of
    users x items; equal scores come in any order.
    """
    item_ID, user_BD = as_vectors(item_ID, "item"), as_vectors(user_BD, "user")
    check_same_dim(item_ID, user_BD)
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("Exact search is asked on a GPU but torch sees none: take device 'auto' or 'cpu'.")
    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    best_BK = torch.full((len(user_BD), k), -torch.inf)
    item_row_BK = torch.full((len(user_BD), k), -1, dtype=torch.int64)
    for first_item in range(0, len(item_ID), ITEM_BLOCK):
        item_CD = torch.tensor(item_ID[first_item : first_item + ITEM_BLOCK], device=where)
        for first_user in range(0, len(user_BD), USER_BLOCK):
            users = slice(first_user, min(first_user + USER_BLOCK, len(user_BD)))
            score_BC = torch.tensor(user_BD[users], device=where) @ item_CD.T
            if seen is not None:
                taken = seen.take(np.arange(users.start, users.stop))
                column = taken.values - first_item
                is_here = (column >= 0) & (column < len(item_CD))
                at = (torch.from_numpy(taken.rows[is_here]), torch.from_numpy(column[is_here]))
                score_BC[tuple(part.to(where) for part in at)] = -torch.inf
            block_BK, column_BK = (part.cpu() for part in score_BC.topk(min(k, len(item_CD)), dim=1))
            candidate = torch.cat([best_BK[users], block_BK], dim=1)
            candidate_row = torch.cat([item_row_BK[users], column_BK + first_item], dim=1)
            best_BK[users], place_BK = candidate.topk(k, dim=1)
            item_row_BK[users] = candidate_row.gather(1, place_BK)
    item_row_BK[best_BK == -torch.inf] = -1
    return best_BK.numpy(), item_row_BK.numpy()


class Engine:
    """One FAISS IVF index on the CPU and, where wanted, its copy on the GPU, behind one search."""

    def __init__(self, on_cpu: Any, device: Device) -> None:
        self.on_cpu = on_cpu
        self.dim, self.num_items, self.num_lists = on_cpu.d, on_cpu.ntotal, on_cpu.nlist
        self._on_gpu = _GpuCopy(on_cpu) if uses_gpu(device) else None
        self.device = "gpu" if self._on_gpu else "cpu"

    def search(self, user_BD: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's own answer: rows end in -1 where the probed lists hold fewer than k items."""
        if self._on_gpu is not None and max(k, nprobe) <= GPU_LIMIT:
            return self._on_gpu.search(user_BD, k, nprobe)
        return self.on_cpu.search(user_BD, k, params=_probing(nprobe))

    def scanned_share(self, user_BD: np.ndarray, nprobe: int) -> float:
        """The mean share of the catalogue that lies in a user's `nprobe` lists."""
        size_L = np.array([self.on_cpu.invlists.list_size(each) for each in range(self.num_lists)])
        _, probed_BL = self.on_cpu.quantizer.search(user_BD, nprobe)
        return float(size_L[probed_BL].sum(axis=1).mean() / self.num_items)


class _GpuCopy:
    """A FAISS index on this process's GPU, one search at a time: its scratch memory is not shared."""

    def __init__(self, on_cpu: Any) -> None:
        self._resources = faiss.StandardGpuResources()
        self._index = to_gpu(self._resources, on_cpu)
        self._lock = threading.Lock()

    def search(self, user_BD: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            return self._index.search(user_BD, k, params=_probing(nprobe))


def _probing(nprobe: int) -> Any:
    """Search parameters rather than the index's own nprobe, which all threads share."""
    parameters = faiss.SearchParametersIVF()
    parameters.nprobe = nprobe
    return parameters


def uses_gpu(device: Device) -> bool:
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and num_gpus == 0:
        raise ConfigError(
            f"index.device is 'gpu' but FAISS {faiss.__version__} sees no GPU here: set index.device = auto, "
            "or install faiss-gpu in place of faiss-cpu on a machine with a GPU."
        )
    return device != "cpu" and num_gpus > 0


def to_gpu(resources: Any, on_cpu: Any) -> Any:
    """A copy of a FAISS index on this process's GPU; `resources` must outlive it."""
    options = faiss.GpuClonerOptions()
    if hasattr(options, "use_cuvs"):
        options.use_cuvs = False  # FAISS's own kernels whatever the build: one behaviour to test
    number = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return faiss.index_cpu_to_gpu(resources, number, on_cpu, options)


def as_vectors(vectors: np.ndarray, what: str) -> np.ndarray:
    """The vectors as FAISS takes them: rows of float32 in one piece, all finite."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise ConfigError(f"The {what} vectors have shape {vectors.shape}: give a matrix, one row per {what}.")
    with np.errstate(all="ignore"):
        suspect = np.flatnonzero(~np.isfinite(vectors.sum(axis=1)))
    bad = suspect[~np.isfinite(vectors[suspect]).all(axis=1)]
    if len(bad):
        raise DataError(
            f"{len(bad):,} of {len(vectors):,} {what} vectors hold NaN or infinity, the first in rows "
            f"{bad[:5].tolist()}: the model has diverged, train it again with a lower learning rate."
        )
    return vectors


def check_same_dim(item_ID: np.ndarray, user_BD: np.ndarray) -> None:
    if item_ID.shape[1] != user_BD.shape[1]:
        raise ConfigError(
            f"The items' vectors have {item_ID.shape[1]} numbers and the users' {user_BD.shape[1]}: "
            "both must come from the same model."
        )
