"""The rows of valid/ or test/: users, held-out items and items that are excluded from the ranking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, SERVING, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.columns import Columns
from trec_twotower.errors import DataError
from trec_twotower.ops.ragged import Ragged


@dataclass(frozen=True)
class HeldOut:
    """The users, held-out items and histories of valid/ or test/."""

    user_ids: pa.Array
    user: Columns
    positives: Ragged  # catalogue rows
    seen: Ragged  # catalogue rows: the items of the row's history

    @classmethod
    def read(cls, sources: FeatureDataset, split_name: str, sample: int | None = None, seed: int = 0) -> HeldOut:
        """Return all rows, or a seeded sample of them, without rows that have no held-out item (except in serving/)."""
        split = sources.dataset.split(split_name)
        columns = set(sources.user_columns())
        for column in columns:
            split.require(column, "the user tower reads")
        single = not split.has(POSITIVES)
        if single:
            split.require(ITEM_ID, f"holds the held-out items (there is no {POSITIVES!r} either)")
        sources.check_ids(split)
        columns |= {ITEM_ID if single else POSITIVES} | ({HISTORY} if split.has(HISTORY) else set())
        table = split.table(sorted(columns))
        where = str(split.folder)
        if single:
            positives = Ragged.singles(sources.item_rows(one_chunk(table[ITEM_ID]), f"{where}, column {ITEM_ID!r}"))
        else:
            positives = sources.item_row_lists(one_chunk(table[POSITIVES]), f"{where}, column {POSITIVES!r}")
        keep = np.arange(len(table)) if split_name == SERVING else np.flatnonzero(positives.lengths > 0)
        if sample is not None and sample < len(keep):
            keep = np.sort(np.random.default_rng(seed).choice(keep, sample, replace=False))
        if not keep.size:
            raise DataError(f"{where}: no row has a held-out item, so there is nothing to evaluate.")
        table = table.take(pa.array(keep)).combine_chunks()
        seen = Ragged.empty(len(keep))
        if split.has(HISTORY):
            place = f"{where}, column {HISTORY!r}"
            seen = sources.item_row_lists(one_chunk(table[HISTORY]), place, known_only=True)
        return cls(one_chunk(table[USER_ID]), sources.user_features(table, where), positives.take(keep), seen)

    def excluded(self, exclude_seen: bool | Literal["except_target"]) -> Ragged:
        """Return the items that are excluded from each row's ranking by evaluate.exclude_seen."""
        if exclude_seen is False:
            return Ragged.empty(len(self))
        if exclude_seen is True:
            return self.seen
        return self.seen.where(~self.positives.hold(self.seen))

    def __len__(self) -> int:
        return len(self.positives)

    def part(self, rows: slice) -> HeldOut:
        numbers = np.arange(len(self))[rows]
        return HeldOut(
            self.user_ids.take(pa.array(numbers)),
            self.user.take(numbers),
            self.positives.take(numbers),
            self.seen.take(numbers),
        )
