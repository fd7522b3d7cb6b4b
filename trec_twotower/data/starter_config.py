"""A starter config for a dataset: one feature for each column, by its type and values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.data.arrow_types import is_list
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, TRAIN, USER_ID, Dataset
from trec_twotower.data.split import Split
from trec_twotower.ops.hashing import is_text

SAMPLE_ROWS = 200_000  # rows of a split whose values are examined
NO_FEATURES = (USER_ID, ITEM_ID, POSITIVES, HISTORY, "timestamp", "weight")
FEW_VALUES = 64  # an integer column with more distinct values is a number
NUMBER = "kind: number, normalize: log1p"
TABLE_NAMES = ("item", "item_ids", "item_id_table")  # of the shared table; a column of this name would conflict

TEMPLATE = """\
# Starter config for a dataset of {rows:,} training rows and {items:,} items, written by `trec-twotower init`.
# docs/features.md lists all feature kinds and their settings. `trec-twotower features` checks this file on the data.
data:
  dataset: {dataset}
  batch_size: {batch_size}  # rows per step over all ranks
{rows_setting}tables:
  {table}: {{buckets: {buckets}, dim: 64}}  # `trec-twotower features` shows the share of ids that collide
user:
{user}
item:
  - {{name: item_id, kind: id, table: {table}}}
{item}model:
  dim: 64  # width of user and item vectors
  user_tower: {{mlp: [128]}}
  item_tower: {{mlp: [128]}}
  similarity: cosine
loss:
  temperature: 0.1
  negatives: {{in_batch: true, sampled: {sampled}}}  # logQ-corrected; sampled: 0 to recommend new items
train:
  epochs: 5
  optimizer: {{sparse: rowwise_adagrad, lr: 0.05, dense_lr: 2.0e-3, schedule: linear}}
