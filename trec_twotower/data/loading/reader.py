"""Reads row groups into hashed, permuted rows that are ready to be cut into batches.

Each rank owns an equal, contiguous part of a window's rows in file order. It decodes and hashes only these rows. From
the rows of other ranks it reads only the items, because all ranks share the candidates of a step. The rows of a step do
not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa

from trec_twotower.config.data import DataConfig
from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.config.losses import LossConfig
from trec_twotower.config.schema import bucket_names
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.lists import key_lists, parallel_elements
from trec_twotower.data.features.numeric import is_number
from trec_twotower.data.loading.examples import Examples, RowItems
from trec_twotower.data.loading.order import Unit
from trec_twotower.data.loading.row_cache import Cache
from trec_twotower.data.loading.step_buckets import BucketedRows, Buffers, RowBucketer
from trec_twotower.data.negatives.mined import MOST_WEIGHT, check_impressions, impression_columns, read_impressions
from trec_twotower.data.split import RowGroup
from trec_twotower.distributed.host_memory import keep_freed
from trec_twotower.errors import DataError
from trec_twotower.ops.bucket_kernels import mark_buckets
from trec_twotower.ops.hashing import fingerprints, id_keys, uniform
from trec_twotower.ops.ragged import Ragged

WEIGHT = "weight"
BLOCK_ROWS = 1 << 17  # rows decoded and hashed at once; smaller blocks make the system zero new memory pages each time
_INPUT = 0x696E  # seed of this module's random stream


@dataclass(frozen=True)
class UnitRows:
    """This rank's rows of a unit and the items of all ranks' rows, with one bucket per step.

    The rows of a bucket keep the order of the files; this rank's rows are contiguous among them.
    """

    mine: BucketedRows
    items: BucketedRows | None = None  # items of all ranks' rows; None: there is one rank
    rows_per_rank: np.ndarray | None = None  # (buckets, ranks)

    def num_rows(self, bucket: int) -> list[int]:
        """Return the number of rows of each rank in a bucket."""
        if self.rows_per_rank is not None:
            return self.rows_per_rank[bucket].tolist()
        return [self.mine.bucket_rows[bucket]]


class UnitReader:
    """Reads units of the training rows for one rank."""

    def __init__(self, sources: FeatureDataset, data: DataConfig, loss: LossConfig, rank: int, num_ranks: int) -> None:
        self.sources = sources
        self.data = data
        self.loss = loss
        self.rank, self.num_ranks = rank, num_ranks
        train = sources.dataset.train
        self.is_by_user = data.rows == "user"
        self.masks_history = loss.mask_history and train.has(HISTORY) and not self.is_by_user
        self.sampled_features = [
            feature for feature in sources.context if self.is_by_user and feature.source_column == HISTORY
        ]
        self.impressions = loss.impressions
        if self.impressions is not None:
            check_impressions(train, self.impressions)
        mined = loss.negatives.mined
        self.keeps_user_key = loss.known is not None or (mined is not None and mined.key == USER_ID)
        self.own_lists = []
        if data.target_in_history != "keep":
            sources.check_lists_of_items()
            self.own_lists = sources.lists_of_items()
        self._buffers = Buffers()
        keep_freed()
        self.cache = Cache.open(data, sources, self._settings) if data.cache is not None else None

    @property
    def _settings(self) -> dict[str, object]:
        """Return the settings, apart from those of the data, that determine which columns are cached."""
        impressions = None if self.impressions is None else self.impressions.model_dump(exclude={"shared"})
        settings: dict[str, object] = {"masks_history": self.loss.mask_history, "keeps_user_key": self.keeps_user_key}
        target_rule = (
            "keep" if self.data.target_in_history == "keep" else [self.data.target_in_history, *self.own_lists]
        )
        return {**settings, "impressions": impressions, "target_in_history": target_rule}

    def read(self, unit: Unit, cuts: np.ndarray) -> UnitRows:
        """Decode and hash the rows of a unit, mostly without the interpreter lock.

        `cuts` divides the unit's order into the runs of the steps; the first cut is 0, the last the number of rows.
        """
        num_buckets = len(cuts) - 1
        bucket_of = np.empty(unit.num_rows, np.int32)
        mark_buckets(unit.order(self.data.seed), cuts, bucket_of)
        if self.num_ranks == 1:
            return UnitRows(self._bucketed(_parts(unit, 0, unit.num_rows), bucket_of, num_buckets, unit.epoch))
        # The bounds of each rank's rows of the window, as row numbers of this unit.
        bounds = unit.window_rows * np.arange(self.num_ranks + 1) // self.num_ranks - unit.first
        bounds = np.clip(bounds, 0, unit.num_rows)
        low, high = bounds[self.rank : self.rank + 2].tolist()
        items = RowBucketer(bucket_of, num_buckets, Buffers())
        self._add_items(items, _parts(unit, 0, low), unit.epoch)
        mine = self._bucketed(_parts(unit, low, high), bucket_of[low:high], num_buckets, unit.epoch, items)
        self._add_items(items, _parts(unit, high, unit.num_rows), unit.epoch)
        rank_rows = [
            np.bincount(bucket_of[start:stop], minlength=num_buckets) for start, stop in pairwise(bounds.tolist())
        ]
        return UnitRows(mine, items.finish(), np.stack(rank_rows, axis=1))

    def _bucketed(
        self,
        parts: list[tuple[RowGroup, int, int]],
        bucket_of: np.ndarray,
        num_buckets: int,
        epoch: int,
        items: RowBucketer | None = None,
    ) -> BucketedRows:
        """Return these rows of row groups, bucketed by `bucket_of`; add their items to `items` as well."""
        bucketer = RowBucketer(bucket_of, num_buckets, self._buffers)
        for group, start, stop in parts:
            cached = self._cached(group)
            blocks = self._blocks(group, start, stop) if cached is None else [(start, cached.slice(start, stop))]
            for row, rows in blocks:
                examples = self._split_inputs(rows, group.first_row + row, epoch)
                bucketer.add(examples)
                if items is not None:
                    items.add(examples.items)
        if not parts:
            bucketer.add(self._no_rows)
        return bucketer.finish()

    def _add_items(self, items: RowBucketer, parts: list[tuple[RowGroup, int, int]], epoch: int) -> None:
        for part in parts:
            items.add(self._items(*part, epoch))

    @cached_property
    def _no_rows(self) -> Examples:
        """Return zero rows with all columns, for units of other ranks."""
        group = self.sources.dataset.train.row_groups[0]
        table = self.sources.dataset.train.read(group, self._columns(), dictionaries=True).slice(0, 0)
        return self._split_inputs(self._hash(table, str(group)), 0, 0)

    def _cached(self, group: RowGroup) -> Examples | None:
        """Return the whole row group from the cache, adding it first if it is missing; None without a cache."""
        if self.cache is None:
            return None
        rows = self.cache.get(group)
        if rows is None:
            rows = Examples.concat([block for _, block in self._blocks(group, 0, group.num_rows)])
            self.cache.put(group, rows)
        return rows

    def _blocks(self, group: RowGroup, start: int, stop: int) -> Iterator[tuple[int, Examples]]:
        """Yield blocks of the hashed rows start .. stop - 1 of a row group, each with its first row number."""
        row, train = 0, self.sources.dataset.train
        for table in train.blocks(group, self._columns(), BLOCK_ROWS, dictionaries=True):
            first, last = max(start - row, 0), min(stop - row, len(table))
            if first < last:
                try:
                    rows = self._hash(table.slice(first, last - first), str(group))
                except DataError:
                    if last - first < group.num_rows:  # raise it with row numbers of the whole row group
                        self._hash(train.read(group, self._columns(), dictionaries=True), str(group))
                    raise
                yield row + first, rows
            row += len(table)

    def _columns(self) -> list[str]:
        train = self.sources.dataset.train
        columns = set(self.sources.user_columns()) - {feature.source_column for feature in self.sampled_features}
        columns |= set(self._item_columns())
        columns |= {column for each in self.own_lists for column in each}
        columns |= ({HISTORY} if self.masks_history else set()) | ({WEIGHT} if train.has(WEIGHT) else set())
        return sorted(columns)

    def _item_columns(self) -> list[str]:
        """Return the columns that RowItems are built from."""
        columns = {POSITIVES} if self.is_by_user else {ITEM_ID}
        columns |= set(impression_columns(self.impressions)) if self.impressions is not None else set()
        return sorted(columns | ({USER_ID} if self.keeps_user_key else set()))

    def _hash(self, table: pa.Table, where: str) -> Examples:
        """Hash a table independently of the epoch; sampled features still hold all items of a row."""
        for columns in self.own_lists:
            table = drop_target_items(table, columns, where, refuses=self.data.target_in_history == "error")
        positives = self.sources.positives(table, where)
        parsed, history = None, None
        if self.is_by_user:
            parsed = {HISTORY: key_lists(one_chunk(table[POSITIVES]), where)}
        if self.masks_history:
            keys = key_lists(one_chunk(table[HISTORY]), f"{where}, column {HISTORY!r}")
            history = Ragged(keys.offsets, fingerprints(keys.values))
        user = self.sources.user_features(table, where, parsed, uncut=self.is_by_user)
        impressions, impression_weight, user_key = self._extra_items(table, where)
        return Examples(
            user, positives, None, history, self._weights(table, where), impressions, impression_weight, user_key
        )

    def _extra_items(self, table: pa.Table, where: str) -> tuple[Ragged | None, Ragged | None, np.ndarray | None]:
        """Return the impressions, their weights and the user keys; each is None if the loss does not use it."""
        items = weight = user_key = None
        if self.impressions is not None:
            items, weight = read_impressions(self.sources, self.loss, table, where)
        if self.keeps_user_key:
            user_key = id_keys(one_chunk(table[USER_ID]), f"{where}, column {USER_ID!r}")
        return items, weight, user_key

    def _split_inputs(self, rows: Examples, first_row: int, epoch: int) -> Examples:
        """Return the rows of an epoch: with one row per user, some items become input, the rest stay positives."""
        if not self.is_by_user:
            return rows
        items = rows.positives
        is_input = draw_inputs(items, first_row, self.data, epoch)
        sparse = dict(rows.user.sparse)
        for feature in self.sampled_features:
            for name in bucket_names(feature.name, self.sources.schema.table_of(feature)):
                sparse[name] = sparse[name].where(is_input).newest(feature.length_limit)
        user = replace(rows.user, sparse=sparse)
        known = items if self.loss.mask_history else None
        return replace(rows, user=user, positives=items.where(~is_input), known=known)

    def _items(self, group: RowGroup, start: int, stop: int, epoch: int) -> RowItems:
        """Return the items of rows that another rank owns."""
        cached = self.cache.get(group) if self.cache is not None else None
        if cached is not None:
            items = cached.slice(start, stop).items
        else:
            whole = self.sources.dataset.train.read(group, self._item_columns(), dictionaries=True)
            table = whole.slice(start, stop - start)
            impressions, _, user_key = self._extra_items(table, _place(group, start))
            items = RowItems(self.sources.positives(table, _place(group, start)), impressions, user_key)
        if not self.is_by_user:
            return items
        is_input = draw_inputs(items.positives, group.first_row + start, self.data, epoch)
        return replace(items, positives=items.positives.where(~is_input))

    def _weights(self, table: pa.Table, where: str) -> np.ndarray | None:
        if WEIGHT not in table.column_names:
            return None
        array = one_chunk(table[WEIGHT])
        if not is_number(array.type):
            raise DataError(
                f"{where}: column {WEIGHT!r} is {array.type}, but is read as the weight of each row in the loss: write "
                "numbers, or rename it."
            )
        weight = array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        bad = np.flatnonzero(~((weight >= 0) & (weight <= MOST_WEIGHT)))
        if bad.size:
            raise DataError(
                f"{where}, column {WEIGHT!r}, row {bad[0]:,}: {array[bad[0]].as_py()}: row weights are at least 0 "
                f"and at most {MOST_WEIGHT:g}, since squared gradients of larger ones overflow. Divide all weights by "
                "their mean."
            )
        return weight


def _place(group: RowGroup, start: int) -> str:
    """Return the row group, and the row from which an error message counts rows."""
    return f"{group} (from row {start:,})" if start else str(group)


def _parts(unit: Unit, low: int, high: int) -> list[tuple[RowGroup, int, int]]:
    """Return the row groups of the unit's rows low .. high - 1, each with its start and stop row."""
    parts, first = [], 0
    for group in unit.groups:
        start, stop = max(low - first, 0), min(high - first, group.num_rows)
        if start < stop:
            parts.append((group, start, stop))
        first += group.num_rows
    return parts


