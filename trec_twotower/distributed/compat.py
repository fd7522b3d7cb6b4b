"""Private names of torch, torchrec and fbgemm that this package depends on, each in one function.

A name with a public replacement falls back to it. A name without one raises UnsupportedVersion, which reports the
installed version and the versions that this module was tested with.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trec_twotower.errors import ConfigError

TESTED = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}
DISTRIBUTIONS = {"fbgemm-gpu": ("fbgemm-gpu", "fbgemm-gpu-cpu")}  # of a library with one package per device type


class UnsupportedVersion(ConfigError):
    """An installed library lacks a private name that this package needs."""

    def __init__(self, library: str, name: str) -> None:
        super().__init__(
            f"{library} {installed_version(library)} has no {name}, which trec_twotower uses: install "
            f"{library}=={TESTED[library]}, the version it was tested with."
        )

    def __reduce__(self) -> tuple[Any, ...]:  # ranks send errors to each other
        return ConfigError, self.args


def installed_version(library: str) -> str:
    """Return the installed version of a library of `TESTED`, "unknown" where it has no package metadata."""
    for name in DISTRIBUTIONS.get(library, (library,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def set_collective_timeout(timeout: timedelta) -> None:
    """Set the timeout of the default process group, from now on."""
    if hasattr(dist, "set_timeout"):  # public from torch 2.14 on
        dist.set_timeout(timeout)
        return
    private = getattr(torch.distributed.distributed_c10d, "_set_pg_timeout", None)
    if private is None:
        raise UnsupportedVersion("torch", "distributed.set_timeout")
    private(timeout)


def cpu_supports(instructions: Literal["avx512_bf16", "amx_tile"]) -> bool:
    """Return whether this CPU has these instructions; False where torch cannot report it."""
    is_supported = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return is_supported is not None and is_supported()


def lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Move each average toward its value, in place: average + weight * (value - average)."""
    fused = getattr(torch, "_foreach_lerp_", None)
    if fused is not None:
        fused(list(averages), list(values), weight)
        return
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, weight)


def local_shards(value: Any) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Return the shards of a tensor on this rank, each with its offsets; a tensor that is not sharded is one shard.

    (torch's ShardedTensor has no public import path, so it is recognized by its method.)
    """
    if not hasattr(value, "local_shards"):
        return [(value, (0,) * value.dim())]
    return [(shard.tensor, tuple(shard.metadata.shard_offsets)) for shard in value.local_shards()]


def table_optimizer(weight: nn.Parameter) -> type[torch.optim.Optimizer] | None:
    """Return the optimizer class that `apply_optimizer_in_backward` attached to a table; None where none was."""
    classes = getattr(weight, "_optimizer_classes", None)
    if classes is None and hasattr(weight, "_in_backward_optimizers"):
        raise UnsupportedVersion("torchrec", "Parameter._optimizer_classes")
    return None if classes is None else classes[0]


def lookup_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module inside the lookups of a model's sharded collections: among them fbgemm's tables."""
    from torchrec.distributed.types import ShardedModule

    for collection in model.modules():
        lookups = getattr(collection, "_lookups", None)
        if lookups is None and isinstance(collection, ShardedModule):
            raise UnsupportedVersion("torchrec", f"{type(collection).__name__}._lookups")
        for lookup in lookups or ():
            yield from lookup.modules()
