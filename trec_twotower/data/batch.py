"""A batch: what one rank takes in one step."""

from __future__ import annotations

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
    user: Columns | None = None,
    item: Columns | None = None,
    *,
    num_rows: int | None = None,
    candidates: Candidates | None = None,
    targets: Targets | None = None,
    num_rows_of_all_ranks: int = 0,
) -> Batch:
    """Assemble a Batch of `num_rows` (default: as many as needed); a side that is not wanted has no rows."""
    if num_rows is None:
        num_rows = max(columns.num_rows if columns is not None else 0 for columns in (user, item))
    batch = Batch(
        sparse=_keyed_jagged(schema, user, item, num_rows),
        **_dense(schema, "user", user, "B"),
        **_dense(schema, "item", item, "S"),
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


def _keyed_jagged(schema: Schema, user: Columns | None, item: Columns | None, num_rows: int) -> KeyedJaggedTensor:
    pairs = list(schema.sparse_pairs())
    lengths = np.zeros((len(pairs), num_rows), np.int32)
    values, weights = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for number, (side, feature) in enumerate(pairs):
        columns = user if side == "user" else item
        if columns is None:
            continue
        lists = columns.sparse[feature.name]
        lengths[number, : columns.num_rows] = lists.lengths
        values.append(lists.values)
        if schema.is_weighted:
            weights.append(weights_of(lists))
    return KeyedJaggedTensor(
        keys=schema.keys(),
        values=torch.from_numpy(np.concatenate(values)),
        weights=torch.from_numpy(np.concatenate(weights)) if schema.is_weighted else None,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=num_rows,
    )


def _dense(schema: Schema, side: Side, columns: Columns | None, axis: str) -> dict[str, Tensor]:
    num_rows = columns.num_rows if columns is not None else 0
    divisor = np.ones((num_rows, len(schema.sparse(side))), np.float32)
    number = np.empty((num_rows, 2 * len(schema.numbers(side))), np.float32)
    if columns is not None:
        for column, feature in enumerate(schema.sparse(side)):
            divisor[:, column] = pooling_divisor(feature, columns.sparse[feature.name])
        for column, feature in enumerate(schema.numbers(side)):
            number[:, 2 * column : 2 * column + 2] = columns.numbers[feature.name]
    return {
        f"{side}_divisor_{axis}F": torch.from_numpy(divisor),
        f"{side}_number_{axis}N": torch.from_numpy(number),
    }
