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

from trec_twotower.data.lists import weights_of
from trec_twotower.data.transforms import Columns, pooling_divisor
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
    log_q: np.ndarray
    is_negative: np.ndarray
    sizes: tuple[int, ...]  # how many of them each rank encodes, in order


@dataclass(frozen=True)
class Targets:
    """The pairs of this rank's rows and the step's candidates: those taken, and those that are no negatives."""

    positive_row: np.ndarray
    positive_column: np.ndarray
    positive_weight: np.ndarray
    known_row: np.ndarray  # the positives among them
    known_column: np.ndarray


def make_batch(
    schema: Schema,
    user: Columns | Sequence[Columns] | None = None,
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
    users = [] if user is None else [user] if isinstance(user, Columns) else list(user)
    items = [] if item is None else [item]
    num_users, num_items = (sum(piece.num_rows for piece in pieces) for pieces in (users, items))
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
        batch.log_q_C = torch.from_numpy(candidates.log_q)
        batch.is_negative_C = torch.from_numpy(candidates.is_negative)
        batch.positive_row_P = torch.from_numpy(targets.positive_row)
        batch.positive_column_P = torch.from_numpy(targets.positive_column)
        batch.positive_weight_P = torch.from_numpy(targets.positive_weight)
        batch.known_row_M = torch.from_numpy(targets.known_row)
        batch.known_column_M = torch.from_numpy(targets.known_column)
    return batch


def _keyed_jagged(
    schema: Schema, sides: Mapping[Side, list[Columns]], num_rows: int
) -> tuple[KeyedJaggedTensor, dict[Side, np.ndarray]]:
    """All keys' bags, and for each side what its pooled sums are divided by: float32 (num_rows, features)."""
    pairs = list(schema.sparse_pairs())
    lengths = np.zeros((len(pairs), num_rows), np.int32)
    values, weights = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    divisors = {side: np.ones((num_rows, len(schema.sparse(side))), np.float32) for side in sides}
    for number, (side, feature) in enumerate(pairs):
        row = 0
        column = number if side == "user" else number - len(schema.sparse("user"))
        for piece in sides[side]:
            lists, rows = piece.sparse[feature.name], slice(row, row + piece.num_rows)
            row += piece.num_rows
            values.append(lists.values)
            if schema.is_weighted:
                weights.append(weights_of(lists))
            if lists.is_single:
                lengths[number, rows] = 1
                continue
            np.subtract(lists.offsets[1:], lists.offsets[:-1], out=lengths[number, rows], casting="unsafe")
            divisors[side][rows, column] = pooling_divisor(feature, lists, lengths[number, rows])
    sparse = KeyedJaggedTensor(
        keys=schema.keys(),
        values=torch.from_numpy(np.concatenate(values)),
        weights=torch.from_numpy(np.concatenate(weights)) if schema.is_weighted else None,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=num_rows,
    )
    return sparse, divisors


def _numbers(schema: Schema, side: Side, pieces: list[Columns]) -> np.ndarray:
    """(rows, two a number) of all pieces."""
    names = [feature.name for feature in schema.numbers(side)]
    number = np.empty((sum(piece.num_rows for piece in pieces), 2 * len(names)), np.float32)
    row = 0
    for piece in pieces:
        for column, name in enumerate(names):
            number[row : row + piece.num_rows, 2 * column : 2 * column + 2] = piece.numbers[name]
        row += piece.num_rows
    return number
