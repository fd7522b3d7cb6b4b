"""The sharding plan of a config before anything is built: bytes per shard, and the planner's estimate of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Perf, ShardingOption
from torchrec.distributed.types import CacheParams

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import HISTORY, FeatureSpec
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.schema import Schema, delta_key, lookup_key, sub_name
from trec_twotower.data.dataset import POSITIVES, TRAIN_USERS
from trec_twotower.data.parquet_files import UNREADABLE, folder_of, parquet_files
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.model.embeddings import build_embedding_bag_collection, build_embedding_collection, table_parameters
from trec_twotower.training.optimizer import check_optimizer, fuse_table_updates, state_bytes
from trec_twotower.training.sharding import (
    CACHE_SHARE,
    AnyListSharder,
    AnySharder,
    RankMemory,
    TablePlacement,
    make_plan,
    placements,
)
from trec_twotower.training.spectral_initialization import check_start

ASSUMED_IDS = 20  # ids of a bag whose length is known neither from the data nor from max_length


def describe_plan(config: RunConfig, num_ranks: int, gpu_gb: float | None = None) -> str:
    """Return the plan of a config as text, without building a table or starting a rank.

    All ranks are on this machine. With `gpu_gb` the plan is for GPUs of that memory, which need not exist here. Raises
    ConfigError where the tables do not fit.
    """
    schema = config.feature_schema
    is_gpu = gpu_gb is not None or torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    memory = RankMemory.of(device if gpu_gb is None else torch.device("cpu"), num_ranks)
    if gpu_gb is not None:
        memory = RankMemory(memory.host, int(gpu_gb * 1e9))
    check_optimizer(config.train.optimizer, schema, device.type)
    if config.train.spectral is not None:
        check_start(schema, config.train.spectral)
    model = OnlyTables(schema)
    fuse_table_updates(model, config.train.optimizer)
    rows_per_rank = config.data.batch_size // num_ranks + 1
    plan = make_plan(model, schema, num_ranks, device, rows_per_rank, local_ranks=num_ranks, memory=memory)
    shards = placements(plan)
    topology = Topology(
        world_size=num_ranks,
        local_world_size=num_ranks,
        compute_device=device.type,
        hbm_cap=memory.gpu,
        ddr_cap=memory.host,
    )
    lines = [*_memory_lines(model, shards, num_ranks), ""]
    if config.ends_in_closed_form:  # a step trains the tables of the config without the closed form
        config = config.without_closed_form
        shards = [shard for shard in shards if shard.table in config.feature_schema.tables]
        model = OnlyTables(config.feature_schema)
        fuse_table_updates(model, config.train.optimizer)
    lengths, source = mean_lengths(config)
    options = estimate_step(model, shards, topology, rows_per_rank, lengths)
    title = (
        f"TorchRec planner's estimate of a step of {config.data.batch_size:,} rows on its default hardware ({source})"
    )
    return "\n".join([*lines, title, *_estimate_lines(options, shards, num_ranks)])


class OnlyTables(nn.Module):
    """The tables of a model on the meta device, as the planner reads them."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.schema = schema
        self.tables = build_embedding_bag_collection(schema)
        self.lists = build_embedding_collection(schema)
        self.weights = table_parameters(self)

    def keys_by_table(self) -> dict[str, list[str]]:
        """Return the keys that look up each table, in the order of its feature names."""
        configs = [*(self.tables.embedding_bag_configs() if self.tables else ())]
        configs += self.lists.embedding_configs() if self.lists else ()
        return {each.name: each.feature_names for each in configs}


@dataclass(frozen=True)
class ShardBytes:
    """Bytes of a shard; with a cache, `gpu` is the cache and its index, and `host` the whole shard."""

    weights: int
    state: int
    gpu: int
    host: int


