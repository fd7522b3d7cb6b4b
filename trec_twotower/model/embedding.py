"""The tables of both towers: one EmbeddingBagCollection, its pooling, and its first weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trec_twotower.data.hashing import mix, mix_torch
from trec_twotower.schema import Schema, Side, key

FILL_CELLS = 1 << 18  # weights that are filled together: bounds the scratch memory, and keeps it in the cache


def build_tables(schema: Schema) -> EmbeddingBagCollection:
    """All tables, without memory yet; every one pools by SUM (see pooling_divisor in data/transforms.py)."""
    features: dict[str, list[str]] = {name: [] for name in schema.tables}
    for side, feature in schema.sparse_pairs:
        features[feature.table_name].append(key(side, feature))
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        is_weighted=schema.is_weighted,
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=spec.buckets,
                embedding_dim=spec.dim,
                feature_names=features[name],
                pooling=PoolingType.SUM,
                data_type=DataType.FP16 if spec.dtype == "fp16" else DataType.FP32,
            )
            for name, spec in schema.tables.items()
        ],
    )


def tower_input(schema: Schema, side: Side, pooled: Mapping[str, Tensor], divisor: Tensor, number: Tensor) -> Tensor:
    """(rows, E): the pooled bags of one side, divided as their pooling says, then its numbers."""
    rows = divisor.shape[0]
    bags = [
        pooled[key(side, feature)][:rows] / divisor[:, column : column + 1]
        for column, feature in enumerate(schema.sparse(side))
    ]
    return torch.cat([*bags, number], dim=1)


def table_shards(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
    """Each piece of a table on this rank: the table's name, the weights, and the piece's first row and column."""
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if "embedding_bags" not in parts:
            continue
        table = parts[parts.index("embedding_bags") + 1]
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                row, column = shard.metadata.shard_offsets
                yield table, shard.tensor.detach(), (row, column)
        else:
            yield table, value.detach(), (0, 0)


def fill_tables(model: nn.Module, schema: Schema, seed: int) -> None:
    """Start every table from a function of (seed, table, row, column), uniform in ±start_scale.

    To be called after sharding, which throws earlier weights away. The weights depend neither on the number of ranks
    nor on the plan, and no two shards repeat each other.
    """
    for table, weights, (first_row, first_column) in table_shards(model):
        spec = schema.tables[table]
        salt = mix(seed ^ xxhash.xxh3_64_intdigest(table.encode()))
        salt = salt - (1 << 64) if salt >> 63 else salt
        columns = torch.arange(first_column, first_column + weights.shape[1], device=weights.device)
        step = max(1, FILL_CELLS // weights.shape[1])
        for start in range(0, weights.shape[0], step):
            part = weights[start : start + step]
            rows = torch.arange(first_row + start, first_row + start + len(part), device=weights.device)
            bits = mix_torch((rows[:, None] * spec.dim + columns) ^ salt)
            unit = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24  # [0, 1), 24 bits: exact in float32
            part.copy_((2 * unit - 1) * spec.start_scale)
