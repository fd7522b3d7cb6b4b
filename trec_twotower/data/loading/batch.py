"""The batch of one rank and one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import SequenceFeature
from trec_twotower.config.schema import Schema, delta_key, lookup_key, sub_name
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.lists import divides, put_pooling_divisor
from trec_twotower.data.loading.pairs import Targets
from trec_twotower.ops.kernels import put_lengths
from trec_twotower.ops.ragged import Ragged, weights_of


@dataclass
class JaggedLookup:
    """Describes how the unpooled vectors of one key's ids are combined.

    A bag (or id) has one entry per row; the attributes and items of a sequence have one entry per distinct item. With
    `place`, repeated ids are looked up only once. For text that a language model encodes, the ids are tokens.
    """

    length: Tensor | None = None  # int64, number of ids per entry; None: one
    weight: Tensor | None = None  # one per id
    divisor: Tensor | None = None  # divisors of an attribute's pooled sums
    place: Tensor | None = None  # index of each id among the distinct ids; a sequence's `length` is then per row
    gap: Tensor | None = None  # time-gap buckets of a sequence's steps
    action: Tensor | None = None  # action buckets of a sequence's steps

    def each(self, change: Any) -> JaggedLookup:
        """Return the lookup with `change` applied to every tensor."""
        return JaggedLookup(**{name: None if value is None else change(value) for name, value in vars(self).items()})


@dataclass
class Batch(Pipelineable):
    """The users of a rank's rows, the candidate items, and the pairs between them.

    All ranks share one set of C distinct candidates, which are catalogue rows in ascending order. Each rank encodes S
    of them (`item_sizes` holds every rank's S).

    `sparse` is one KeyedJaggedTensor for both sides, so that one call looks up all tables. It has R rows, the largest B
    or S of any rank, because row-wise tables need equal batch sizes. User keys have empty bags from row B on, item keys
    from row S on. With B = 3 users and S = 2 items, the keys user:history and item:item_id, and R = 3:

                        row 0       row 1    row 2
        user:history    [17, 4]     []       [9]         lengths 2 0 1
        item:item_id    [4]         [30]     (empty)     lengths 1 1 0      values 17 4 9 4 30

    The keys are always in the order of the schema, because a sharded collection caches the first order that it sees.
    `targets` are the pairs of this rank's rows with the candidates.
    """

    sparse: KeyedJaggedTensor
    user_divisor_BF: Tensor  # divisors of the pooled sums
    user_number_BN: Tensor
    item_divisor_SF: Tensor
    item_number_SN: Tensor
    item_sizes: tuple[int, ...] = ()
    num_rows_of_all_ranks: int = 0
    log_q_C: Tensor | None = None  # log probability of being a candidate, set for any loss.log_q
    is_negative_C: Tensor | None = None  # bool: False for items that are only positives
    targets: Targets | None = None
    item_key_C: Tensor | None = None  # 63-bit keys that are the same in all steps; None: unused
    # Ids with unpooled vectors, one row per key, and how their vectors are combined; None without sequences.
    sequences: KeyedJaggedTensor | None = None
    listed: dict[str, JaggedLookup] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._each(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._each(lambda value: value.pin_memory())

    def record_stream(self, stream: Any) -> None:
        self._each(lambda value: value.record_stream(stream))

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batch and of its targets by name, such as targets.positive.row_P."""
        parts: dict[str, object] = {"": self}
        if self.targets is not None:
            parts |= {f"targets.{name}.": pairs for name, pairs in vars(self.targets).items() if pairs is not None}
        values = ((prefix + name, value) for prefix, part in parts.items() for name, value in vars(part).items())
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def _each(self, change: Any) -> Batch:
        values = vars(self).items()
        changed = {name: change(value) for name, value in values if isinstance(value, Tensor | KeyedJaggedTensor)}
        listed = {name: part.each(change) for name, part in self.listed.items()}
        targets = None if self.targets is None else self.targets.each(change)
        return replace(self, **changed, listed=listed, targets=targets)


@dataclass(frozen=True)
class Candidates:
    """The candidates of a step, the same on all ranks."""

    item_row: np.ndarray  # distinct catalogue rows, ascending
    log_q: np.ndarray | None
    is_negative: np.ndarray
    sizes: tuple[int, ...]  # number of candidates that each rank encodes, in order
    key: np.ndarray | None = None


Sides = Mapping[Side, Columns | None]  # columns by side; None: the side is left out


def make_batch(
    schema: Schema,
    user: Columns | None = None,
    item: Columns | None = None,
    *,
    num_rows: int | None = None,
    candidates: Candidates | None = None,
    targets: Targets | None = None,
    num_rows_of_all_ranks: int = 0,
) -> Batch:
    """Build a Batch of `num_rows` rows (default: the larger side); a side of None has no rows."""
    sides: Sides = {"user": user, "item": item}
    num_users, num_items = (0 if columns is None else columns.num_rows for columns in sides.values())
    if num_rows is None:
        num_rows = max(num_users, num_items)
    sparse, divisors = _keyed_jagged(schema, sides, num_rows)
    batch = Batch(
        sparse=sparse,
        user_divisor_BF=torch.from_numpy(divisors["user"]),
        user_number_BN=torch.from_numpy(_numbers(schema, "user", user)),
        item_divisor_SF=torch.from_numpy(divisors["item"]),
        item_number_SN=torch.from_numpy(_numbers(schema, "item", item)),
        num_rows_of_all_ranks=num_rows_of_all_ranks,
    )
    if schema.sequences:
        batch.sequences, batch.listed = _sequences(schema, sides)
    for feature in schema.layout.layer_features("item"):
        if feature.has_tokens:
            tokens = Ragged.empty(0) if item is None else item.sparse[feature.name]
            batch.listed[lookup_key("item", feature)] = JaggedLookup(
                _index(tokens.lengths), place=_index(tokens.values)
            )
    if candidates is not None and targets is not None:
        batch.item_sizes = candidates.sizes
        batch.log_q_C = _tensor(candidates.log_q)
        batch.is_negative_C = _tensor(candidates.is_negative)
        batch.item_key_C = _tensor(candidates.key)
        batch.targets = targets
    return batch


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def _keyed_jagged(schema: Schema, sides: Sides, num_rows: int) -> tuple[KeyedJaggedTensor, dict[Side, np.ndarray]]:
    """Return the bags of all keys, and the divisors of each side's pooled sums: float32 (rows, features)."""
    divisors: dict[Side, np.ndarray] = {}
    for side, columns in sides.items():
        features = schema.layout.table_features(side)
        divisors[side] = np.ones((0 if columns is None else columns.num_rows, len(features)), np.float32)
        for column, feature in enumerate(features):
            if columns is not None and divides(feature):
                put_pooling_divisor(feature, columns.sparse[feature.name], divisors[side][:, column])
    lengths = np.zeros((len(schema.layout.pooled_lookups), num_rows), np.int32)
    values: dict[Side, list[np.ndarray]] = {"user": [], "item": []}
    weights = [np.empty(0, np.float32)]
    for length, lookup in zip(lengths, schema.layout.pooled_lookups, strict=True):
        if (columns := sides[lookup.side]) is None:
            continue
        bags = columns.sparse[lookup.buckets]
        if bags.is_single:
            length[: len(bags)] = 1
        else:
            put_lengths(bags.offsets, length)
        values[lookup.side].append(bags.values)
        if schema.layout.is_weighted:
            weights.append(weights_of(bags))
    sparse = KeyedJaggedTensor(
        keys=schema.layout.pooled_keys,
        values=torch.from_numpy(np.concatenate([np.empty(0, np.int32), *values["user"], *values["item"]])),
        weights=torch.from_numpy(np.concatenate(weights)) if schema.layout.is_weighted else None,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=num_rows,
    )
    return sparse, divisors


def _sequences(schema: Schema, sides: Sides) -> tuple[KeyedJaggedTensor, dict[str, JaggedLookup]]:
    """Return the ids of all unpooled keys and their JaggedLookup.

    Each key is one row, so that ranks need not agree on a number of rows. The items of a sequence are deduplicated.
    """
    values: dict[str, np.ndarray] = {}
    lookups: dict[str, JaggedLookup] = {}
    for side, feature in schema.layout.table_pairs:
        name, columns = lookup_key(side, feature), sides[side]
        if feature.table_name not in schema.unpooled_tables:
            continue
        bags = Ragged.empty(0) if columns is None else columns.sparse[feature.name]
        if not isinstance(feature, SequenceFeature):
            if bags.is_single:
                values[name], lookups[name] = bags.values, JaggedLookup(weight=_tensor(bags.weights))
            else:
                values[name], lookups[name] = _distinct(bags)
            continue
        parts = {
            part: np.empty(0, np.int64) if columns is None else columns.sparse[sub_name(feature.name, part)].values
            for part, is_wanted in (("gap", feature.times), ("action", feature.actions), ("row", feature.attributes))
            if is_wanted
        }
        buckets = schema.table_of(feature).buckets
        item = bags.values.astype(np.int64)
        if feature.attributes:
            item = item + (parts["row"] + 1) * buckets
        item_U, place = np.unique(item, return_inverse=True)
        row_U, bucket_U = np.divmod(item_U, buckets)
        values[name] = bucket_U
        lookups[name] = JaggedLookup(
            torch.from_numpy(bags.lengths.astype(np.int64)),
            place=torch.from_numpy(place.astype(np.int64)),
            gap=_index(parts.get("gap")),
            action=_index(parts.get("action")),
        )
        if feature.delta:
            values[delta_key(name)] = bucket_U
        if feature.attributes:
            catalogue = None if columns is None else columns.items
            for attribute in feature.attributes:
                item_feature = next(other for other in schema.item if other.name == attribute)
                lists = _attributes(item_feature, catalogue, row_U - 1)
                key = sub_name(name, attribute)
                values[key], lookups[key] = _distinct(lists)
                if divides(item_feature):
                    divisor = np.empty(len(lists), np.float32)
                    put_pooling_divisor(item_feature, lists, divisor)
                    lookups[key].divisor = torch.from_numpy(divisor)
    keys = list(schema.layout.unpooled_keys)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate([values[name].astype(np.int64, copy=False) for name in keys])),
        lengths=torch.tensor([len(values[name]) for name in keys], dtype=torch.int32),
        stride=1,
    ), lookups