evaluate: {{k: {k}, best: recall@{best}, users: 5000}}
"""
# Comment on features that are read from the training rows.
CONTEXT = "  # must be known before the interaction; else remove it"


def starter_config(folder: Path | str) -> str:
    """Return the text of a config for the dataset in `folder`, with comments."""
    dataset = Dataset(folder)
    train, items = dataset.train, dataset.items
    by_user = not train.has(ITEM_ID)
    splits = [split for split in (train, dataset.users, items) if split is not None]
    table = next(name for name in TABLE_NAMES if not any(split.has(name) for split in splits))
    user = [_history(train, by_user, table), *_features(train, NO_FEATURES, comment=CONTEXT)]
    user_columns = [*train.columns, *(dataset.users.columns if dataset.users is not None else ())]
    if dataset.users is not None:
        user += _features(dataset.users, (*NO_FEATURES, *train.columns))
    k = [each for each in (10, 20, 50, 100) if each < items.num_rows] or [1]
    return TEMPLATE.format(
        dataset=_quoted(str(folder)),
        rows=train.num_rows,
        items=items.num_rows,
        batch_size=min(train.num_rows, max(16, min(4096, _power_of_two(train.num_rows // 100)))),
        rows_setting="  rows: user  # one row per user, whose items are inputs and targets in turn\n"
        if by_user
        else "",
        table=table,
        buckets=max(1024, _num_buckets(items.num_rows)),
        user="\n".join(user),
        item="".join(f"{line}\n" for line in _features(items, NO_FEATURES, user_columns)),
        sampled=max(1, min(512, items.num_rows // 2)),
        k=k,
        best=k[0],
    )


def _history(train: Split, by_user: bool, table: str) -> str:
    if by_user or train.has(HISTORY):
        return (
            f"  - {{name: history, kind: bag, table: {table}, max_length: 50, pooling: sqrtn}}  # the newest 50 items"
        )
    buckets = _num_buckets(min(train.num_rows, 1 << 24))
    return f"  - {{name: user_id, kind: id, buckets: {buckets}, dim: 64}}  # no histories: users are known by id only"


def _features(
    split: Split, skipped: tuple[str, ...], user_columns: Sequence[str] = (), *, comment: str = ""
) -> list[str]:
    """Return one line per column: a feature, or a comment with the reason why there is none.

    A feature of items gets another name than a column of `user_columns`, since both may have a table of that name.
    """
    return [
        _line(name, f"item_{name}" if name in user_columns else name, _settings(split, name), comment)
        for name in split.columns
        if name not in skipped and not name.startswith("history_")
    ]


def _line(column: str, name: str, settings: str, comment: str) -> str:
    if settings.startswith("#"):
        return f"  # {_quoted(column)}: {settings[2:]}"
    name = name.replace(".", "_")  # a dot separates the parts of a setting
    source = "" if name == column else f"column: {_quoted(column)}, "
    return f"  - {{name: {_quoted(name)}, {source}{settings}}}{comment}"


def _quoted(text: str) -> str:
    """Return text for YAML: as it is if it is a plain word, else in double quotes."""
    is_plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) and text.lower() not in ("null", "true", "false")
    return text if is_plain else json.dumps(text)


def _settings(split: Split, name: str) -> str:
    """Return the settings of the feature for a column, or a comment that begins with #."""
    kind, values = split.columns[name], _sample(split, name)
    is_bag = is_list(kind) and (is_text(kind.value_type) or pa.types.is_integer(kind.value_type))
    if not len(values):
        return "# all values are null"
    if is_list(kind) and pa.types.is_floating(kind.value_type):
        lengths = pc.list_value_length(values).unique().to_pylist()
        return (
            f"kind: vector, size: {lengths[0]}" if len(lengths) == 1 and lengths[0] else "# vectors of several lengths"
        )
    if is_bag and split.name == TRAIN:
        return "# a list: add it as kind: bag if it is known before the interaction and lacks the target item"
    if is_bag:
        return f"kind: bag, {_table(pc.count_distinct(values.flatten()).as_py())}"
    if is_text(kind):
        return _text_settings(values)
    if pa.types.is_integer(kind):
        num_distinct = pc.count_distinct(values).as_py()
        is_id = name.lower() == "id" or name.lower().endswith("_id")
        return f"kind: category, {_table(num_distinct)}" if is_id or num_distinct <= FEW_VALUES else NUMBER
    if pa.types.is_floating(kind):
        is_finite = pc.all(pc.is_finite(values)).as_py()
        return NUMBER if is_finite else f"{NUMBER}, nan: missing"
    if pa.types.is_decimal(kind):
        return NUMBER
    if pa.types.is_temporal(kind):
        return "# a time: add it as kind: time with part: hour, weekday, hour_of_week, month or age"
    return f"# no feature reads {kind}"


def _text_settings(values: pa.Array) -> str:
    num_distinct, num_rows = pc.count_distinct(values).as_py(), len(values)
    num_words = pc.mean(pc.list_value_length(pc.utf8_split_whitespace(values))).as_py()
    if num_distinct > max(100, num_rows // 5) and num_words >= 2:
        return "kind: text, buckets: 65536, dim: 32"
    if num_distinct > max(100, num_rows // 2):
        return "# nearly every row has another value, from which a model cannot learn"
    return f"kind: category, {_table(num_distinct)}"


def _sample(split: Split, name: str) -> pa.Array:
    """Return the values of a column that are not null, from the row groups up to SAMPLE_ROWS rows."""
    chunks, num_rows = [], 0
    for group in split.row_groups:
        chunks.append(split.read(group, [name])[name].combine_chunks())
        num_rows += group.num_rows
        if num_rows >= SAMPLE_ROWS:
            break
    return pa.chunked_array(chunks, split.columns[name]).combine_chunks().drop_null()


def _table(num_distinct: int) -> str:
    dim = 8 if num_distinct < 32 else 16 if num_distinct < 1000 else 32
    return f"buckets: {_num_buckets(num_distinct)}, dim: {dim}"


def _num_buckets(num_distinct: int) -> int:
    """Return a table size: at least 16 buckets per id for small tables, fewer for large ones, which need memory."""
    per_id = 16 if num_distinct <= 10_000 else 8 if num_distinct <= 100_000 else 4 if num_distinct <= 1_000_000 else 2
    return per_id * _power_of_two(num_distinct)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()
