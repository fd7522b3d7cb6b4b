"""Item lists in addition to the positives: a column of the training rows, or a file keyed by item or user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.losses import ImpressionsConfig, LossConfig
from trec_twotower.data.arrow_types import one_chunk, plain_table, plain_type
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.lists import check_weights, is_id_list, key_lists, with_weights
from trec_twotower.data.parquet_files import UNREADABLE
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.ops.hashing import id_keys, is_id, is_text
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.arrow_values import python_value

MOST_WEIGHT = 1e15  # largest weight in the loss: the square of a gradient of 1e19 exceeds float32


def check_impressions(train: Split, impressions: ImpressionsConfig) -> None:
    """Raise ConfigError or DataError if a column of the impressions is missing from train/ or has a wrong type."""
    kind = train.require(impressions.column, "loss.impressions.column names")
    if not is_id_list(kind):
        raise DataError(
            f"{train.folder}: column {impressions.column!r}, which loss.impressions.column names, is {kind}, but lists "
            "of integers or strings are needed: cast it."
        )
    for setting, name in (("labels", impressions.labels), ("weights", impressions.weights)):
        if name is not None:
            kind = train.require(name, f"loss.impressions.{setting} names")
            check_weights(name, kind, f"{train.folder}, column {impressions.column!r}")


def impression_columns(impressions: ImpressionsConfig) -> list[str]:
    """Return the columns that the impressions are read from."""
    return [name for name in (impressions.column, impressions.labels, impressions.weights) if name is not None]


def read_impressions(
    sources: FeatureDataset, loss: LossConfig, table: pa.Table, where: str
) -> tuple[Ragged, Ragged | None]:
    """Return the impressions of the rows of a table, and their weights (None: the config has no weights).

    The items are catalogue rows, with the labels as weights if there are any. Depending on `loss.impressions.unknown`,
    items outside the catalogue are left out or raise DataError.
    """
    impressions = loss.impressions
    assert impressions is not None
    ids, place = one_chunk(table[impressions.column]), f"{where}, column {impressions.column!r}"
    keys = key_lists(ids, place)
    items = Ragged(keys.offsets, sources.catalogue.rows_of_keys(keys.values))
    if impressions.labels is not None:
        items = with_weights(items, ids, one_chunk(table[impressions.labels]), place, impressions.labels, "label")
        assert items.weights is not None
        is_outside = (items.weights < 0) | (items.weights > 1)
        if loss.learns_graded_labels and is_outside.any():
            row, label = int(items.rows[is_outside][0]), items.weights[is_outside][0]
            raise DataError(
                f"{place}, row {row:,}: {impressions.labels!r} has the label {label:g}, but loss.kind {loss.kind} "
                "needs labels from 0 to 1: divide them by the highest, or choose another kind."
            )
    weights = None
    if impressions.weights is not None:
        weights = with_weights(items, ids, one_chunk(table[impressions.weights]), place, impressions.weights).weights
        assert weights is not None
        if (bad := (weights < 0) | (weights > MOST_WEIGHT)).any():
            row, weight = int(items.rows[bad][0]), weights[bad][0]
            raise DataError(
                f"{place}, row {row:,}: {impressions.weights!r} has the weight {weight:g}: write weights from 0 to "
                f"{MOST_WEIGHT:g}."
            )
    is_known = items.values >= 0
    if not is_known.all():
        if impressions.unknown == "error":
            raise _unknown(sources, items, ids, place, "loss.impressions.unknown")
        items, weights = items.where(is_known), None if weights is None else weights[is_known]
    return items, None if weights is None else Ragged(items.offsets, weights)


def _unknown(sources: FeatureDataset, items: Ragged, ids: pa.Array, place: str, setting: str) -> DataError:
    is_unknown = items.values < 0
    row = int(items.rows[is_unknown][0])
    item = python_value(ids.flatten().drop_null(), int(is_unknown.argmax()))
    error = sources.unknown(item, int(is_unknown.sum()), f"{place}, row {row:,}")
    return DataError(f"{error} ({setting}: skip leaves out only such items.)")


class KeyedLists:
    """Lists of items by the 64-bit key of an item or user, from a Parquet file that is read whole."""

    def __init__(self, keys: np.ndarray, lists: Ragged, slots: np.ndarray) -> None:
        self.lists = lists  # catalogue rows, int32
        self._table = KeyTable(keys, slots)

    @classmethod
    def read(
        cls, path: Path, key: str, items: str, sources: FeatureDataset, setting: str, *, skips_unknown: bool
    ) -> KeyedLists:
        """Read the column `items`, keyed by the column `key` (user_id or item_id); `setting` is the file's config key.

        Raises ConfigError if the file or a column is missing, DataError if the content is unusable.
        """
        if not path.is_file():
            neighbours = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ConfigError(f"{setting} is {path}, which is not a file{nearest(path.name, neighbours)}.")
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            kinds = {field.name: plain_type(field.type) for field in file.schema_arrow}
            for name in (key, items):
                if name not in kinds:
                    raise ConfigError(
                        f"{path}, which {setting} names, has no column {name!r}{nearest(name, kinds)}: it needs "
                        f"{key!r} and {items!r}."
                    )
            table = plain_table(file.read([key, items]), [key, items])
        except UNREADABLE as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from None
        if not is_id_list(kinds[items]):
            raise DataError(f"{path}: column {items!r} is {kinds[items]}, but lists of integers or strings are needed.")
        train = sources.dataset.train if key == USER_ID else sources.dataset.items
        _check_same_kind(f"{path}, column {key!r}", kinds[key], f"{train.folder}", train.columns[key])
        catalogue = sources.dataset.items
        _check_same_kind(
            f"{path}, column {items!r}", kinds[items].value_type, f"{catalogue.folder}", catalogue.columns[ITEM_ID]
        )
        keys = id_keys(one_chunk(table[key]), f"{path}, column {key!r}").astype(np.int64)
        ids, place = one_chunk(table[items]), f"{path}, column {items!r}"
        lists = sources.catalogue.rows_of_lists(ids, place)
        if (lists.values < 0).any():
            if not skips_unknown:
                raise _unknown(sources, lists, ids, place, setting.rpartition(".")[0] + ".unknown")
            lists = lists.where(lists.values >= 0)
        slots = np.zeros(KeyTable.num_slots(len(keys)), np.int32)
        duplicates = KeyTable(keys, slots).insert(0, len(keys))
        if len(duplicates):
            first, second = duplicates[0].tolist()
            name = python_value(table[key], second)
            raise DataError(
                f"{path}: {key} {name!r} is in rows {first:,} and {second:,}: keep one row with all its items."
            )
        return cls(keys, Ragged(lists.offsets, lists.values.astype(np.int32)), slots)

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of each key's list, -1 if it has none."""
        return self._table.find(keys)


def _check_same_kind(here: str, kind: pa.DataType, there: str, other: pa.DataType) -> None:
    """Raise DataError unless both types are integers or both are text."""
    if not is_id(kind) or is_text(kind) != is_text(other):
        raise DataError(
            f"{here} is {kind}, but the ids of {there} are {other}: write both as integers or both as text."
        )
