"""FAISS itself: how it is imported, checked, told to use BLAS or a GPU; and exact search to judge an index by."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch

# isort: split
# After torch, whose CUDA libraries have to be loaded first where there is a GPU.
import faiss as _faiss

from trec_twotower.data.kernels import IS_COMPILED
from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.exhaustive import FEW_USERS, ITEMS, best_of_few
from trec_twotower.metrics import blocks_by_length, find_repeats, first_kept

faiss: Any = _faiss  # its type stubs lack what its classes have beyond the plain ones, and the GPU's whole

GPU_LIMIT = 2048  # FAISS's GPU kernels select no more than this, neither neighbours nor lists
USER_BLOCK, ITEM_BLOCK = 256, 1 << 17  # exact search's matrix on a GPU: 128 MiB
PIECE = 1 << 16  # items read, assigned and added at a time

Device = Literal["auto", "cpu", "gpu"]


def reason_of(error: RuntimeError) -> str:
    """What FAISS says is wrong, without the place in its source that it names first."""
    said = " ".join(str(error).split())
    return re.sub(r"^Error in .*?\.\w+:\d+: (Error: )?", "", said)


class Vectors(Protocol):
    """Vectors that can be gone through any number of times without holding all of them: a matrix, or an export."""

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def pieces(self) -> Iterator[np.ndarray]:
        """float32 blocks in order, some 2^16 rows each."""


class Matrix:
    """A matrix as `Vectors`."""

    def __init__(self, vectors: np.ndarray, what: str) -> None:
        self.vectors = as_vectors(vectors, what)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def pieces(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), PIECE):
            yield self.vectors[start : start + PIECE]


# ---------------------------------------------------------------- exact search


class OnDevice:
    """Item vectors on torch's device, for many calls of exact search; moved anew each time where they are too many.

    They stay there if half of its free memory holds them.
    """

    def __init__(self, item_ID: np.ndarray, device: torch.device | str = "cuda") -> None:
        self._item_ID, self.device = as_vectors(item_ID, "item"), torch.device(device)
        self.dim = self._item_ID.shape[1]
        self._kept: list[tuple[int, torch.Tensor]] | None = None
        if self.device.type != "cuda" or 2 * self._item_ID.nbytes <= torch.cuda.mem_get_info(self.device)[0]:
            self._kept = list(self._moved())

    def __len__(self) -> int:
        return len(self._item_ID)

    def blocks(self) -> Iterable[tuple[int, torch.Tensor]]:
        """Some items, (ITEM_BLOCK, D) at most, and the row of their first."""
        return self._moved() if self._kept is None else self._kept

    def _moved(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(0, len(self), ITEM_BLOCK):
            yield first, torch.tensor(self._item_ID[first : first + ITEM_BLOCK], device=self.device)


def exact_search(
    item_ID: np.ndarray | OnDevice,
    user_BD: np.ndarray,
    k: int,
    seen: Lists | None = None,
    *,
    device: Device = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` unseen items of highest score per user by scoring all: float32 and item rows int64, best first.

    Rows end in -inf and -1 where fewer than `k` unseen items exist. Equal scores come in any order. Of users of several
    vectors, (B, M, D), an item's score is the highest by any of them. Items that are on a device are scored there.
    """
    if np.ndim(user_BD) == 3:
        num_users, per_user, dim = user_BD.shape
        each = None if seen is None else seen.take(np.repeat(np.arange(num_users), per_user))
        return merged(exact_search(item_ID, user_BD.reshape(-1, dim), k, each, device=device), num_users, k)
    user_BD = as_vectors(user_BD, "user")
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("Exact search is asked on a GPU but torch sees none: take device 'auto' or 'cpu'.")
    if not isinstance(item_ID, OnDevice) and device != "cpu" and torch.cuda.is_available():
        item_ID = OnDevice(item_ID)
    if isinstance(item_ID, OnDevice):
        check_same_dim(item_ID.dim, user_BD.shape[1])
        return _exact_on_device(item_ID, user_BD, k, seen)
    item_ID = as_vectors(item_ID, "item")
    check_same_dim(item_ID.shape[1], user_BD.shape[1])
    if seen is None:
        return best_of_all(user_BD, item_ID, k)
    seen = seen.distinct()
    score_BK = np.full((len(user_BD), k), -np.inf, np.float32)
    item_row_BK = np.full((len(user_BD), k), -1, np.int64)
    for users in blocks_by_length(seen.lengths, extra=k):
        taken = seen.take(users)
        width = min(k + int(taken.lengths.max()), len(item_ID))
        score_BC, item_row_BC = best_of_all(user_BD[users], item_ID, width)
        keep_BC = (item_row_BC >= 0) & ~taken.contain(item_row_BC)
        score_BK[users], item_row_BK[users] = first_kept(keep_BC, k, (score_BC, -np.inf), (item_row_BC, -1))
    return score_BK, item_row_BK


