"""Sharding: the planner's plan, and the model sharded by it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CacheParams, ShardingEnv, ShardingPlan, ShardingType

from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.distributed.host_memory import host_bytes
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.embeddings import table_parameters
from trec_twotower.training.optimizer import state_bytes

# Sharding types that the planner may choose. Column-wise shards have separate row-wise Adagrad states, so that updates
# differ from those on one rank; they and data-parallel tables are used on request only.
AUTO = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
# On the CPUs of one machine communication is cheap, but waiting for the rank with the longest bags is not, and the
# planner does not know the lengths. One sharding type for all tables also needs a single exchange of ids.
SHARED = [ShardingType.ROW_WISE.value]
FREE_SHARE = 0.05  # share of a rank's memory that is not for tables
CACHE_SHARE = 0.2  # default share of a table's rows that fused_uvm_caching keeps on the GPU
# loggers of torchrec's planner
LOUD = (
    "torchrec.distributed.planner",
    "torchrec.distributed.utils",
    "torchrec.distributed.logger",
    "torchrec",
)


class AnySharder(EmbeddingBagCollectionSharder):
    """Sharder that allows row-wise sharding on CPU, which works but torchrec does not offer."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]


class AnyListSharder(EmbeddingCollectionSharder):
    """The same for embedding collections."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]


def _sharders() -> list[EmbeddingBagCollectionSharder | EmbeddingCollectionSharder]:
    return [AnySharder(), AnyListSharder()]


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank for tables, in bytes."""

    host: int
    gpu: int = 0

    @classmethod
    def of(cls, device: torch.device, local_ranks: int) -> RankMemory:
        """Return the memory of each rank of this machine: an equal share of host memory, and its GPU's."""
        gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        return cls(host_bytes() // local_ranks, gpu)


@dataclass(frozen=True)
class TablePlacement:
    """One shard of one table."""

    table: str
    sharding: str
    kernel: str
    rank: int
    rows: int
    columns: int


def make_plan(
    model: nn.Module,
    schema: Schema,
    num_ranks: int,
    device: torch.device,
    batch_size: int,
    local_ranks: int | None = None,
    memory: RankMemory | None = None,
) -> ShardingPlan:
    """Return the planner's plan under the constraints of the tables, equal on every rank without communication.

    (With `collective_plan` the other ranks would wait if the first one fails.) The tables must have their optimizer,
    whose state needs memory as well. `local_ranks` is the number of ranks per machine, by default torchrun's; `memory`
    is that of a rank, by default of this machine. Raises ConfigError if the tables do not fit, or need another device.
    """
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    if local_ranks is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if memory is None:
        memory = RankMemory.of(device, local_ranks)
    for name, spec in schema.tables.items():
        _check(name, spec, num_ranks, local_ranks, device)
    choices = SHARED if device.type == "cpu" and local_ranks == num_ranks > 1 else AUTO
    topology = Topology(
        world_size=num_ranks,
        local_world_size=local_ranks,
        compute_device=device.type,
        hbm_cap=memory.gpu,
        ddr_cap=memory.host,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints={name: _constraints(spec, num_ranks, choices) for name, spec in schema.tables.items()},
        storage_reservation=FixedPercentageStorageReservation(percentage=FREE_SHARE),
    )
    try:
        return planner.plan(model, _sharders())
    except PlannerError as error:
        raise _too_large(model, schema, num_ranks, device, memory, error) from None


def _constraints(spec: TableSpec, num_ranks: int, choices: list[str]) -> ParameterConstraints:
    if spec.sharding == "auto":
        fills_all = _fills_all(spec.buckets, num_ranks)
        kinds = [kind for kind in choices if kind != "row_wise" or fills_all] or [ShardingType.TABLE_WISE.value]
    else:
        kinds = [spec.sharding]
    is_cached = spec.kernel == "fused_uvm_caching"
    return ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=None if spec.sharding == "data_parallel" else [spec.kernel],
        min_partition=spec.shard_columns or shard_columns(spec.dim, num_ranks),
        cache_params=CacheParams(load_factor=spec.cache_share or CACHE_SHARE) if is_cached else None,
    )