def shard_bytes(model: OnlyTables, shard: TablePlacement) -> ShardBytes:
    """Return the bytes of a shard on its rank."""
    spec = model.schema.tables[shard.table]
    rows, columns = (shard.rows, shard.columns) if shard.rows else (spec.buckets, spec.dim)
    weights = rows * columns * spec.weight_bytes
    state = state_bytes(model.weights[shard.table], rows, columns)
    if shard.kernel not in ("fused_uvm", "fused_uvm_caching"):
        return ShardBytes(weights, state, weights + state, 0)
    share = (spec.cache_share or CACHE_SHARE) if shard.kernel == "fused_uvm_caching" else 0.0
    index_bytes = rows * (4 + 16 * share) if share else 0.0  # a slot per row; a row and a timestamp per slot
    return ShardBytes(weights, state, int(weights * share + index_bytes), weights + state)


def _memory_lines(model: OnlyTables, shards: list[TablePlacement], num_ranks: int) -> list[str]:
    lines = [
        f"{'table':<20} {'sharding':<16} {'kernel':<18} {'rank':>4} {'rows':>13} {'columns':>7} {'weights MB':>11} "
        f"{'state MB':>9}"
    ]
    gpu_bytes, host_bytes = [0] * num_ranks, [0] * num_ranks
    for shard in shards:
        spec, size = model.schema.tables[shard.table], shard_bytes(model, shard)
        rows, columns = (shard.rows, shard.columns) if shard.rows else (spec.buckets, spec.dim)
        gpu_bytes[shard.rank] += size.gpu
        host_bytes[shard.rank] += size.host
        lines.append(
            f"{shard.table:<20} {shard.sharding:<16} {shard.kernel:<18} {shard.rank:>4} {rows:>13,} {columns:>7} "
            f"{size.weights / 1e6:>11,.1f} {size.state / 1e6:>9,.1f}"
        )
    for rank in range(num_ranks):
        more = f", and {host_bytes[rank] / 1e6:,.1f} MB in host memory" if any(host_bytes) else ""
        lines.append(f"rank {rank}: {gpu_bytes[rank] / 1e6:,.1f} MB of tables and optimizer state{more}")
    return lines


# ---------------------------------------------------------------- the planner's estimate of a step


def estimate_step(
    model: OnlyTables,
    shards: Sequence[TablePlacement],
    topology: Topology,
    rows_per_rank: int,
    lengths: Mapping[str, float],
) -> list[ShardingOption]:
    """Return TorchRec's estimates of time and memory for each table as it is placed.

    `lengths` has the mean number of ids per row by key. They are given to the estimator only: the plan of a training is
    made without them, so they must not change it.
    """
    placed = {shard.table: shard for shard in shards}
    constraints = {}
    for table, keys in model.keys_by_table().items():
        shard, spec = placed[table], model.schema.tables[table]
        cache = CacheParams(load_factor=spec.cache_share or CACHE_SHARE) if "caching" in shard.kernel else None
        constraints[table] = ParameterConstraints(
            sharding_types=[shard.sharding],
            compute_kernels=[shard.kernel],
            min_partition=shard.columns or None,
            pooling_factors=[lengths[each] for each in keys],
            cache_params=cache,
        )
    enumerator = EmbeddingEnumerator(topology, rows_per_rank, constraints)
    return enumerator.enumerate(model, [AnySharder(), AnyListSharder()])


def _estimate_lines(options: Sequence[ShardingOption], shards: Sequence[TablePlacement], num_ranks: int) -> list[str]:
    """Return a line per table with the times of its slowest shard, and one per rank with the total time."""
    lines = [
        f"{'table':<20} {'ids per row':>11} {'lookup ms':>10} {'update ms':>10} {'exchange ms':>11} {'memory MB':>10}"
    ]
    total = dict.fromkeys(range(num_ranks), 0.0)
    for option in options:
        perfs = [shard.perf for shard in option.shards if shard.perf is not None]
        slowest = max(perfs, key=lambda perf: perf.total)
        largest = max(shard.storage.hbm + shard.storage.ddr for shard in option.shards if shard.storage is not None)
        lines.append(
            f"{option.name:<20} {sum(option.input_lengths):>11,.1f} {slowest.fwd_compute:>10.3f} "
            f"{slowest.bwd_compute:>10.3f} {_exchange_ms(slowest, num_ranks):>11.3f} {largest / 1e6:>10,.1f}"
        )
        ranks = [shard.rank for shard in shards if shard.table == option.name]
        for rank, perf in zip(ranks, perfs, strict=True):
            total[rank] += perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute + _exchange_ms(perf, num_ranks)
    return [*lines, *(f"rank {rank}: {ms:.3f} ms for its tables" for rank, ms in total.items())]


