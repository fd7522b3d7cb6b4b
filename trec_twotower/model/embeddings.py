"""The tables of both towers: one EmbeddingBagCollection, its pooling, and its first weights.

Tables that a sequence looks up are in an EmbeddingCollection beside it, with all that look up the same ones: a weight
in both would be silently split into two by sharding. Their bags are pooled by hand.
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

# Weights that are filled together: scratch that stays in a CPU's cache, or few launches on a GPU.
FILL_CELLS = {"cpu": 1 << 18, "cuda": 1 << 22}


COLLECTIONS = ("embedding_bags", "embeddings")  # what torchrec calls the tables in both kinds of collection


def table_in(name: str) -> str | None:
    """The table that a weight or a state of this name is of; None where it is of something else.

    A language model has `embeddings`, too: a table's stand first, or in the model's `tables` or `lists`.
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
    """All tables whose bags are pooled, without memory yet; None where there are none.

    Every one pools by SUM (see put_pooling_divisor in data/transforms.py).
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
    """All tables whose rows are wanted one by one, without memory yet; None where there are none."""
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
    """The weight of each table of a model that is not sharded yet."""
    found = {}
    for collection in (model.tables, model.lists):
        if collection is not None:
            for name, parameter in collection.named_parameters():
                found[name.split(".")[1]] = parameter
    return found


def table_shards(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
    """Each piece of a table on this rank: the table's name, the weights, and the piece's first row and column."""
    for name, value in model.state_dict().items():
        table = table_in(name)
        if table is None:
            continue
        for weights, (row, column) in local_shards(value):
            yield table, weights.detach(), (row, column)


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
        step = max(1, FILL_CELLS[weights.device.type] // weights.shape[1])
        for start in range(0, weights.shape[0], step):
            part = weights[start : start + step]
            rows = torch.arange(first_row + start, first_row + start + len(part), device=weights.device)
            bits = mix_torch((rows[:, None] * spec.dim + columns) ^ salt)
            unit = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24  # [0, 1), 24 bits: exact in float32
            part.copy_((2 * unit - 1) * spec.start_scale)
