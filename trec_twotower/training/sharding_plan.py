"""What a config would take, told before anything is built: where its tables go, their bytes, and what a step sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import nn

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import HISTORY, FeatureSpec, ItemListFeature
from trec_twotower.config.features import TextFeature
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.schema import Schema, delta_key, lookup_key, sub_name
from trec_twotower.data.dataset import POSITIVES, TRAIN_USERS
from trec_twotower.data.parquet_files import UNREADABLE, folder_of, parquet_files
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.model.embeddings import build_lists, build_tables, table_parameters
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.optimizer import check_optimizer, fuse_table_updates, state_bytes
from trec_twotower.training.sharding import CACHE_SHARE, RankMemory, TablePlacement, make_plan, placements
from trec_twotower.training.spectral_initialization import check_start

ASSUMED_WORDS, ASSUMED_PARTS = 8, 12  # of a text, and of a word where its characters count
ASSUMED_IDS = 20  # of a bag, where neither the data nor max_length say how many
LENGTH_BYTES = VALUE_BYTES = 4  # int32 lengths, float32 sums and gradients


@dataclass(frozen=True)
class Exchange:
    """What one rank sends to the others in a step for one table, in bytes, as a mean over ranks."""

    ids: float = 0.0
    vectors: float = 0.0
    gradients: float = 0.0


@dataclass(frozen=True)
class StepSize:
    """What a step looks up, on one rank."""

    rows: int  # of the KeyedJaggedTensor: the larger of users and candidates
    ids: Mapping[str, float]  # by key, of all rows
    is_weighted: bool
    candidates: float  # of the step, over all ranks


def describe_plan(config: RunConfig, num_ranks: int, gpu_gb: float | None = None) -> str:
    """The plan of a config as a table, made without building a table or starting a rank.

    All ranks are taken to be on this machine. `gpu_gb`: for GPUs of so much memory, of which there need be none here.
    Raises ConfigError where the tables do not fit.
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
    plan = make_plan(
        model, schema, num_ranks, device, config.data.batch_size // num_ranks + 1, local_ranks=num_ranks, memory=memory
    )
    shards = placements(plan)
    return "\n".join([*_about_memory(model, shards, num_ranks), "", *_about_exchange(config, shards, num_ranks)])


