"""A batch: what one rank takes in one step."""

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
from trec_twotower.data.features.transform import Columns, divides, put_pooling_divisor
from trec_twotower.data.loading.pairs import Targets
from trec_twotower.ops.kernels import put_lengths
from trec_twotower.ops.ragged import Ragged, weights_of


@dataclass
class JaggedLookup:
    """How the ids of one key are to be put together, whose vectors are looked up one by one.

    Of a bag (or ids) one entry a row; of a sequence's attribute or of its items, one entry a distinct item. Where there
    is a place, each id was looked up once however often it stands there; of text that a model reads, they are tokens.
    """

    length: Tensor | None = None  # int64, ids of each entry; None: one
    weight: Tensor | None = None  # one an id
    divisor: Tensor | None = None  # of an attribute: what each pooled sum is divided by
    place: Tensor | None = None  # of lists: each id among the distinct ones; of a sequence `length` is then the rows'
    gap: Tensor | None = None  # of a sequence: buckets
    action: Tensor | None = None

    def each(self, change: Any) -> JaggedLookup:
        return JaggedLookup(**{name: None if value is None else change(value) for name, value in vars(self).items()})


@dataclass
class Batch(Pipelineable):
    """Users of some rows, candidate items, and which of them belong together.

    The candidates of a step are one set of C distinct catalogue rows for all ranks, in rising order; each rank encodes
    a share of them, S items (`item_sizes` has every rank's S).

    `sparse` is one KeyedJaggedTensor for both sides, so that all tables are looked up in one call. It has R rows, the
    largest B or S of any rank: row-wise tables want equal batches. User keys have empty bags from row B on, item keys
    from row S on. With B = 3 users and S = 2 items, the keys user:history and item:item_id, and R = 3:

                        row 0       row 1    row 2
        user:history    [17, 4]     []       [9]         lengths 2 0 1
        item:item_id    [4]         [30]     (empty)     lengths 1 1 0      values 17 4 9 4 30

    The order of the keys is the schema's and never changes (a sharded collection remembers the first order it sees).
    `targets` are the pairs of this rank's rows with the candidates.
    """

    sparse: KeyedJaggedTensor
    user_divisor_BF: Tensor  # what each pooled sum is divided by
    user_number_BN: Tensor
    item_divisor_SF: Tensor
    item_number_SN: Tensor
    item_sizes: tuple[int, ...] = ()
    num_rows_of_all_ranks: int = 0
    log_q_C: Tensor | None = None  # log of the probability to be a candidate, whatever loss.log_q is
    is_negative_C: Tensor | None = None  # bool: False for items that only stand as positives
    targets: Targets | None = None
    item_key_C: Tensor | None = None  # what tells a candidate from others in all steps (63 bits), where asked for
    # Where there are sequences: the ids whose vectors are wanted one by one, each key's in one row, and how they lie.
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
    """The items of a step, the same on all ranks."""

    item_row: np.ndarray  # distinct, rising
    log_q: np.ndarray | None
    is_negative: np.ndarray
    sizes: tuple[int, ...]  # how many of them each rank encodes, in order
    key: np.ndarray | None = None


Sides = Mapping[Side, Columns | None]  # the columns of each, None: not wanted


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
    """Assemble a Batch of `num_rows` (default: as many as needed); a side that is not wanted has no rows."""
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
    """All keys' bags, and for each side what its pooled sums are divided by: float32 (its rows, features)."""
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
    """The ids of all listed keys, each key in one row (so that ranks need not agree on a number), and how they lie.

    Of a sequence every item stands once, however many steps of the rows it takes.
    """
    values: dict[str, np.ndarray] = {}
    listed: dict[str, JaggedLookup] = {}
    for side, feature in schema.layout.table_pairs:
        name, columns = lookup_key(side, feature), sides[side]
        if feature.table_name not in schema.unpooled_tables:
            continue
        bags = Ragged.empty(0) if columns is None else columns.sparse[feature.name]
        if not isinstance(feature, SequenceFeature):
            if bags.is_single:
                values[name], listed[name] = bags.values, JaggedLookup(weight=_tensor(bags.weights))
            else:
                values[name], listed[name] = _distinct(bags)
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
        listed[name] = JaggedLookup(
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
                of_item = next(other for other in schema.item if other.name == attribute)
                found = _attributes(of_item, catalogue, row_U - 1)
                at = sub_name(name, attribute)
                values[at], listed[at] = _distinct(found)
                if divides(of_item):
                    divisor = np.empty(len(found), np.float32)
                    put_pooling_divisor(of_item, found, divisor)
                    listed[at].divisor = torch.from_numpy(divisor)
    keys = list(schema.layout.unpooled_keys)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate([values[name].astype(np.int64, copy=False) for name in keys])),
        lengths=torch.tensor([len(values[name]) for name in keys], dtype=torch.int32),
        stride=1,
    ), listed


def _distinct(bags: Ragged) -> tuple[np.ndarray, JaggedLookup]:
    """What is to be looked up for some lists, each id once, and how the lists take it."""
    id_U, place = np.unique(bags.values, return_inverse=True)
    length = torch.from_numpy(bags.lengths.astype(np.int64))
    return id_U, JaggedLookup(length, _tensor(bags.weights), place=torch.from_numpy(place.astype(np.int64)))


def _index(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values.astype(np.int64))


def _attributes(feature: FeatureSpec, catalogue: Columns | None, row_U: np.ndarray) -> Ragged:
    """The lists of an item feature of these catalogue rows; those of no row (-1) are empty."""
    if catalogue is None:
        assert not (row_U >= 0).any(), "steps have attributes, but their columns come without a catalogue"
        return Ragged.empty(len(row_U))
    lists = catalogue.sparse[feature.name].take(np.maximum(row_U, 0)) if len(row_U) else Ragged.empty(0)
    is_known = row_U >= 0
    if is_known.all():
        return lists
    return lists.where(is_known[lists.rows])


def _numbers(schema: Schema, side: Side, columns: Columns | None) -> np.ndarray:
    """(rows, all their columns) of the features without table."""
    features = schema.layout.float_features(side)
    if columns is None or not features:
        return np.empty(
            (0 if columns is None else columns.num_rows, sum(feature.num_numbers for feature in features)), np.float32
        )
    numbers = [columns.numbers[feature.name] for feature in features]
    return numbers[0] if len(numbers) == 1 else np.concatenate(numbers, axis=1)
