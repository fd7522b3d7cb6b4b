"""The tables of both towers: one EmbeddingBagCollection, its pooling, and its first weights.

Tables that a sequence looks up are in an EmbeddingCollection beside it, with all that look up the same ones: a weight
in both would be silently split into two by sharding. Their bags are pooled by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from trec_twotower.config.base import Side
from trec_twotower.config.schema import Schema, lookup_key, sub_name
from trec_twotower.data.features.transform import divides
from trec_twotower.data.loading.batch import Listed
from trec_twotower.distributed.compat import local_shards
from trec_twotower.model.tower_layers import aligned
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


def build_tables(schema: Schema) -> EmbeddingBagCollection | None:
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


def build_lists(schema: Schema) -> EmbeddingCollection | None:
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


def pooled_by_hand(vector_ND: Tensor, listed: Listed) -> Tensor:
    """(entries, D): the sum of the vectors of each entry, weighted where there are weights.

    (Sizes are read from shapes here, since torch.export takes `len` for a constant.)
    """
    if listed.place is not None:
        assert listed.length is not None
        ends = listed.length.cumsum(0)
        return F.embedding_bag(
            listed.place, vector_ND, ends - listed.length, mode="sum", per_sample_weights=listed.weight
        )
    if listed.weight is not None:
        vector_ND = vector_ND * listed.weight[:, None]
    if listed.length is None:
        return vector_ND
    entry_N = torch.repeat_interleave(
        torch.arange(listed.length.shape[0], device=vector_ND.device), listed.length, output_size=vector_ND.shape[0]
    )
    return vector_ND.new_zeros(listed.length.shape[0], vector_ND.shape[1]).index_add(0, entry_N, vector_ND)


@dataclass
class Pooled:
    """What was looked up, side by side in a few tensors, and by key where it lies there: which tensor, which columns.

    A tensor may have more rows than a side.
    """

    sources: list[Tensor] = field(default_factory=list)
    places: dict[str, tuple[int, slice]] = field(default_factory=dict)

    def add(self, values: Tensor, widths: Mapping[str, int]) -> None:
        """One more tensor, of keys in the order of its columns."""
        first = 0
        for name, width in widths.items():
            self.places[name] = len(self.sources), slice(first, first + width)
            first += width
        self.sources.append(values)

    def __getitem__(self, name: str) -> Tensor:
        source, columns = self.places[name]
        return self.sources[source][:, columns]


def tower_inputs(schema: Schema, pooled: Pooled, sides: Mapping[Side, tuple[Tensor, Tensor]]) -> dict[Side, Tensor]:
    """(rows, E) of each side that is asked for.

    That is its pooled bags, divided as their pooling says, what layers made, then its numbers. `sides` holds each one's
    divisors, (rows, features), and those numbers.
    """
    pieces: list[_Piece] = []
    for number, side in enumerate(sides):
        first = 0
        for column, feature in enumerate([*schema.layout.table_features(side), *schema.layout.layer_features(side)]):
            name = lookup_key(side, feature)
            source, columns = pooled.places[name]
            after = first + columns.stop - columns.start
            is_bag = column < len(schema.layout.table_features(side))
            divisor = column if is_bag and divides(feature) else None
            pieces.append(_Piece(number, slice(first, after), source, columns, divisor))
            if is_bag and schema.table_of(feature).hashes == 2:
                source, columns = pooled.places[sub_name(name, "2")]
                pieces.append(_Piece(number, slice(first, after), source, columns, divisor, is_added=True))
            first = after
    made = _TowerInputs.apply(pieces, list(sides.values()), *pooled.sources)
    return dict(zip(sides, made, strict=True))


def tower_input(schema: Schema, side: Side, pooled: Mapping[str, Tensor], divisor: Tensor, number: Tensor) -> Tensor:
    """(rows, E): the pooled bags of one side, divided as their pooling says, what layers made, then its numbers.

    What `tower_inputs` makes, in steps that torch.export can follow.
    """
    rows = divisor.shape[0]
    bags = []
    for column, feature in enumerate(schema.layout.table_features(side)):
        name = lookup_key(side, feature)
        vector = pooled[name][:rows]
        if schema.table_of(feature).hashes == 2:
            vector = vector + pooled[sub_name(name, "2")][:rows]
        bags.append(vector / divisor[:, column : column + 1])
    made = [pooled[lookup_key(side, feature)] for feature in schema.layout.layer_features(side)]
    behind = sum(feature.num_numbers for feature in schema.layout.layer_features(side))
    return torch.cat([*bags, *made, number[:, behind:]], dim=1)


@dataclass(frozen=True)
class _Piece:
    """One feature: columns of a tower's input, and where they come from."""

    side: int
    columns: slice
    source: int
    source_columns: slice
    divisor: int | None
    is_added: bool = False  # to the piece before it


class _TowerInputs(torch.autograd.Function):
    """Every number is read and written once, in both directions; by torch, divided and joined, more often."""

    @staticmethod
    def forward(
        ctx: Any, pieces: list[_Piece], sides: list[tuple[Tensor, Tensor]], *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pieces, ctx.divisors = pieces, [divisor for divisor, _ in sides]
        ctx.likes = [(each.shape, each.dtype) for each in sources]
        made = []
        for side, (divisor, numbers) in enumerate(sides):
            mine = [piece for piece in pieces if piece.side == side]
            width = mine[-1].columns.stop if mine else 0
            rows = len(divisor)
            input_BE = aligned(numbers, rows, width + numbers.shape[1])
            input_BE[:, width:] = numbers
            for piece in mine:
                part = sources[piece.source][:rows, piece.source_columns]
                by = None if piece.divisor is None else divisor[:, piece.divisor : piece.divisor + 1]
                if piece.is_added:
                    input_BE[:, piece.columns] += part if by is None else part / by
                elif by is None:
                    input_BE[:, piece.columns] = part
                else:
                    torch.div(part, by, out=input_BE[:, piece.columns])
            made.append(input_BE)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Keys that no side here asked for get zeros.
        asked = [0] * len(ctx.likes)
        for piece in ctx.pieces:
            asked[piece.source] += piece.source_columns.stop - piece.source_columns.start
        found = [
            (gradients[0].new_empty if width == shape[1] else gradients[0].new_zeros)(shape, dtype=dtype)
            for (shape, dtype), width in zip(ctx.likes, asked, strict=True)
        ]
        for piece in ctx.pieces:
            gradient, divisor = gradients[piece.side][:, piece.columns], ctx.divisors[piece.side]
            into = found[piece.source][:, piece.source_columns]
            into[len(divisor) :] = 0
            if piece.divisor is None:
                into[: len(divisor)] = gradient
            else:
                by = divisor[:, piece.divisor : piece.divisor + 1]
                torch.div(gradient, by, out=into[: len(divisor)])
        return None, None, *found


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
