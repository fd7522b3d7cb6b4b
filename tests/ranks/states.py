"""The weights of a model that lies in pieces on all ranks, put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trec_twotower.distributed.ranks import Ranks
from trec_twotower.training.optimizer import RunOptimizer

Piece = tuple[tuple[int, ...], Tensor]  # where it begins, and what it holds


def whole_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Every weight of the model, whole, on every rank."""
    return {name: whole(value, ranks) for name, value in model.state_dict().items()}


def whole_optimizer_state(optimizer: RunOptimizer, ranks: Ranks) -> dict[str, Tensor]:
    """The optimizer's tensors as "parameter/part"; with tables on some ranks only, names differ from rank to rank."""
    mine = {f"{name}/{part}": value for name, parts in optimizer.state().items() for part, value in parts.items()}
    names: list[Any] = [None] * ranks.num_ranks
    dist.all_gather_object(names, [name for name, value in mine.items() if _pieces(value)[1] is not None])
    return {name: whole(mine.get(name), ranks) for name in sorted({name for found in names for name in found})}


def whole(value: Any, ranks: Ranks) -> Tensor:
    """One weight from its pieces on all ranks; pieces that lie on several ranks must be equal there bit for bit."""
    everyone: list[Any] = [None] * ranks.num_ranks
    dist.all_gather_object(everyone, _pieces(value))
    pieces = [piece for found, _ in everyone for piece in found]
    size = next(size for _, size in everyone if size is not None)
    out = torch.full(size, float("nan"))
    for start, tensor in pieces:
        place = tuple(slice(low, low + length) for low, length in zip(start, tensor.shape, strict=True))
        held = out[place]
        assert held.isnan().all() or torch.equal(held, tensor), "ranks hold different weights in one place"
        out[place] = tensor
    return out


def _pieces(value: Any) -> tuple[list[Piece], tuple[int, ...] | None]:
    """This rank's pieces, and the size of the whole."""
    if hasattr(value, "local_shards"):
        shards = [
            (tuple(shard.metadata.shard_offsets), shard.tensor.detach().clone()) for shard in value.local_shards()
        ]
        return shards, tuple(value.size())
    if isinstance(value, Tensor):
        return [((0,) * value.dim(), value.detach().clone().float())], tuple(value.shape)
    return [], None