def _distinct(bags: Ragged) -> tuple[np.ndarray, JaggedLookup]:
    """Return the distinct ids of the lists, and the lookup that maps them back to the lists."""
    id_U, place = np.unique(bags.values, return_inverse=True)
    length = torch.from_numpy(bags.lengths.astype(np.int64))
    return id_U, JaggedLookup(length, _tensor(bags.weights), place=torch.from_numpy(place.astype(np.int64)))


def _index(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values.astype(np.int64))


def _attributes(feature: FeatureSpec, catalogue: Columns | None, row_U: np.ndarray) -> Ragged:
    """Return the lists of an item feature for these catalogue rows; the list of row -1 is empty."""
    if catalogue is None:
        assert not (row_U >= 0).any(), "sequence items have attributes, but there is no catalogue"
        return Ragged.empty(len(row_U))
    lists = catalogue.sparse[feature.name].take(np.maximum(row_U, 0)) if len(row_U) else Ragged.empty(0)
    is_known = row_U >= 0
    if is_known.all():
        return lists
    return lists.where(is_known[lists.rows])


def _numbers(schema: Schema, side: Side, columns: Columns | None) -> np.ndarray:
    """Return the numbers of the features without tables: (rows, columns of all features)."""
    features = schema.layout.float_features(side)
    if columns is None or not features:
        return np.empty(
            (0 if columns is None else columns.num_rows, sum(feature.num_numbers for feature in features)), np.float32
        )
    numbers = [columns.numbers[feature.name] for feature in features]
    return numbers[0] if len(numbers) == 1 else np.concatenate(numbers, axis=1)