def _exchange_ms(perf: Perf, num_ranks: int) -> float:
    """Return the time of messages between ranks, for which the planner also charges a single rank."""
    return perf.input_dist_comms + perf.fwd_comms + perf.bwd_comms if num_ranks > 1 else 0.0


def mean_lengths(config: RunConfig) -> tuple[dict[str, float], str]:
    """Return the mean number of ids per row by key, and where it is from.

    Lengths come from the footers of the Parquet files; without data, from the config's `max_length` or assumptions.
    """
    schema, data = config.feature_schema, config.data
    footers, source = {}, "bag lengths from the data"
    try:
        folder = folder_of(data.dataset)
        by_user = data.rows == "user" and data.follow is None and (folder / TRAIN_USERS).is_dir()
        for name, place in (("user", TRAIN_USERS if by_user else "train"), ("item", "items")):
            footers[name] = _Footers(parquet_files(folder / place))
    except (*UNREADABLE, ConfigError, DataError):
        source = f"no data at {data.dataset}: bags have max_length or {ASSUMED_IDS} ids"
        footers = {}
    lengths = {
        lookup_key(side, feature): _mean_ids(side, feature, config, footers.get(side))
        for side, feature in schema.layout.table_pairs
    }
    for lookup in schema.layout.pooled_lookups:
        lengths.setdefault(lookup.key, lengths[lookup_key(lookup.side, lookup.feature)])  # keys of a second hash
    for feature in schema.sequences:
        name = lookup_key("user", feature)
        lengths[delta_key(name)] = lengths[name]
        for attribute in (other for other in schema.item if other.name in feature.attributes):
            mean = _mean_ids("item", attribute, config, footers.get("item"))
            lengths[sub_name(name, attribute.name)] = lengths[name] * mean
    return lengths, source


class _Footers:
    """Row and value counts from the footers of a folder's Parquet files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise DataError("There are no *.parquet files.")
        self.num_rows = 0
        self._ids: dict[str, int] = {}
        for path in paths:
            with path.open("rb") as opened, pq.ParquetFile(opened) as file:
                self._add(file.metadata)

    def _add(self, metadata: pq.FileMetaData) -> None:
        self.num_rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                nulls = column.statistics.null_count if column.statistics else 0  # empty lists count as nulls
                name = column.path_in_schema.split(".")[0]
                self._ids[name] = self._ids.get(name, 0) + column.num_values - (nulls or 0)

    def mean_length(self, column: str) -> float | None:
        """Return elements per row; None for an unknown column."""
        return self._ids[column] / max(self.num_rows, 1) if column in self._ids else None


def _mean_ids(side: Side, feature: FeatureSpec, config: RunConfig, footer: _Footers | None) -> float:
    """Return the mean number of ids of a feature per row."""
    if feature.assumed_ids is not None:  # footers have the lengths of lists only
        return feature.assumed_ids
    if side == "user" and config.data.rows == "user" and feature.source_column == HISTORY:  # a sample of the positives
        positives = footer.mean_length(POSITIVES) if footer else None
        mean = None if positives is None else positives * config.data.input_share
    else:
        mean = footer.mean_length(feature.source_column) if footer else None
    if mean is None:
        mean = float(feature.length_limit or ASSUMED_IDS)
    return min(mean, feature.length_limit or mean)