def merged(found: tuple[np.ndarray, np.ndarray], num_users: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` items of each user, once each, of the answers to its vectors, which lie below each other."""
    score_BC, item_row_BC = (matrix.reshape(num_users, -1) for matrix in found)
    order_BC = np.argsort(-score_BC, axis=1, kind="stable")
    score_BC, item_row_BC = (np.take_along_axis(matrix, order_BC, axis=1) for matrix in (score_BC, item_row_BC))
    keep_BC = (item_row_BC >= 0) & ~find_repeats(item_row_BC)
    score_BK, item_row_BK = first_kept(keep_BC, k, (score_BC, -np.inf), (item_row_BC, -1))
    return score_BK, item_row_BK


def best_of_all(user_BD: np.ndarray, item_ID: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of checked vectors on the CPU, ending in -inf and -1 where there are fewer items."""
    from_batch = use_blas_well(user_BD.shape[1])
    if not len(user_BD) or not len(item_ID):
        return np.full((len(user_BD), k), -np.inf, np.float32), np.full((len(user_BD), k), -1, np.int64)
    if IS_COMPILED and from_batch <= len(user_BD) <= FEW_USERS and len(item_ID) >= ITEMS:
        return best_of_few(item_ID, user_BD, k)
    score_BK, item_row_BK = faiss.knn(user_BD, item_ID, k, metric=faiss.METRIC_INNER_PRODUCT)
    if k > len(item_ID):
        score_BK[item_row_BK < 0] = -np.inf
    return score_BK, item_row_BK


class BestSoFar:
    """The best `k` items of each user among all pieces that were shown: exact search of what is never held whole."""

    def __init__(self, user_BD: np.ndarray, k: int, device: Device = "cpu") -> None:
        self.user_BD, self.k, self._device = user_BD, k, device
        self.score_BK = np.full((len(user_BD), k), -np.inf, np.float32)
        self.item_row_BK = np.full((len(user_BD), k), -1, np.int64)

    def add(self, item_CD: np.ndarray, first_row: int) -> None:
        """Items of rows `first_row` and following."""
        score_BC, row_BC = exact_search(item_CD, self.user_BD, min(self.k, len(item_CD)), device=self._device)
        score = torch.from_numpy(np.concatenate([self.score_BK, score_BC], axis=1))
        item_row_BC = np.concatenate([self.item_row_BK, row_BC + first_row], axis=1)
        best_BK, place_BK = score.topk(self.k, dim=1)
        self.score_BK = best_BK.numpy()
        self.item_row_BK = np.take_along_axis(item_row_BC, place_BK.numpy(), axis=1)


def _exact_on_device(items: OnDevice, user_BD: np.ndarray, k: int, seen: Lists | None) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by torch in blocks of users x items; k is bounded by nothing."""
    best_BK = torch.full((len(user_BD), k), -torch.inf)
    item_row_BK = torch.full((len(user_BD), k), -1, dtype=torch.int64)
    for first_item, item_CD in items.blocks():
        for first_user in range(0, len(user_BD), USER_BLOCK):
            users = slice(first_user, min(first_user + USER_BLOCK, len(user_BD)))
            score_BC = torch.tensor(user_BD[users], device=items.device) @ item_CD.T
            if seen is not None:
                taken = seen.take(np.arange(users.start, users.stop))
                column = taken.values - first_item
                is_here = (column >= 0) & (column < len(item_CD))
                at = (torch.from_numpy(taken.rows[is_here]), torch.from_numpy(column[is_here]))
                score_BC[tuple(part.to(items.device) for part in at)] = -torch.inf
            block_BK, column_BK = (part.cpu() for part in score_BC.topk(min(k, len(item_CD)), dim=1))
            candidate = torch.cat([best_BK[users], block_BK], dim=1)
            candidate_row = torch.cat([item_row_BK[users], column_BK + first_item], dim=1)
            best_BK[users], place_BK = candidate.topk(k, dim=1)
            item_row_BK[users] = candidate_row.gather(1, place_BK)
    item_row_BK[best_BK == -torch.inf] = -1
    return best_BK.numpy(), item_row_BK.numpy()


# ---------------------------------------------------------------- BLAS or FAISS's own loop

_BLAS_FROM: dict[int, int] = {}  # dim -> the least batch that BLAS scores faster here


def use_blas_well(dim: int) -> int:
    """The least batch of users that BLAS scores faster than FAISS's own loop on this machine; sets FAISS to it.

    FAISS compares users x dim with one number, by default 128,000: at dim 64 a batch of 32 users takes the loop, which
    reads all items once a user, and five times the time. Measured at the first call of a process, in some 20 ms.
    """
    if dim not in _BLAS_FROM:
        _BLAS_FROM[dim] = _measure_blas(dim)
    batch = _BLAS_FROM[dim]
    faiss.cvar.distance_compute_blas_threshold = batch * dim
    return batch


def _measure_blas(dim: int) -> int:
    rng = np.random.default_rng(0)
    items = faiss.IndexFlatIP(dim)
    items.add(rng.standard_normal((max(1024, (1 << 19) // dim), dim), dtype=np.float32))
    from_batch = 2  # a single user is a matrix times a vector, which the loop does as well
    for batch in (2, 4, 8, 16, 32, 64, 128):
        users = rng.standard_normal((batch, dim), dtype=np.float32)
        seconds = []
        for threshold in (0, 1 << 30):
            faiss.cvar.distance_compute_blas_threshold = threshold
            seconds.append(least_time(lambda: items.search(users, 10), 3))  # noqa: B023 - called here and now
        if seconds[0] > seconds[1]:
            from_batch = 2 * batch
    return from_batch


def least_time(call: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


# ---------------------------------------------------------------- GPU


def uses_gpu(device: Device) -> bool:
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and num_gpus == 0:
        raise ConfigError(
            f"index.device is 'gpu' but FAISS {faiss.__version__} sees no GPU here: set index.device = auto, "
            "or install faiss-gpu in place of faiss-cpu on a machine with a GPU."
        )
    return device != "cpu" and num_gpus > 0


def to_gpu(resources: Any, on_cpu: Any, number: int | None = None) -> Any:
    """A copy of a FAISS index on a GPU, by default this process's; `resources` must outlive it."""
    options = faiss.GpuClonerOptions()
    if hasattr(options, "use_cuvs"):
        options.use_cuvs = False  # FAISS's own kernels whatever the build: one behaviour to test
    if number is None:
        number = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return faiss.index_cpu_to_gpu(resources, number, on_cpu, options)


# ---------------------------------------------------------------- checks


def as_vectors(vectors: np.ndarray, what: str) -> np.ndarray:
    """The vectors as FAISS takes them: rows of float32 in one piece, all finite."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise ConfigError(f"The {what} vectors have shape {vectors.shape}: give a matrix, one row per {what}.")
    if math.isfinite(np.vdot(vectors, vectors)):  # no NaN and no infinity leaves a sum of squares finite
        return vectors
    with np.errstate(all="ignore"):
        suspect = np.flatnonzero(~np.isfinite(vectors.sum(axis=1)))
    bad = suspect[~np.isfinite(vectors[suspect]).all(axis=1)]
    if len(bad):
        raise DataError(
            f"{len(bad):,} of {len(vectors):,} {what} vectors hold NaN or infinity, the first in rows "
            f"{bad[:5].tolist()}: the model has diverged, train it again with a lower learning rate."
        )
    return vectors


def check_same_dim(item_dim: int, user_dim: int) -> None:
    if item_dim != user_dim:
        raise ConfigError(
            f"The items' vectors have {item_dim} numbers and the users' {user_dim}: both must come from the same model."
        )
