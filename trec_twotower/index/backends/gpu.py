"""Inverted files on GPUs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from trec_twotower.errors import ConfigError
from trec_twotower.index.backends.faiss_backend import Answer, Device, error_text, faiss, to_gpu
from trec_twotower.index.backends.shard import Shard
from trec_twotower.index.exact import merge

KINDS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)  # fast-scan codes are of another class


class GpuCopies:
    """The shards on this process's GPU, or spread over all GPUs where it has several to itself.

    One search at a time, since a GPU's scratch memory is not shared. The copies know no filters and return no more
    than GPU_LIMIT neighbours from no more than GPU_LIMIT lists; other searches run on the CPU.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        import torch.distributed

        # A rank of a job has the GPU that the job gave it, and no other
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self._lock = threading.Lock()
        self._resources = faiss.StandardGpuResources()  # 1.5 GiB of scratch memory on each GPU, once for all shards
        self._copies = []
        for number, shard in enumerate(shards):
            gpu = number % faiss.get_num_gpus() if alone and len(shards) > 1 else None
            self._copies.append((to_gpu(self._resources, shard.base, gpu), shard.first_row))

    def search(self, vector_BD: np.ndarray, width: int, nprobe: int) -> Answer:
        """Return the best `width` items in each user's `nprobe` best lists."""
        parameters = faiss.SearchParametersIVF(nprobe=nprobe)
        answers = []
        with self._lock:
            for index, first_row in self._copies:
                score_BK, row_BK = index.search(vector_BD, width, params=parameters)
                answers.append((score_BK, np.where(row_BK >= 0, row_BK + first_row, -1)))
        return merge(answers, width)


def gpu_copies(shards: Sequence[Shard], device: Device) -> GpuCopies | None:
    """Return the shards on GPUs if FAISS has their kind there; else None, or a ConfigError if a GPU is demanded."""
    first = shards[0]
    why = ""
    if isinstance(first.base, KINDS) and first.refine is None and isinstance(first.quantizer, faiss.IndexFlat):
        try:
            return GpuCopies(shards)
        except RuntimeError as error:  # codes that FAISS lacks there, such as SQbf16 or PQ16x4, or memory
            why = f" ({error_text(error)})"
    if device == "gpu":
        raise no_gpu_error(first, why)
    return None


def no_gpu_error(shard: Shard, why: str = "") -> ConfigError:
    """Return the error for a kind of index that a GPU is demanded for but cannot search."""
    refined = " with refinement" if shard.refine is not None else ""
    return ConfigError(
        f"index.device is 'gpu', but FAISS has no {type(shard.base).__name__}{refined} there{why}. Use IVF lists of "
        "Flat, SQfp16, SQ8 or PQ codes, or set index.device = auto."
    )
