"""From looked-up embeddings to tower inputs: the same path for training, encoding and torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trec_twotower.config.base import Side
from trec_twotower.config.features import SequenceFeature
from trec_twotower.config.schema import Schema, delta_key, lookup_key, sub_name
from trec_twotower.data.features.lists import divides
from trec_twotower.data.loading.batch import JaggedLookup
from trec_twotower.model.tower import Tower


@dataclass
class Pooled:
    """Looked-up values in a few tensors, and the tensor and columns of each key.

    A tensor may have more rows than a side has.
    """

    sources: list[Tensor] = field(default_factory=list)
    places: dict[str, tuple[int, slice]] = field(default_factory=dict)

    def add(self, values: Tensor, widths: Mapping[str, int]) -> None:
        """Add a tensor whose columns are these keys in order."""
        first = 0
        for name, width in widths.items():
            self.places[name] = len(self.sources), slice(first, first + width)
            first += width
        self.sources.append(values)

    def __getitem__(self, name: str) -> Tensor:
        source, columns = self.places[name]
        return self.sources[source][:, columns]


@dataclass(frozen=True)
class SideInputs:
    """The tower of a side, the divisors (rows, features) of its pooled sums, and its numbers (rows, N)."""

    tower: Tower
    divisor: Tensor
    number: Tensor


def build_inputs(
    schema: Schema,
    sides: Mapping[Side, SideInputs],
    pooled: Pooled,
    vectors: Mapping[str, Tensor],
    listed: Mapping[str, JaggedLookup],
) -> dict[Side, Tensor]:
    """Return the input of each side's tower, (rows, E); (rows, M, E) for multi-interest users.

    `pooled` has the pooled bags of the EmbeddingBagCollection, `vectors` the embeddings of the EmbeddingCollection by
    key, and `listed` the layout of the latter.
    """
    several_BMD = None
    for name, vector in encode_unpooled(schema, sides, listed, vectors).items():
        if vector.ndim == 3:
            several_BMD, vector = vector, vector[:, 0]
        pooled.add(vector, {name: vector.shape[1]})
    numbers: dict[Side, tuple[Tensor, Tensor]] = {}
    for side, given in sides.items():
        for name, vector in apply_layers(schema, side, given, listed).items():
            pooled.add(vector, {name: vector.shape[1]})
        first = sum(feature.num_numbers for feature in schema.layout.layer_features(side))
        numbers[side] = given.divisor, given.number[:, first:]
    made = concatenate_features(schema, pooled, numbers)
    if several_BMD is not None and "user" in made:
        made["user"] = repeat_for_vectors(schema, made["user"], several_BMD)
    return made


def repeat_for_vectors(schema: Schema, feature_BE: Tensor, several_BMD: Tensor) -> Tensor:
    """Return (B, M, E): each vector of a user, concatenated with the user's other features."""
    assert schema.multi_interest_feature is not None
    place = schema.layout.part_index("user", schema.multi_interest_feature.name)
    first = sum(schema.layout.part_widths("user")[:place])
    feature_BME = feature_BE[:, None].repeat(1, several_BMD.shape[1], 1)
    feature_BME[:, :, first : first + several_BMD.shape[2]] = several_BMD
    return feature_BME


def encode_unpooled(
    schema: Schema, sides: Mapping[Side, SideInputs], listed: Mapping[str, JaggedLookup], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the pooled bags and the users' encoded sequences by key, from embeddings that were looked up unpooled."""
    found = {}
    for side, feature in schema.layout.table_pairs:
        name = lookup_key(side, feature)
        if name not in vectors or side not in sides:
            continue
        if not isinstance(feature, SequenceFeature):
            found[name] = pool_jagged(vectors[name], listed[name])
            continue
        item_UD = vectors[name]
        if feature.delta:
            item_UD = item_UD + vectors[delta_key(name)]
        for attribute in feature.attributes:
            at = listed[sub_name(name, attribute)]
            added = pool_jagged(vectors[sub_name(name, attribute)], at)
            item_UD = item_UD + (added if at.divisor is None else added / at.divisor[:, None])
        found[name] = sides[side].tower.encode(feature.name, item_UD, listed[name])
    return found


def apply_layers(
    schema: Schema, side: Side, given: SideInputs, listed: Mapping[str, JaggedLookup]
) -> dict[str, Tensor]:
    """Return the output of the features' own layers, which read numbers or tokens, by key."""
    found, first = {}, 0
    for feature in schema.layout.layer_features(side):
        name, stop = lookup_key(side, feature), first + feature.num_numbers
        values = listed[name] if feature.has_tokens else given.number[:, first:stop]
        found[name] = given.tower.encode(feature.name, values)
        first = stop
    return found


def pool_jagged(vector_ND: Tensor, listed: JaggedLookup) -> Tensor:
    """Return (entries, D): the (weighted) sum of the vectors of each entry.

    Sizes come from shapes, because torch.export treats `len` as a constant.
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


def concatenate_features(
    schema: Schema, pooled: Pooled, sides: Mapping[Side, tuple[Tensor, Tensor]]
) -> dict[Side, Tensor]:
    """Return (rows, E) for each requested side: pooled bags, the outputs of layers, then numbers.

    `sides` holds each side's divisors, (rows, features), and its numbers, (rows, N). A bag's sum is divided by its
    divisor, where its pooling asks for one.
    """
    made: dict[Side, Tensor] = {}
    for side, (divisor_BF, number_BN) in sides.items():
        rows, parts = divisor_BF.shape[0], []
        bags = schema.layout.table_features(side)
        for column, feature in enumerate(bags):
            name = lookup_key(side, feature)
            part = pooled[name][:rows]
            if schema.table_of(feature).hashes == 2:
                part = part + pooled[sub_name(name, "2")][:rows]
            parts.append(part / divisor_BF[:, column : column + 1] if divides(feature) else part)
        parts += [pooled[lookup_key(side, feature)][:rows] for feature in schema.layout.layer_features(side)]
        made[side] = torch.cat([*(part.to(number_BN.dtype) for part in parts), number_BN], dim=1)
    return made