class OnlyTables(nn.Module):
    """The tables as the planner wants them, part of a model; they take no memory."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.schema = schema
        self.tables = build_tables(schema)
        self.lists = build_lists(schema)
        self.weights = table_parameters(self)


@dataclass(frozen=True)
class ShardBytes:
    """The memory that a shard takes; of a table with a cache, the cache and its books are what lies on the GPU."""

    weights: int
    state: int
    gpu: int
    host: int


def bytes_of(model: OnlyTables, shard: TablePlacement) -> ShardBytes:
    """What a shard takes on its rank."""
    spec = model.schema.tables[shard.table]
    rows, columns = (shard.rows, shard.columns) if shard.rows else (spec.buckets, spec.dim)
    weights = rows * columns * spec.weight_bytes
    state = state_bytes(model.weights[shard.table], rows, columns)
    if shard.kernel not in ("fused_uvm", "fused_uvm_caching"):
        return ShardBytes(weights, state, weights + state, 0)
    share = (spec.cache_share or CACHE_SHARE) if shard.kernel == "fused_uvm_caching" else 0.0
    books = rows * (4 + 16 * share) if share else 0.0  # where each row lies, and whose each place is, since when
    return ShardBytes(weights, state, int(weights * share + books), weights + state)


def _about_memory(model: OnlyTables, shards: list[TablePlacement], num_ranks: int) -> list[str]:
    lines = [
        f"{'table':<20} {'sharding':<16} {'kernel':<18} {'rank':>4} {'rows':>13} {'columns':>7} {'weights MB':>11} "
        f"{'state MB':>9}"
    ]
    main, beside = [0] * num_ranks, [0] * num_ranks
    for shard in shards:
        spec, size = model.schema.tables[shard.table], bytes_of(model, shard)
        rows, columns = (shard.rows, shard.columns) if shard.rows else (spec.buckets, spec.dim)
        main[shard.rank] += size.gpu
        beside[shard.rank] += size.host
        lines.append(
            f"{shard.table:<20} {shard.sharding:<16} {shard.kernel:<18} {shard.rank:>4} {rows:>13,} {columns:>7} "
            f"{size.weights / 1e6:>11,.1f} {size.state / 1e6:>9,.1f}"
        )
    for rank in range(num_ranks):
        more = f", and {beside[rank] / 1e6:,.1f} in host memory beside the GPU" if any(beside) else ""
        lines.append(f"rank {rank}: {main[rank] / 1e6:,.1f} MB of tables and their optimizer's state{more}")
    return lines


# ---------------------------------------------------------------- what a step sends


def _about_exchange(config: RunConfig, shards: list[TablePlacement], num_ranks: int) -> list[str]:
    if config.ends_in_closed_form:  # steps are of what is trained before that
        config = config.without_closed_form
        shards = [shard for shard in shards if shard.table in config.feature_schema.tables]
    step, source = step_size(config, num_ranks)
    sent = exchange(config.feature_schema, shards, step, num_ranks) | exchange_of_towers(config, step, num_ranks)
    lines = [
        f"What a rank sends to others in a step of {config.data.batch_size:,} rows ({source}), in KB",
        f"{'table':<20} {'ids':>11} {'vectors':>11} {'gradients':>11}",
    ]
    total = Exchange(*(sum(getattr(each, name) for each in sent.values()) for name in ("ids", "vectors", "gradients")))
    for table, each in {**sent, "all": total}.items():
        lines.append(
            f"{table:<20} {each.ids / 1e3:>11,.1f} {each.vectors / 1e3:>11,.1f} {each.gradients / 1e3:>11,.1f}"
        )
    return lines


def exchange(schema: Schema, shards: list[TablePlacement], step: StepSize, num_ranks: int) -> dict[str, Exchange]:
    """What each table costs a step in messages between ranks, as torchrec sends them.

    With N ranks, K keys that look a table up, n ids and R rows a rank: a whole table (or a shard of its columns) is
    sent every rank's ids and lengths and returns R * K sums, of which one part in N stays at home; a table cut by rows
    is sent each id once, but lengths and sums go from every rank to every other. A data-parallel table's gradient is
    summed over all ranks, whole. Of a table that a sequence looks up, every id's vector is sent.
    """
    away = (num_ranks - 1) / num_ranks
    id_bytes = 4 if all(spec.buckets <= 1 << 31 for spec in schema.tables.values()) else 8
    found = {}
    for table, spec in schema.tables.items():
        keys = [name for name, looked_up in _tables_of_keys(schema).items() if looked_up == table]
        ids = sum(step.ids[key] for key in keys) * (id_bytes + VALUE_BYTES * step.is_weighted)
        lengths = step.rows * len(keys) * LENGTH_BYTES
        sums = step.rows * len(keys) * spec.dim * VALUE_BYTES
        parts = [shard for shard in shards if shard.table == table]
        if table in schema.unpooled_tables:
            vectors = sum(step.ids[key] for key in keys) * spec.dim * VALUE_BYTES
            copies = len(parts) if parts[0].sharding == "column_wise" else 1
            found[table] = Exchange(away * copies * ids, away * vectors, away * vectors)
            continue
        match parts[0].sharding:
            case "data_parallel":
                found[table] = Exchange(gradients=2 * away * spec.buckets * spec.dim * VALUE_BYTES)
            case "row_wise" | "table_row_wise":
                others = num_ranks - 1
                found[table] = Exchange(away * ids + others * lengths, others * sums, others * sums)
            case _:
                found[table] = Exchange(away * len(parts) * (ids + lengths), away * sums, away * sums)
    return found


def exchange_of_towers(config: RunConfig, step: StepSize, num_ranks: int) -> dict[str, Exchange]:
    """What the candidates' vectors and the towers' weights cost a step in messages between ranks.

    Every rank sends its share of the vectors to all others, and gets the sum of the gradients that they have for it:
    (N - 1) / N of the vectors each. The gradients of all weights that are in no table are summed on all ranks: as in a
    ring, twice (N - 1) / N of them.
    """
    away = (num_ranks - 1) / num_ranks
    vectors = step.candidates * config.model.vector_dim * VALUE_BYTES
    weights = num_dense_weights(config) * VALUE_BYTES
    return {
        "(candidates)": Exchange(vectors=away * vectors, gradients=away * vectors),
        "(towers)": Exchange(gradients=2 * away * weights),
    }


def num_dense_weights(config: RunConfig) -> int:
    """Of the towers and a learned temperature: all that are trained and lie whole on every rank."""
    negatives = config.loss.negatives.model_copy(update={"cross_batch_memory": 0})
    loss = config.loss.model_copy(update={"negatives": negatives})
    model = TwoTower(config.feature_schema, config.model, loss, Ranks(0, 1, torch.device("cpu")))
    tables = {weight for part in (model.tables, model.lists) if part is not None for weight in part.parameters()}
    return sum(each.numel() for each in model.parameters() if each.requires_grad and each not in tables)


def step_size(config: RunConfig, num_ranks: int) -> tuple[StepSize, str]:
    """What a rank looks up in a step, and how that is known: from the data's footers where they can be read.

    All candidates are taken to be distinct, as far as the catalogue goes, ranks to have equal shares, and every row to
    draw as many mined or refreshed items as it may.
    """
    schema, data = config.feature_schema, config.data
    footers, source = {}, "bags as long as in the data"
    try:
        folder = folder_of(data.dataset)
        by_user = data.rows == "user" and data.follow is None and (folder / TRAIN_USERS).is_dir()
        for name, place in (("train", TRAIN_USERS if by_user else "train"), ("items", "items")):
            footers[name] = _Footers(parquet_files(folder / place))
    except (*UNREADABLE, ConfigError, DataError):
        source = f"no data at {data.dataset}: bags as long as max_length, or {ASSUMED_IDS}"
    train, items = footers.get("train"), footers.get("items")
    positives = float(data.batch_size)
    if data.rows == "user":
        positives *= (train.mean_length(POSITIVES) if train else None) or ASSUMED_IDS
        positives *= 1 - data.input_share
    catalogue = items.num_rows if items else float("inf")
    loss, negatives = config.loss, config.loss.negatives
    brought = 0.0 if negatives.sampled == "all" else float(negatives.sampled)
    brought += sum(each.count for each in (negatives.popular, negatives.same_category) if each is not None)
    brought += sum(each.count * data.batch_size for each in (negatives.mined, negatives.refresh) if each is not None)
    if loss.impressions is not None:
        brought += data.batch_size * ((train.mean_length(loss.impressions.column) if train else None) or ASSUMED_IDS)
    candidates = min(positives + brought, catalogue)
    if negatives.sampled == "all" and items:
        candidates = catalogue
    rows = {"user": data.batch_size / num_ranks, "item": candidates / num_ranks}
    ids = {
        lookup_key(side, feature): rows[side] * _mean_ids(side, feature, config, train if side == "user" else items)
        for side, feature in schema.layout.table_pairs
    }
    for lookup in schema.layout.pooled_lookups:
        ids.setdefault(lookup.key, ids[lookup_key(lookup.side, lookup.feature)])  # of a second hash
    for feature in schema.sequences:  # every item of all steps once
        name = lookup_key("user", feature)
        ids[name] = min(ids[name], catalogue)
        ids[delta_key(name)] = ids[name]
        for attribute in (other for other in schema.item if other.name in feature.attributes):
            ids[sub_name(name, attribute.name)] = ids[name] * _mean_ids("item", attribute, config, items)
    return StepSize(round(max(rows.values())), ids, schema.layout.is_weighted, candidates), source


def _tables_of_keys(schema: Schema) -> dict[str, str]:
    """The table that each key of both collections looks up."""
    bags = {lookup.key: lookup.feature.table_name for lookup in schema.layout.pooled_lookups}
    return {**bags, **schema.layout.unpooled_keys}


class _Footers:
    """What the ends of a folder's Parquet files tell of rows and lengths, without reading a value."""

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
                nulls = column.statistics.null_count if column.statistics else 0  # an empty list counts as one, too
                name = column.path_in_schema.split(".")[0]
                self._ids[name] = self._ids.get(name, 0) + column.num_values - (nulls or 0)

    def mean_length(self, column: str) -> float | None:
        """Elements a row; None where there is no such column."""
        return self._ids[column] / max(self.num_rows, 1) if column in self._ids else None


def _mean_ids(side: Side, feature: FeatureSpec, config: RunConfig, footer: _Footers | None) -> float:
    if isinstance(feature, TextFeature):  # nothing tells how many words a text has
        runs = feature.words + (0 if feature.characters is None else ASSUMED_PARTS)
        return float(runs * min(feature.max_length or ASSUMED_WORDS, ASSUMED_WORDS))
    if not isinstance(feature, ItemListFeature):
        return 2.0 if feature.is_ragged else 1.0
    is_by_user = side == "user" and config.data.rows == "user"
    if is_by_user and feature.source_column == HISTORY:  # a drawn part of the positives
        taken = footer.mean_length(POSITIVES) if footer else None
        mean = None if taken is None else taken * config.data.input_share
    else:
        mean = footer.mean_length(feature.source_column) if footer else None
    if mean is None:
        mean = float(feature.max_length or ASSUMED_IDS)
    return min(mean, feature.max_length or mean)
