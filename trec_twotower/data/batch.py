"""A batch: what one rank takes in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from trec_twotower.data.lists import Lists, weights_of
from trec_twotower.data.transforms import Columns, divides, pooling_divisor
from trec_twotower.schema import Schema, Side


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
    Positive p says that row `positive_row_P[p]` took candidate `positive_column_P[p]`; known pairs are candidates that
    are no negatives of a row, its positives among them.
    """

    sparse: KeyedJaggedTensor
    user_divisor_BF: Tensor  # what each pooled sum is divided by
    user_number_BN: Tensor
    item_divisor_SF: Tensor
    item_number_SN: Tensor
    item_sizes: tuple[int, ...] = ()
    num_rows_of_all_ranks: int = 0
    log_q_C: Tensor | None = None
    is_negative_C: Tensor | None = None  # bool: False for items that only stand as positives
    positive_row_P: Tensor | None = None
    positive_column_P: Tensor | None = None
    positive_weight_P: Tensor | None = None
    known_row_M: Tensor | None = None
    known_column_M: Tensor | None = None
    given_row_G: Tensor | None = None  # pairs that the rows name themselves; see Relations in model/losses/blocks.py
    given_column_G: Tensor | None = None
    given_label_G: Tensor | None = None
    given_weight_G: Tensor | None = None
    item_key_C: Tensor | None = None  # what tells a candidate from others in all steps (a fingerprint), where asked for
    listed_row_L: Tensor | None = None  # pairs of a row and the key of any item that is no negative of it, where asked
    listed_key_L: Tensor | None = None  # for: candidates of earlier steps may be among them

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._each(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._each(lambda value: value.pin_memory())

    def record_stream(self, stream: Any) -> None:
        self._each(lambda value: value.record_stream(stream))

    def _each(self, change: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{name: change(value) for name, value in values.items() if isinstance(value, Tensor | KeyedJaggedTensor)},
        )


@dataclass(frozen=True)
class Candidates:
    """The items of a step, the same on all ranks."""

    item_row: np.ndarray  # distinct, rising
    log_q: np.ndarray | None
    is_negative: np.ndarray
    sizes: tuple[int, ...]  # how many of them each rank encodes, in order
    key: np.ndarray | None = None


@dataclass(frozen=True)
class Targets:
    """The pairs of this rank's rows and the step's candidates: those taken, and those that are no negatives."""

    positive_row: np.ndarray
    positive_column: np.ndarray
    positive_weight: np.ndarray
    known_row: np.ndarray  # the positives among them
    known_column: np.ndarray
    given_row: np.ndarray | None = None  # of what the rows name beside the positives; all four or none
    given_column: np.ndarray | None = None
    given_label: np.ndarray | None = None
    given_weight: np.ndarray | None = None
    listed_row: np.ndarray | None = None  # of everything that is no negative of a row
    listed_key: np.ndarray | None = None


Rows = tuple[Columns, slice]  # a run of rows of some columns


def make_batch(
    schema: Schema,
    user: Columns | Sequence[Rows] | None = None,
    item: Columns | None = None,
    *,
    num_rows: int | None = None,
    candidates: Candidates | None = None,
    targets: Targets | None = None,
    num_rows_of_all_ranks: int = 0,
) -> Batch:
    """Assemble a Batch of `num_rows` (default: as many as needed); a side that is not wanted has no rows.

    The users may come in pieces, which are laid below each other.
    """
    users: list[Rows] = [_whole(user)] if isinstance(user, Columns) else list(user or ())
    items: list[Rows] = [] if item is None else [_whole(item)]
    num_users, num_items = (sum(rows.stop - rows.start for _, rows in pieces) for pieces in (users, items))
    if num_rows is None:
        num_rows = max(num_users, num_items)
    sparse, divisors = _keyed_jagged(schema, {"user": users, "item": items}, num_rows)
    batch = Batch(
        sparse=sparse,
        user_divisor_BF=torch.from_numpy(divisors["user"][:num_users]),
        user_number_BN=torch.from_numpy(_numbers(schema, "user", users)),
        item_divisor_SF=torch.from_numpy(divisors["item"][:num_items]),
        item_number_SN=torch.from_numpy(_numbers(schema, "item", items)),
        num_rows_of_all_ranks=num_rows_of_all_ranks,
    )
    if candidates is not None and targets is not None:
        batch.item_sizes = candidates.sizes
        batch.log_q_C = _tensor(candidates.log_q)
        batch.is_negative_C = _tensor(candidates.is_negative)
        batch.item_key_C = _tensor(candidates.key)
        batch.positive_row_P = _tensor(targets.positive_row)
        batch.positive_column_P = _tensor(targets.positive_column)
        batch.positive_weight_P = _tensor(targets.positive_weight)
        batch.known_row_M = _tensor(targets.known_row)
        batch.known_column_M = _tensor(targets.known_column)
        batch.given_row_G = _tensor(targets.given_row)
        batch.given_column_G = _tensor(targets.given_column)
        batch.given_label_G = _tensor(targets.given_label)
        batch.given_weight_G = _tensor(targets.given_weight)
        batch.listed_row_L = _tensor(targets.listed_row)
        batch.listed_key_L = _tensor(targets.listed_key)
    return batch


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def _whole(columns: Columns) -> Rows:
    return columns, slice(0, columns.num_rows)


def _keyed_jagged(
    schema: Schema, sides: Mapping[Side, list[Rows]], num_rows: int
) -> tuple[KeyedJaggedTensor, dict[Side, np.ndarray]]:
    """All keys' bags, and for each side what its pooled sums are divided by: float32 (num_rows, features).

    Runs for every key and piece of every step: values and lengths are cut from the pieces directly.
    """
    pairs = schema.sparse_pairs
    num_user_keys = len(schema.sparse("user"))
    lengths = np.zeros((len(pairs), num_rows), np.int32)
    values, weights = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    divisors = {side: np.ones((num_rows, len(schema.sparse(side))), np.float32) for side in sides}
    for number, (side, feature) in enumerate(pairs):
        pieces = [(columns.sparse[feature.name], rows) for columns, rows in sides[side]]
        if not pieces:
            continue
        values += [lists.values_of(rows) for lists, rows in pieces]
        end = sum(rows.stop - rows.start for _, rows in pieces)
        length = lengths[number, :end]
        if all(lists.is_single for lists, _ in pieces):
            length.fill(1)
        else:
            np.concatenate([lists.lengths[rows] for lists, rows in pieces], out=length)
        if schema.is_weighted:
            weights += [weights_of(lists.slice(rows.start, rows.stop)) for lists, rows in pieces]
        if divides(feature):
            weighted = None
            if any(lists.weights is not None for lists, _ in pieces):
                weighted = Lists.concat([lists.slice(rows.start, rows.stop) for lists, rows in pieces])
            column = number if side == "user" else number - num_user_keys
            divisors[side][:end, column] = pooling_divisor(feature, length, weighted)
    sparse = KeyedJaggedTensor(
        keys=schema.keys(),
        values=torch.from_numpy(np.concatenate(values)),
        weights=torch.from_numpy(np.concatenate(weights)) if schema.is_weighted else None,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=num_rows,
    )
    return sparse, divisors


def _numbers(schema: Schema, side: Side, pieces: list[Rows]) -> np.ndarray:
    """(rows, all their columns) of the features without table, of all pieces."""
    features = schema.numbers(side)
    width = sum(feature.num_numbers for feature in features)
    number = np.empty((sum(rows.stop - rows.start for _, rows in pieces), width), np.float32)
    row = 0
    for columns, rows in pieces:
        below, column = row + rows.stop - rows.start, 0
        for feature in features:
            number[row:below, column : column + feature.num_numbers] = columns.numbers[feature.name][rows]
            column += feature.num_numbers
        row = below
    return number
