"""Items (or users) with their features, hashed once and looked up by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.dataset import Split
from trec_twotower.data.hashing import id_keys
from trec_twotower.data.lists import Lists
from trec_twotower.data.probing import KeyTable
from trec_twotower.data.transforms import (
    Columns,
    Statistics,
    check_kind,
    check_weights,
    key_lists,
    one_chunk,
    transform,
)
from trec_twotower.errors import DataError
from trec_twotower.schema import FeatureSpec, TableSpec


class Catalogue:
    """One row a thing: its outside id, and its features as Columns.

    `row` is the position in the files' order: the `item_row` of export and index. Raises DataError for an id that is
    null or stands twice.
    """

    def __init__(
        self,
        split: Split,
        id_column: str,
        features: list[FeatureSpec],
        tables: Mapping[str, TableSpec],
        statistics: Mapping[str, Statistics],
    ) -> None:
        self.split = split
        self.id_column = id_column
        reads = {feature.reads for feature in features} | {feature.weights for feature in features if feature.weights}
        ids, parts = [], []
        for group, table in split.tables(sorted({id_column, *reads})):
            ids.append(one_chunk(table[id_column]))
            parts.append(transform(features, tables, statistics, table, str(group)))
        self.ids = pa.chunked_array(ids).combine_chunks()
        if isinstance(self.ids, pa.ChunkedArray):
            self.ids = pa.concat_arrays(self.ids.chunks)
        self.columns = Columns.concat(parts)
        self.keys = id_keys(self.ids, f"{split.folder}, column {id_column!r}")
        self._refuse_doubles()
        self._table = KeyTable(self.keys)

    def _refuse_doubles(self) -> None:
        order = np.argsort(self.keys, kind="stable")
        in_order = self.keys[order]
        same = np.flatnonzero(in_order[1:] == in_order[:-1])
        if same.size:
            first, second = order[same[0]], order[same[0] + 1]
            raise DataError(
                f"{self.split.folder}: {self.id_column} {self.ids[int(first)].as_py()!r} stands in rows {first:,} and "
                f"{second:,} ({same.size:,} such pairs): keep one row an id."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of_keys(self, keys: np.ndarray) -> np.ndarray:
        """The row of each 64-bit key, -1 where there is none."""
        return self._table.find(keys)

    def rows_of(self, ids: pa.Array, where: str) -> np.ndarray:
        """The row of each outside id, -1 where there is none."""
        return self.rows_of_keys(id_keys(ids, where))

    def rows_of_lists(self, lists: pa.Array, where: str) -> Lists:
        """The rows of lists of outside ids, -1 where there is none."""
        keys = key_lists(lists, where)
        return Lists(keys.offsets, self.rows_of_keys(keys.values))

    def words(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Everything the files say of these rows, for people to read."""
        wanted = np.asarray(rows)
        found: dict[int, dict[str, Any]] = {}
        for group in self.split.row_groups:
            inside = wanted[(wanted >= group.first_row) & (wanted < group.first_row + group.num_rows)]
            if inside.size:
                table = self.split.read(group, list(self.split.columns))
                taken = table.take(pa.array(inside - group.first_row)).to_pylist()
                found.update(zip(inside.tolist(), taken, strict=True))
        return [found[row] for row in wanted.tolist()]


def check_side(features: list[FeatureSpec], split: Split) -> None:
    """Raises ConfigError or DataError where a feature's column is missing from `split` or of the wrong type."""
    for feature in features:
        kind = split.require(feature.reads, f"feature {feature.name!r} reads")
        check_kind(feature, kind, str(split.folder))
        if feature.weights:
            weights = split.require(feature.weights, f"feature {feature.name!r} takes its weights from")
            check_weights(feature.weights, weights, f"{split.folder}, column {feature.reads!r}")


def find_id(ids: pa.Array, text: str) -> int | None:
    """The row of an id that a person typed, or None."""
    try:
        value = pa.scalar(text).cast(ids.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    row = pc.index(ids, value).as_py()
    return None if row < 0 else row
