"""The embedding tables of both towers and their initialization.

Tables of pooled features are in one EmbeddingBagCollection. Tables that a sequence looks up are in an
EmbeddingCollection, with all other features of these tables, because sharding would silently split a weight that is in
both collections. The bags of such features are pooled by `pool_jagged`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from trec_twotower.config.schema import Schema
from trec_twotower.distributed.compat import local_shards
from trec_twotower.ops.hashing import mix, mix_torch

# Weights that are filled at a time: they fit into a CPU's cache, or need few kernel launches on a GPU.
FILL_CELLS = {"cpu": 1 << 18, "cuda": 1 << 22}


COLLECTIONS = ("embedding_bags", "embeddings")  # names of the tables in torchrec's collections


def table_in(name: str) -> str | None:
    """Return the table of a weight or optimizer state by its name; None for anything else.

    A language model also has `embeddings`; a table's are at the start of the name, or in `tables` or `lists`.
    """
    parts = name.split(".")
    for before, part, after in zip([None, *parts], parts, parts[1:], strict=False):
        if part in COLLECTIONS and before in (None, "tables", "lists"):
            return after
    return None


def _keep(weights: Tensor) -> Tensor:
    """Skip torchrec's own initialization: `fill_tables` or a checkpoint overwrites it."""
    return weights


def build_embedding_bag_collection(schema: Schema) -> EmbeddingBagCollection | None:
    """Return the tables with pooled features, on the meta device; None if there are none.

    All pool by SUM (see `put_pooling_divisor` in data/features/transform.py).
    """
    features: dict[str, list[str]] = {name: [] for name in schema.tables if name not in schema.unpooled_tables}
    for lookup in schema.layout.pooled_lookups:
        features[lookup.feature.table_name].append(lookup.key)
    if not features:
        return None
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        is_weighted=schema.layout.is_weighted,
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=spec.buckets,
                embedding_dim=spec.dim,
                feature_names=features[name],
                pooling=PoolingType.SUM,
                data_type=DataType.FP16 if spec.dtype == "fp16" else DataType.FP32,
                init_fn=_keep,
            )
            for name, spec in schema.tables.items()
            if name in features
        ],
    )


def build_embedding_collection(schema: Schema) -> EmbeddingCollection | None:
    """Return the tables with unpooled features, on the meta device; None if there are none."""
    if not schema.unpooled_tables:
        return None
    return EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=name,
                num_embeddings=spec.buckets,
                embedding_dim=spec.dim,
                feature_names=[key for key, table in schema.layout.unpooled_keys.items() if table == name],
                data_type=DataType.FP16 if spec.dtype == "fp16" else DataType.FP32,
                init_fn=_keep,
            )
            for name, spec in schema.tables.items()
            if name in schema.unpooled_tables
        ],
    )


def table_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Yield the weight of each table of a model that is not sharded."""
    found = {}
    for collection in (model.tables, model.lists):
        if collection is not None:
            for name, parameter in collection.named_parameters():
                found[name.split(".")[1]] = parameter
    return found


def table_shards(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
    """Yield each shard of a table on this rank: table name, weights, and the first row and column of the shard."""
    for name, value in model.state_dict().items():
        table = table_in(name)
        if table is None:
            continue
        for weights, (row, column) in local_shards(value):
            yield table, weights.detach(), (row, column)


def fill_tables(model: nn.Module, schema: Schema, seed: int) -> None:
    """Initialize every table with a function of (seed, table, row, column), uniform in ±start_scale.

    Call this after sharding, which discards earlier weights. The weights depend neither on the number of ranks nor on
    the sharding plan, and shards do not repeat each other.
    """
    for table, weights, (first_row, first_column) in table_shards(model):
        spec = schema.tables[table]
        salt = mix(seed ^ xxhash.xxh3_64_intdigest(table.encode()))
        salt = salt - (1 << 64) if salt >> 63 else salt
        columns = torch.arange(first_column, first_column + weights.shape[1], device=weights.device)
        step = max(1, FILL_CELLS[weights.device.type] // weights.shape[1])
        for start in range(0, weights.shape[0], step):
            part = weights[start : start + step]
            rows = torch.arange(first_row + start, first_row + start + len(part), device=weights.device)
            bits = mix_torch((rows[:, None] * spec.dim + columns) ^ salt)
            unit = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24  # [0, 1), 24 bits: exact in float32
            part.copy_((2 * unit - 1) * spec.start_scale)