def drop_target_items(table: pa.Table, columns: list[str], where: str, *, refuses: bool) -> pa.Table:
    """Return the table with each row's target item removed from its lists, or raise DataError if `refuses`.

    The first column has the item ids; the other columns have one value per id.
    """
    history = one_chunk(table[columns[0]])
    history = history.fill_null(pa.scalar([], history.type))
    ids, row = history.flatten(), history.value_parent_indices().to_numpy()
    is_id = ids.is_valid().to_numpy(zero_copy_only=False)
    is_own = np.zeros(len(ids), bool)
    is_own[is_id] = id_keys(ids.drop_null(), where) == id_keys(one_chunk(table[ITEM_ID]), where)[row[is_id]]
    if not is_own.any():
        return table
    if refuses:
        raise DataError(
            f"{where}, row {row[is_own.argmax()]:,}: its {columns[0]} holds the item that the row predicts "
            f"(as in {len(np.unique(row[is_own])):,} rows of this part): write only items from before the event, or "
            "set data.target_in_history to drop (or to keep, if users interact with items repeatedly)."
        )
    offsets = np.concatenate([[0], np.cumsum(~is_own)])[history.offsets.to_numpy() - history.offsets[0].as_py()]
    for name in columns:
        lists = one_chunk(table[name])
        parallel_elements(history, lists, where, name)  # raises if the lengths differ
        filtered = pa.LargeListArray.from_arrays(pa.array(offsets), lists.flatten().filter(pa.array(~is_own)))
        table = table.set_column(table.column_names.index(name), name, filtered)
    return table


def draw_inputs(items: Ragged, first_row: int, data: DataConfig, epoch: int) -> np.ndarray:
    """Return which items of the users are input in an epoch (bool): a share of `input_share`, never all of a user's.

    The draw depends on the item, not on its position: both copies of a repeated item are on the same side.
    """
    draw = uniform(_INPUT, data.seed, epoch, first_row + items.rows, items.values)
    is_input = draw < data.input_share
    targets = np.bincount(items.rows[~is_input], minlength=len(items))
    for row in np.flatnonzero((targets == 0) & (items.lengths > 0)):
        low, high = items.offsets[row], items.offsets[row + 1]
        is_input[low:high] = draw[low:high] < draw[low:high].max()
    return is_input
