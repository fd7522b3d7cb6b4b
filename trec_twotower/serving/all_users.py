"""Recommendations for all users of a dataset, written as Parquet in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.data.arrow_types import one_chunk, widest
from trec_twotower.data.dataset import USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.split import RowGroup, Split
from trec_twotower.errors import ConfigError
from trec_twotower.index import Allowed
from trec_twotower.ops.hashing import id_keys
from trec_twotower.ops.ragged import offsets_of
from trec_twotower.ops.topk import MAX_CELLS
from trec_twotower.serving.retriever import Retriever
from trec_twotower.serving.user_state import newest_states, splits_of_states, state_columns
from trec_twotower.storage.atomic import replacing

BATCH_USERS = 1 << 14  # users that are read, encoded and written together: the size of a row group
BLOCK_ROWS = 1 << 15  # rows that are decoded together

Progress = Callable[[int, int], None]  # users written so far, users in all


@dataclass(frozen=True)
class NewestRows:
    """The rows of one part of the dataset that are the newest of their users."""

    split: Split
    groups: list[tuple[RowGroup, np.ndarray]]  # rows within each row group, ascending, int32

    @property
    def num_users(self) -> int:
        return sum(len(rows) for _, rows in self.groups)

    def batches(self, columns: list[str], batch_users: int) -> Iterator[pa.Table]:
        """Yield these rows in the order of the files, `batch_users` at a time."""
        waiting: list[pa.Table] = []
        for group, rows in self.groups:
            start = 0
            for block in self.split.blocks(group, columns, BLOCK_ROWS):
                mine = rows[(rows >= start) & (rows < start + len(block))] - start
                start += len(block)
                waiting.append(block.take(pa.array(mine)))
                while sum(map(len, waiting)) >= batch_users:
                    table = pa.concat_tables(waiting)
                    yield table.slice(0, batch_users).combine_chunks()
                    waiting = [table.slice(batch_users)]
        if any(map(len, waiting)):
            yield pa.concat_tables(waiting).combine_chunks()


def find_newest_rows(sources: FeatureDataset) -> list[NewestRows]:
    """Return the newest row of every user, as user_state.find_user finds it: one row per user.

    Reads the user ids alone, and keeps 12 bytes per user.
    """
    known = _KeySet()
    found = []
    for split in splits_of_states(sources):
        groups = []
        for group in reversed(split.row_groups):
            ids = one_chunk(split.read(group, [USER_ID])[USER_ID])
            valid = np.flatnonzero(ids.is_valid().to_numpy(zero_copy_only=False))
            keys = id_keys(ids.drop_null(), f"{group}, column {USER_ID!r}")
            new_keys, last = np.unique(keys[::-1], return_index=True)
            is_new = ~known.contain(new_keys)
            known.add(new_keys[is_new])
            rows = valid[len(keys) - 1 - last[is_new]]
            if len(rows):
                groups.append((group, np.sort(rows).astype(np.int32)))
        found.append(NewestRows(split, groups[::-1]))
    return [each for each in found if each.groups]


class _KeySet:
    """A growing set of 64-bit keys: sorted arrays, each at least twice as long as the next, in 8 bytes per key."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def contain(self, keys: np.ndarray) -> np.ndarray:
        """Return whether each key is in the set, bool (keys,)."""
        is_known = np.zeros(len(keys), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            is_known |= run[place] == keys
        return is_known

    def add(self, keys: np.ndarray) -> None:
        """Add sorted keys, none of which is in the set."""
        if not len(keys):
            return
        self._runs.append(keys)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last, before = self._runs.pop(), self._runs.pop()
            self._runs.append(np.sort(np.concatenate([before, last])))


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where `path` is a folder, or a file that may not be overwritten."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the path of a file by --out, such as {path / 'all.parquet'}.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already: give another file by --out, or replace it by --overwrite.")


def write_all(
    retriever: Retriever,
    path: Path,
    k: int = 10,
    *,
    allowed: Allowed | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the best `k` items of every user of the dataset to a Parquet file, and return the number of users.

    Its columns are `user_id`, `item_ids` (list, best first) and `scores` (list of float32), one row per user; lists are
    shorter where fewer items are left. Users are those with a row in serving/, test/, valid/ or train/. They have the
    items that `Retriever.recommend` returns. The scores are equal up to rounding, because the towers multiply a batch
    in another order than one user: items whose scores differ by less than that may change places. The file is complete
    or absent. All ranks call together: each encodes and ranks its share of a batch, and the first writes. `progress` is
    called after each batch on the first rank.

    Raises ConfigError for a `k` that does not fit the catalogue and for a `path` that exists, unless `overwrite`.
    """
    ranks, sources = retriever.ranks, retriever.loaded.sources
    k = retriever.check_counts(k)
    ranks.once(lambda: check_output(path, overwrite=overwrite))
    parts = ranks.together(lambda: find_newest_rows(sources))
    num_users, done = sum(part.num_users for part in parts), 0
    schema = _schema(sources, parts)
    batch_users = max(1, min(BATCH_USERS, MAX_CELLS // k))
    writers: list[pq.ParquetWriter] = []  # on the first rank

    def write(table: pa.Table) -> None:
        if not writers:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(replacing(path))
            writer = pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True)
            writers.append(stack.enter_context(writer))
        writers[0].write_table(table, row_group_size=batch_users)

    with ExitStack() as stack:
        for part in parts:
            for table in part.batches(state_columns(sources, part.split), batch_users):
                found = _ranked(retriever, table, part.split, k, allowed)
                ranks.once(partial(write, _answers(table[USER_ID], *found, sources, schema)))
                done += len(table)
                if progress is not None and ranks.is_first:
                    progress(done, num_users)
        ranks.once(stack.close)  # the file gets its name
    return num_users


def _ranked(
    retriever: Retriever, table: pa.Table, split: Split, k: int, allowed: Allowed | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and catalogue rows (users, k) of the users of a table, by all ranks together."""
    ranks = retriever.ranks
    mine = ranks.share(len(table))
    own = table.slice(mine.start, mine.stop - mine.start).combine_chunks()
    features, seen = ranks.together(lambda: newest_states(retriever.loaded.sources, own, split))
    shares = ranks.collect(retriever.rank(features, seen, k, allowed=allowed))
    score_BK, item_row_BK = (np.concatenate(arrays) for arrays in zip(*shares, strict=True))
    return score_BK, item_row_BK


def _schema(sources: FeatureDataset, parts: list[NewestRows]) -> pa.Schema:
    kinds = [part.split.columns[USER_ID] for part in parts]
    user_kind = reduce(lambda kind, other: widest(kind, other) or pa.large_string(), kinds)
    item_kind = sources.catalogue.ids.type
    return pa.schema({USER_ID: user_kind, "item_ids": pa.list_(item_kind), "scores": pa.list_(pa.float32())})


def _answers(
    user_ids: pa.ChunkedArray, score_BK: np.ndarray, item_row_BK: np.ndarray, sources: FeatureDataset, schema: pa.Schema
) -> pa.Table:
    is_found_BK = item_row_BK >= 0
    offsets = pa.array(offsets_of(is_found_BK.sum(axis=1)).astype(np.int32))
    items = sources.catalogue.ids.take(pa.array(item_row_BK[is_found_BK]))
    item_ids = pa.ListArray.from_arrays(offsets, items)
    scores = pa.ListArray.from_arrays(offsets, pa.array(score_BK[is_found_BK].astype(np.float32)))
    return pa.table([user_ids.cast(schema.field(USER_ID).type), item_ids, scores], schema=schema)
