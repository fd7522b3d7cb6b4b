"""Faster fused updates of tables on CPUs, by fbgemm's own kernels.

fbgemm's vectorised update is for tables that one feature looks up, in bags. Tables of several features get a plain
loop, and rows that are looked up one by one a map of vectors, some thirty times as slow. Both can be said as what is
fast: the bags of several features of a table are more bags of one feature, and a row by itself is a bag of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen as Tables
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# What fbgemm calls the updates that are known here.
_UPDATES = {
    EmbOptimType.EXACT_SGD: "sgd",
    EmbOptimType.EXACT_ADAGRAD: "adagrad",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
}


def quicken_updates(model: nn.Module) -> None:
    """Have the tables of a sharded model updated so, where they are on a CPU and it pays.

    Every update is the one that fbgemm makes, but for the order in which a row's gradients are added up.
    """
    for sharded in model.modules():
        for lookup in getattr(sharded, "_lookups", ()):
            for tables in lookup.modules():
                if isinstance(tables, Tables) and _pays(tables):
                    tables.forward = partial(_look_up, tables, tables.forward)


def _pays(tables: Tables) -> bool:
    settings = tables.optimizer_args
    if not tables.use_cpu or tables.optimizer not in _UPDATES:
        return False
    if settings.gradient_clipping or settings.weight_decay or settings.max_norm:
        return False
    return _is_one_by_one(tables) or len(set(tables.feature_table_map)) < len(tables.feature_table_map)


def _is_one_by_one(tables: Tables) -> bool:
    return tables.pooling_mode == PoolingMode.NONE


def _look_up(
    tables: Tables,
    forward: Callable[..., Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """What the tables' own `forward` gives, with our update behind it."""
    if not torch.is_grad_enabled() or any(value is not None for value in others.values()):
        return forward(indices, offsets, per_sample_weights, **others)
    return _LookUp.apply(tables, forward, tables.weights_host, indices, offsets, per_sample_weights)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tables: Tables,
        forward: Callable[..., Tensor],
        weights: Tensor,  # tells autograd that there is something to learn
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
    ) -> Tensor:
        ctx.tables, ctx.indices, ctx.offsets, ctx.weights = tables, indices, offsets, per_sample_weights
        return forward(indices, offsets, per_sample_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        _update(ctx.tables, gradient.contiguous(), ctx.indices, ctx.offsets, ctx.weights)
        return (None,) * 6


def _update(tables: Tables, gradient: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
    """All tables', from the gradient of what was looked up: (bags, dims of all features), or (indices, dim)."""
    places = tables.feature_table_map
    num_bags = (len(offsets) - 1) // len(places)
    first = 0
    for after in range(1, len(places) + 1):  # features from `first` to here are of one table, where the next is not
        if after < len(places) and places[after] == places[first]:
            continue
        ends = offsets[first * num_bags : after * num_bags + 1]
        columns = tables.D_offsets[first : after + 1]
        if _is_one_by_one(tables):
            mine = slice(int(ends[0]), int(ends[-1]))
            bags = torch.arange(mine.stop - mine.start + 1, dtype=offsets.dtype)
            _update_table(tables, first, after, gradient[mine], None, indices[mine], bags, None)
        elif after == first + 1:
            _update_table(tables, first, after, gradient, columns, indices, ends, weights)
        else:
            parts = gradient[:, int(columns[0]) : int(columns[-1])].unflatten(1, (after - first, -1))
            _update_table(tables, first, after, parts.transpose(0, 1).flatten(0, 1), None, indices, ends, weights)
        first = after


def _update_table(
    tables: Tables,
    first: int,
    after: int,
    gradient: Tensor,
    columns: Tensor | None,  # of the gradient that are the table's: their first and their end; None: all
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
) -> None:
    """That of the table of features `first` to `after`, as if of one feature, whose bags' gradients these are."""
    if columns is None:
        columns = torch.tensor([0, gradient.shape[1]], dtype=torch.int32)
    feature = slice(first, first + 1)
    settings: dict[str, Any] = {"learning_rate_tensor": tables.learning_rate_tensor}
    if tables.optimizer != EmbOptimType.EXACT_SGD:
        settings |= {
            "momentum1_host": tables.momentum1_host,
            "momentum1_placements": tables.momentum1_placements[feature],
            "momentum1_offsets": tables.momentum1_offsets[feature],
            "eps": tables.optimizer_args.eps,
        }
    update = getattr(torch.ops.fbgemm, f"split_embedding_backward_codegen_{_UPDATES[tables.optimizer]}_cpu")
    update(
        grad_output=gradient,
        host_weights=tables.weights_host,
        weights_placements=tables.weights_placements[feature],
        weights_offsets=tables.weights_offsets[feature],
        D_offsets=columns,
        max_D=tables.max_D,
        hash_size_cumsum=tables.hash_size_cumsum[[first, after]],
        total_hash_size_bits=tables.total_hash_size_bits,
        indices=indices,
        offsets=offsets,
        pooling_mode=int(PoolingMode.SUM if _is_one_by_one(tables) else tables.pooling_mode),
        indice_weights=weights,
        stochastic_rounding=tables.optimizer_args.stochastic_rounding,
        **settings,
    )
