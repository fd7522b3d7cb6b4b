"""A starter config for a dataset: one feature for each column, by its type and values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.data.arrow_types import is_list
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, USER_ID, Dataset
from trec_twotower.data.split import Split
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import is_text

SAMPLE_ROWS = 200_000  # rows of a split whose values are examined
NO_FEATURES = (USER_ID, ITEM_ID, POSITIVES, HISTORY, "timestamp", "weight")
FEW_VALUES = 64  # an integer column with more distinct values is a number

TEMPLATE = """\
# Starter config for {dataset}: {rows:,} training rows, {items:,} items. Written by `trec-twotower init`.
# docs/features.md lists all feature kinds and their settings. `trec-twotower features` checks this file on the data.
data:
  dataset: {dataset_yaml}
  batch_size: {batch_size}  # rows per step over all ranks
{rows_setting}tables:
  item: {{buckets: {buckets}, dim: 64}}  # `trec-twotower features` shows the share of ids that collide
user:
{user}
item:
  - {{name: item_id, kind: id, table: item}}
{item}model:
  dim: 64  # width of user and item vectors
  user_tower: {{mlp: [128]}}
  item_tower: {{mlp: [128]}}
  similarity: cosine
loss:
  temperature: 0.1
  negatives: {{in_batch: true, sampled: {sampled}}}  # corrected by sampling probability (logQ)
train:
  epochs: {epochs}
  optimizer: {{sparse: rowwise_adagrad, lr: 0.05, dense_lr: 2.0e-3, schedule: linear}}
evaluate: {{k: {k}, best: recall@{best}, users: 5000}}
"""


@dataclass(frozen=True)
class ColumnFacts:
    """Facts about the values of one column, from at most SAMPLE_ROWS rows."""

    name: str
    kind: pa.DataType
    values: pa.Array  # without nulls
    num_distinct: int

    @classmethod
    def of(cls, split: Split, name: str) -> ColumnFacts:
        chunks, rows = [], 0
        for group in split.row_groups:
            chunks.append(split.read(group, [name])[name].combine_chunks())
            rows += group.num_rows
            if rows >= SAMPLE_ROWS:
                break
        values = pa.chunked_array(chunks, split.columns[name]).combine_chunks().drop_null()
        elements = values.flatten() if is_list(values.type) else values
        return cls(name, split.columns[name], values, pc.count_distinct(elements).as_py())


def starter_config(folder: Path) -> str:
    """Return the text of a config for the dataset in `folder`, with comments.

    Raises DataError if the dataset has neither histories nor user ids to train on.
    """
    dataset = Dataset(folder)
    train, items = dataset.train, dataset.items
    by_user = not train.has(ITEM_ID)
    rows = train.num_rows
    user = [*_history(dataset, by_user), *_features(train, NO_FEATURES)]
    if dataset.users is not None:
        user += _features(dataset.users, (*NO_FEATURES, *train.columns))
    if not any(line.lstrip().startswith("- ") for line in user):
        raise DataError(f"{train.folder} has no column that describes users: add {HISTORY!r} or {USER_ID!r}.")
    k = [each for each in (10, 20, 50, 100) if each < items.num_rows] or [1]
    return TEMPLATE.format(
        dataset=folder,
        dataset_yaml=json.dumps(str(folder)),
        rows=rows,
        items=items.num_rows,
        batch_size=max(16, min(4096, _power_of_two(rows // 100))),
        rows_setting="  rows: user  # one row per user, whose items are inputs and targets in turn\n"
        if by_user
        else "",
        buckets=max(1024, _num_buckets(items.num_rows)),
        user="\n".join(user),
        item="".join(f"{line}\n" for line in _features(items, NO_FEATURES)),
        sampled=max(1, min(512, items.num_rows // 2)),
        epochs=5,
        k=k,
        best=k[0],
    )


def _history(dataset: Dataset, by_user: bool) -> list[str]:
    train = dataset.train
    if by_user or train.has(HISTORY):
        return ["  - {name: history, kind: bag, table: item, max_length: 50, pooling: sqrtn}  # the newest 50 items"]
    buckets = _num_buckets(min(train.num_rows, 1 << 24))
    return [f"  - {{name: user_id, kind: id, buckets: {buckets}, dim: 64}}  # no histories: users are known by id only"]


def _features(split: Split, skipped: tuple[str, ...]) -> list[str]:
    """Return one line per column: a feature, or a comment with the reason why there is none."""
    return [
        line
        for name in split.columns
        if name not in skipped and not name.startswith("history_")
        for line in _lines(ColumnFacts.of(split, name))
    ]


def _lines(column: ColumnFacts) -> Iterator[str]:
    settings = _settings(column)
    name = json.dumps(column.name) if not column.name.isidentifier() else column.name
    if settings.startswith("#"):
        yield f"  # {column.name}: {settings[2:]}"
    else:
        yield f"  - {{name: {name}, {settings}}}"


def _settings(column: ColumnFacts) -> str:
    """Return the settings of the feature for a column, or a comment."""
    kind, rows, distinct = column.kind, len(column.values), column.num_distinct
    if not rows:
        return "# all values are null"
    if is_list(kind):
        if pa.types.is_floating(kind.value_type):
            return f"kind: vector, size: {len(column.values[0])}"
        if is_text(kind.value_type) or pa.types.is_integer(kind.value_type):
            return f"kind: bag, {_table(distinct)}"
        return f"# no feature reads {kind}"
    if is_text(kind):
        words = pc.mean(pc.list_value_length(pc.utf8_split_whitespace(column.values))).as_py()
        if distinct > max(100, rows // 5) and words >= 2:
            return "kind: text, buckets: 65536, dim: 32"
        if distinct > max(100, rows // 2):
            return "# nearly every row has its own value, which a model cannot learn from"
        return f"kind: category, {_table(distinct)}"
    if pa.types.is_integer(kind) and distinct <= FEW_VALUES:
        return f"kind: category, {_table(distinct)}"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        low = float(pc.min(column.values).as_py())
        return f"kind: number, normalize: {'log1p' if low >= 0 else 'zscore'}"
    if pa.types.is_temporal(kind):
        return "# a time: add it as kind: time with part: hour, weekday, hour_of_week, month or age"
    return f"# no feature reads {kind}"


def _table(num_distinct: int) -> str:
    return (
        f"buckets: {_num_buckets(num_distinct)}, dim: {8 if num_distinct < 32 else 16 if num_distinct < 1000 else 32}"
    )


def _num_buckets(num_distinct: int) -> int:
    """Return a table size: at least 16 buckets per id for small tables, fewer for large ones, which cost memory."""
    per_id = 16 if num_distinct <= 10_000 else 8 if num_distinct <= 100_000 else 4 if num_distinct <= 1_000_000 else 2
    return per_id * _power_of_two(num_distinct)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()
