"""Which rank holds which part of which table: the planner's plan, and the model spread by it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType

from trec_twotower.config import RunConfig
from trec_twotower.distributed import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.embedding import build_tables
from trec_twotower.schema import Schema, TableSpec

# What the planner may choose freely. Not column-wise: it gives each shard a row-wise Adagrad state of its own, and so
# other updates than on one rank; that, and copies on every rank, only on request.
AUTO = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
# torchrec tells of every step of its planner, at length.
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


@dataclass(frozen=True)
class TablePlacement:
    """One shard of one table."""

    table: str
    sharding: str
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
) -> ShardingPlan:
    """The planner's plan under the tables' constraints; the same on every rank, without talking to the others.

    (`collective_plan` would leave the other ranks waiting where the first one fails.) `local_ranks` is how many ranks
    a machine has: as torchrun says, if it is not given. Raises ConfigError where the tables do not fit.
    """
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    if local_ranks is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    constraints = {}
    for name, spec in schema.tables.items():
        if spec.sharding == "auto":
            kinds = [kind for kind in AUTO if kind != "row_wise" or _fills_all(spec.buckets, num_ranks)]
        else:
            kinds = [spec.sharding]
            _check_kind(name, spec, num_ranks, local_ranks)
        constraints[name] = ParameterConstraints(sharding_types=kinds, min_partition=min(spec.dim, 4))
    topology = Topology(world_size=num_ranks, local_world_size=local_ranks, compute_device=device.type)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.05),
    )
    try:
        return planner.plan(model, [AnySharder()])
    except PlannerError as error:
        table_bytes = {name: spec.buckets * spec.dim * 4 for name, spec in schema.tables.items()}
        largest = max(table_bytes, key=lambda name: table_bytes[name])
        raise ConfigError(
            f"The tables do not fit on {num_ranks} ranks: their weights are {sum(table_bytes.values()) / 1e9:,.1f} GB, "
            f"of which {largest!r} has {table_bytes[largest] / 1e9:,.1f}: use more ranks, fewer buckets or a smaller "
            f"dim, or leave sharding to auto. (The planner: {str(error).strip().splitlines()[0].strip()})"
        ) from None


def _check_kind(name: str, spec: TableSpec, num_ranks: int, local_ranks: int) -> None:
    spread = {"row_wise": num_ranks, "table_row_wise": local_ranks}.get(spec.sharding, 1)
    if not _fills_all(spec.buckets, spread):
        raise ConfigError(
            f"Table {name!r} has {spec.buckets} rows, too few to spread {spec.sharding} over {spread} ranks "
            "(some would hold none): use table_wise."
        )
    if spec.sharding == "column_wise" and spec.dim % 4:
        raise ConfigError(
            f"Table {name!r} has dim {spec.dim}, but column_wise sharding needs a multiple of 4: change dim."
        )


def _fills_all(rows: int, num_ranks: int) -> bool:
    """Whether each rank gets a row when all but the last take ceil(rows / ranks) of them.

    fbgemm's CPU updates read beyond their memory where a shard has no rows.
    """
    return (num_ranks - 1) * -(-rows // num_ranks) < rows


def placements(plan: ShardingPlan) -> list[TablePlacement]:
    """The plan as a list, one entry a shard; a data-parallel table stands once a rank, with 0 rows and columns."""
    found = []
    for module in plan.plan.values():
        for table, parameter in module.items():
            shards = getattr(parameter.sharding_spec, "shards", None)
            if not shards:
                found += [TablePlacement(table, parameter.sharding_type, rank, 0, 0) for rank in parameter.ranks or []]
                continue
            for shard in shards:
                rows, columns = shard.shard_sizes
                found.append(TablePlacement(table, parameter.sharding_type, shard.placement.rank(), rows, columns))
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
        sharders=[AnySharder()],
    )


def describe_plan(config: RunConfig, num_ranks: int) -> str:
    """The plan of a config as a table, made without building a table or starting a rank."""
    schema = config.feature_schema
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = _OnlyTables(build_tables(schema))
    plan = make_plan(tables, schema, num_ranks, device, config.data.batch_size // num_ranks + 1, local_ranks=num_ranks)
    adagrad = {"rowwise_adagrad": 1, "adagrad": None, "sgd": 0}[config.train.optimizer.sparse]
    lines = [
        f"{'table':<20} {'sharding':<16} {'rank':>4} {'rows':>13} {'columns':>7} {'weights MB':>11} {'state MB':>9}"
    ]
    total = [0] * num_ranks
    for shard_ in placements(plan):
        spec = schema.tables[shard_.table]
        is_whole = shard_.sharding == ShardingType.DATA_PARALLEL.value
        rows, columns = (spec.buckets, spec.dim) if is_whole else (shard_.rows, shard_.columns)
        weights = rows * columns * 4
        state = rows * 4 * (columns if adagrad is None else adagrad)
        total[shard_.rank] += weights + state
        lines.append(
            f"{shard_.table:<20} {shard_.sharding:<16} {shard_.rank:>4} {rows:>13,} {columns:>7} "
            f"{weights / 1e6:>11,.1f} {state / 1e6:>9,.1f}"
        )
    lines += [
        f"rank {rank}: {size / 1e6:,.1f} MB of tables and their optimizer's state" for rank, size in enumerate(total)
    ]
    return "\n".join(lines)


class _OnlyTables(nn.Module):
    """The planner wants the tables as part of a model."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables
