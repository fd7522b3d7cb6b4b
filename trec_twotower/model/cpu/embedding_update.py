"""Faster fused updates of tables on CPUs, by fbgemm's own kernels.

fbgemm's vectorised update is for tables that one feature looks up, in bags. Tables of several features get a plain
loop, and rows that are looked up one by one a map of vectors, some thirty times as slow. Both can be said as what is
fast: the bags of several features of a table are more bags of one feature, and a row by itself is a bag of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen as Tables
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trec_twotower.distributed.compat import fbgemm_cpu_update, lookup_modules, replace_forward

# What fbgemm calls the updates that are known here.
_UPDATES = {
    EmbOptimType.EXACT_SGD: "sgd",
    EmbOptimType.EXACT_ADAGRAD: "adagrad",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
}


def accelerate_updates(model: nn.Module) -> None:
    """Make the tables of a sharded model use the faster update, where they are on a CPU and it pays.

    Every update equals fbgemm's, but for the order in which a row's gradients are added up.
    """
    for tables in lookup_modules(model):
        if isinstance(tables, Tables) and _pays(tables):
            replace_forward(tables, partial(_look_up, weakref.ref(tables), _each(tables)))


def _pays(tables: Tables) -> bool:
    settings = tables.optimizer_args
    if not tables.use_cpu or tables.optimizer not in _UPDATES:
        return False
    if settings.gradient_clipping or settings.weight_decay or settings.max_norm:
        return False
    return _is_one_by_one(tables) or len(set(tables.feature_table_map)) < len(tables.feature_table_map)


def _is_one_by_one(tables: Tables) -> bool:
    return tables.pooling_mode == PoolingMode.NONE


@dataclass(frozen=True)
class _Table:
    """One of them: its features, which stand behind each other, and what its update is told of it."""

    features: range
    columns: slice  # of the pooled bags, all features'
    about: dict[str, Any]  # as of one feature


def _each(tables: Tables) -> list[_Table]:
    """The tables in the order of their features."""
    places = tables.feature_table_map
    starts = [number for number in range(len(places)) if number == 0 or places[number] != places[number - 1]]
    found = []
    for first, after in pairwise([*starts, len(places)]):
        one = slice(first, first + 1)
        columns = slice(int(tables.D_offsets[first]), int(tables.D_offsets[after]))
        dim = (columns.stop - columns.start) // (after - first)
        is_whole = _is_one_by_one(tables) or after > first + 1  # its gradients alone are given, feature below feature
        about = {
            "weights_placements": tables.weights_placements[one],
            "weights_offsets": tables.weights_offsets[one],
            "D_offsets": torch.tensor([0, dim] if is_whole else [columns.start, columns.stop], dtype=torch.int32),
            "hash_size_cumsum": tables.hash_size_cumsum[[first, after]],
        }
        if tables.optimizer != EmbOptimType.EXACT_SGD:
            about["momentum1_placements"] = tables.momentum1_placements[one]
            about["momentum1_offsets"] = tables.momentum1_offsets[one]
        found.append(_Table(range(first, after), columns, about))
    return found


def _look_up(
    held: weakref.ref[Tables],  # what the tables hold themselves
    each: Sequence[_Table],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """What the tables' own `forward` gives, with our update behind it."""
    tables = held()
    assert tables is not None
    learns_weights = per_sample_weights is not None and per_sample_weights.requires_grad
    if not torch.is_grad_enabled() or learns_weights or any(value is not None for value in others.values()):
        return Tables.forward(tables, indices, offsets, per_sample_weights, **others)
    return _LookUp.apply(tables, each, tables.weights_host, indices, offsets, per_sample_weights)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tables: Tables,
        each: Sequence[_Table],
        weights: Tensor,  # tells autograd that there is something to learn
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
    ) -> Tensor:
        ctx.tables, ctx.each, ctx.given = tables, each, (indices, offsets, per_sample_weights)
        return Tables.forward(tables, indices, offsets, per_sample_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        gradient = gradient.contiguous()
        for table in ctx.each:
            _update(ctx.tables, table, gradient, *ctx.given)
        return (None,) * 6


def _update(
    tables: Tables, table: _Table, gradient: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None
) -> None:
    """One table's, from the gradient of all that was looked up: (bags, dims of all features), or (indices, dim)."""
    num_bags = (len(offsets) - 1) // len(tables.feature_table_map)
    offsets = offsets[table.features.start * num_bags : table.features.stop * num_bags + 1]
    if _is_one_by_one(tables):
        mine = slice(int(offsets[0]), int(offsets[-1]))
        gradient, indices = gradient[mine], indices[mine]
        offsets = torch.arange(len(indices) + 1, dtype=offsets.dtype)
    elif len(table.features) > 1:
        by_feature = gradient[:, table.columns].unflatten(1, (len(table.features), -1))
        gradient = by_feature.transpose(0, 1).flatten(0, 1)
    settings = tables.optimizer_args
    state = {}
    if tables.optimizer != EmbOptimType.EXACT_SGD:
        state = {"momentum1_host": tables.momentum1_host, "eps": settings.eps}
    update = fbgemm_cpu_update(_UPDATES[tables.optimizer])
    update(
        grad_output=gradient,
        host_weights=tables.weights_host,
        max_D=tables.max_D,
        total_hash_size_bits=tables.total_hash_size_bits,
        indices=indices,
        offsets=offsets,
        pooling_mode=int(PoolingMode.SUM if _is_one_by_one(tables) else tables.pooling_mode),
        indice_weights=weights,
        stochastic_rounding=settings.stochastic_rounding,
        learning_rate_tensor=tables.learning_rate_tensor,
        **state,
        **table.about,
    )
