"""Which rank holds which part of which table: the planner's plan, and the model spread by it."""

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

# What the planner may choose freely. Not column-wise: it gives each shard a row-wise Adagrad state of its own, and so
# other updates than on one rank; that, and copies on every rank, only on request.
AUTO = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
# On the CPUs of one machine what travels costs little, and ranks that wait for the one with the longest bags much: the
# planner knows of no lengths. One kind for all also means one exchange of ids, and not one for each kind.
SHARED = [ShardingType.ROW_WISE.value]
FREE_SHARE = 0.05  # of a rank's memory, which the planner leaves for everything but the tables
CACHE_SHARE = 0.2  # default share of a table's rows that fused_uvm_caching keeps on the GPU
# torchrec logs every step of its planner.
LOUD = (
    "torchrec.distributed.planner",
    "torchrec.distributed.utils",
    "torchrec.distributed.logger",
    "torchrec",
)


class AnySharder(EmbeddingBagCollectionSharder):
    """torchrec hides row-wise sharding on CPU, where it works."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]


class AnyListSharder(EmbeddingCollectionSharder):
    """The same for tables whose rows are wanted one by one."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]


def _sharders() -> list[EmbeddingBagCollectionSharder | EmbeddingCollectionSharder]:
    return [AnySharder(), AnyListSharder()]


@dataclass(frozen=True)
class RankMemory:
    """What a rank has for tables, in bytes."""

    host: int
    gpu: int = 0

    @classmethod
    def of(cls, device: torch.device, local_ranks: int) -> RankMemory:
        """That of this machine's ranks: its memory in equal parts, and the GPU's own."""
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
    """The planner's plan under the tables' constraints; the same on every rank, without talking to the others.

    (`collective_plan` would leave the other ranks waiting where the first one fails.) The tables must know their
    optimizer by now, whose state takes memory as well. `local_ranks` is how many ranks a machine has: as torchrun says,
    if it is not given; `memory` that of a rank, by default of this machine's. Raises ConfigError where the tables do
    not fit, or want what this device has not.
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
    """How wide column-wise shards are: a divisor of `dim` that is a multiple of 4, so that each rank gets one at most.

    Every shard looks up all ids of its table, so that none should be narrower than it must.
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
            f"Table {name!r} has kernel {spec.kernel}, which keeps it in host memory beside a GPU, but there is none "
            "here: set kernel: fused."
        )


def _fills_all(rows: int, num_ranks: int) -> bool:
    """Whether each rank gets a row when all but the last take ceil(rows / ranks) of them.

    fbgemm's CPU updates read beyond their memory where a shard has no rows.
    """
    return (num_ranks - 1) * -(-rows // num_ranks) < rows


def _too_large(
    model: nn.Module, schema: Schema, num_ranks: int, device: torch.device, memory: RankMemory, error: PlannerError
) -> ConfigError:
    """What the tables need and the ranks have."""
    needs = {}
    weights = table_parameters(model)
    for name, spec in schema.tables.items():
        copies = num_ranks if spec.sharding == "data_parallel" else 1
        weight = weights[name]
        needs[name] = copies * (weight.nbytes + state_bytes(weight, *weight.shape))
    largest = max(needs, key=lambda name: needs[name])
    had = f"{_megabytes(memory.host)} of memory"
    if device.type == "cuda":
        had = f"{_megabytes(memory.gpu)} on its GPU and {_megabytes(memory.host)} beside it"
    return ConfigError(
        f"The tables do not fit on {num_ranks} rank{'s' * (num_ranks > 1)}: with the optimizer's state they need "
        f"{_megabytes(sum(needs.values()))}, of which {largest!r} {_megabytes(needs[largest])}, and each rank has "
        f"{had}, of which {FREE_SHARE:.0%} stay free: use more ranks, fewer buckets, a smaller dim or dtype: fp16, or "
        f"leave sharding to auto. (The planner: {str(error).strip().splitlines()[0].strip()})"
    )


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def placements(plan: ShardingPlan) -> list[TablePlacement]:
    """The plan as a list, one entry a shard; a data-parallel table stands once a rank, with 0 rows and columns."""
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
    """The model with its tables spread over the ranks and its other weights kept equal on all."""
    plan = make_plan(model, schema, ranks.num_ranks, ranks.device, batch_size)
    group = dist.group.WORLD
    assert group is not None
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=ranks.device,
        plan=plan,
        sharders=_sharders(),
        init_data_parallel=ranks.num_ranks > 1,  # one rank has nobody to average gradients with
    )