def shard_columns(dim: int, num_ranks: int) -> int:
    """Return the width of column-wise shards: a divisor of `dim` and multiple of 4, with at most one shard per rank.

    Every shard looks up all ids of its table, so shards are as wide as possible.
    """
    fitting = (columns for columns in range(4, dim + 1, 4) if dim % columns == 0 and columns * num_ranks >= dim)
    return next(fitting, dim)


def _check(name: str, spec: TableSpec, num_ranks: int, local_ranks: int, device: torch.device) -> None:
    spread = {"row_wise": num_ranks, "table_row_wise": local_ranks}.get(spec.sharding, 1)
    if not _fills_all(spec.buckets, spread):
        raise ConfigError(
            f"Table {name!r} has {spec.buckets} rows, too few to spread {spec.sharding} over {spread} ranks "
            "(some would hold none): use table_wise."
        )
    if spec.kernel != "fused" and device.type == "cpu":
        raise ConfigError(
            f"Table {name!r} has kernel {spec.kernel}, which keeps it in host memory next to a GPU, but there is "
            "none here: set kernel: fused."
        )


def _fills_all(rows: int, num_ranks: int) -> bool:
    """Return whether each rank has a row when all ranks but the last have ceil(rows / ranks) rows.

    fbgemm's CPU updates read out of bounds for a shard without rows.
    """
    return (num_ranks - 1) * -(-rows // num_ranks) < rows


def _too_large(
    model: nn.Module, schema: Schema, num_ranks: int, device: torch.device, memory: RankMemory, error: PlannerError
) -> ConfigError:
    """Return the error with the memory that the tables need and the ranks have."""
    needs = {}
    weights = table_parameters(model)
    for name, spec in schema.tables.items():
        copies = num_ranks if spec.sharding == "data_parallel" else 1
        weight = weights[name]
        needs[name] = copies * (weight.nbytes + state_bytes(weight, *weight.shape))
    largest = max(needs, key=lambda name: needs[name])
    had = f"{_megabytes(memory.host)} of memory"
    if device.type == "cuda":
        had = f"{_megabytes(memory.gpu)} on its GPU and {_megabytes(memory.host)} host memory"
    return ConfigError(
        f"The tables do not fit on {num_ranks} rank{'s' * (num_ranks > 1)}: with the optimizer's state they need "
        f"{_megabytes(sum(needs.values()))}, of which {largest!r} {_megabytes(needs[largest])}, and each rank has "
        f"{had}, of which {FREE_SHARE:.0%} stay free: use more ranks, fewer buckets, a smaller dim or dtype: fp16, or "
        f"leave sharding to auto. (The planner: {str(error).strip().splitlines()[0].strip()})"
    )


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def placements(plan: ShardingPlan) -> list[TablePlacement]:
    """Return the shards of a plan; a data-parallel table has one entry per rank, with 0 rows and columns."""
    found = []
    for module in plan.plan.values():
        for table, parameter in module.items():
            how = (table, parameter.sharding_type, parameter.compute_kernel)
            shards = getattr(parameter.sharding_spec, "shards", None)
            if not shards:
                found += [TablePlacement(*how, rank, 0, 0) for rank in parameter.ranks or []]
                continue
            for shard in shards:
                rows, columns = shard.shard_sizes
                found.append(TablePlacement(*how, shard.placement.rank(), rows, columns))
    return found


def shard(model: nn.Module, schema: Schema, ranks: Ranks, batch_size: int) -> DistributedModelParallel:
    """Return the model with sharded tables and data-parallel other weights."""
    plan = make_plan(model, schema, ranks.num_ranks, ranks.device, batch_size)
    group = dist.group.WORLD
    assert group is not None
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=ranks.device,
        plan=plan,
        sharders=_sharders(),
        init_data_parallel=ranks.num_ranks > 1,  # one rank has no gradients to average
    )
