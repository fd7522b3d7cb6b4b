"""The items and users that a run began with, and whether items/ and users/ still have them as they were.

A run keeps 12 bytes per item: the key of its id and a digest of its values in the columns that features read. Of users
it keeps sums of digests alone. Other columns may change at any time, and so may the layout of the files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trec_twotower.data.item_table import Catalogue
from trec_twotower.errors import DataError
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.storage.arrow_values import python_value
from trec_twotower.storage.atomic import write_file

ANOTHER_RUN = "train into another run_dir (--init-from RUN starts with this run's weights)."


@dataclass(frozen=True)
class KnownItems:
    """The items of a run in the order of their rows when it began."""

    keys: np.ndarray  # (K,) int64, of their ids
    digests: np.ndarray  # (K,) uint32, of their values
    sums: Mapping[str, int]  # Catalogue.column_sums by column

    @classmethod
    def of(cls, catalogue: Catalogue) -> KnownItems:
        """Return those of a catalogue with which a run begins."""
        return cls(catalogue.keys, catalogue.digests, catalogue.column_sums(np.ones(len(catalogue), bool)))

    @classmethod
    def read(cls, path: Path, sums: Mapping[str, int], fix: str) -> KnownItems:
        """Return what `write` has written; raises DataError where the file is missing or damaged."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls(arrays["keys"], arrays["digests"], sums)
        except Exception as error:  # an altered archive can raise anything
            raise DataError(f"{path} cannot be read ({error}): {fix}") from None

    def write(self, path: Path) -> None:
        """Write keys and digests; the sums are for the caller to keep."""
        content = io.BytesIO()
        np.savez(content, keys=self.keys, digests=self.digests)
        write_file(path, content.getvalue())

    def counts_of(self, keys: np.ndarray, count_NI: np.ndarray) -> np.ndarray:
        """Return the columns of `count_NI` (..., K), which are of these items, for items with other keys; else 0."""
        if np.array_equal(keys, self.keys):
            return count_NI
        row = self._table.find(np.ascontiguousarray(keys))
        return np.where(row >= 0, count_NI[..., np.maximum(row, 0)], 0)

    @cached_property
    def _table(self) -> KeyTable:
        table = KeyTable(self.keys, np.zeros(KeyTable.num_slots(len(self.keys)), np.int32))
        table.insert(0, len(self.keys))
        return table

    def compare(self, catalogue: Catalogue) -> Difference:
        """Return how a catalogue differs from these items."""
        if np.array_equal(self.keys, catalogue.keys[: len(self.keys)]):
            row = np.arange(len(self.keys))
        else:
            row = catalogue.rows_of_keys(self.keys)
        is_there = row >= 0
        here = row[is_there]
        is_changed = catalogue.digests[here] != self.digests[is_there]
        is_known_I = np.zeros(len(catalogue), bool)
        is_known_I[here] = True
        return Difference(
            added=np.flatnonzero(~is_known_I),
            num_removed=int((~is_there).sum()),
            changed=here[is_changed],
            is_reordered=bool((np.diff(here) < 0).any()) or (not is_known_I[: len(here)].all()),
        )

    def check(self, catalogue: Catalogue, run_dir: Path, *, grows: bool, trains: bool) -> str | None:
        """Return a notice of items that have been added, or None; raises DataError where the run cannot use items/.

        If training continues, new items and another order are refused as well, unless it follows a folder that
        `grows`, because candidates and counts are stored by row.
        """
        found, folder = self.compare(catalogue), catalogue.split.folder
        total = f"the {len(self.keys):,} items that {run_dir} began with"
        if found.num_removed:
            raise DataError(f"{folder} lacks {found.num_removed:,} of {total}: bring them back, or {ANOTHER_RUN}")
        if len(found.changed):
            sums = catalogue.column_sums(_mask(len(catalogue), found.added))
            columns = [name for name, value in sums.items() if value != self.sums.get(name)]
            raise DataError(
                f"{folder}: {len(found.changed):,} of {total} have other values now, in "
                f"{'columns' if len(columns) > 1 else 'column'} {', '.join(map(repr, columns))}, such as item_id "
                f"{_id_of(catalogue, found.changed)}: bring the old values back, or {ANOTHER_RUN}"
            )
        if trains and found.is_reordered:
            raise DataError(
                f"{folder} has {total} in another order, and the counts of a run are by row: restore that order, "
                f"or {ANOTHER_RUN}"
            )
        if not len(found.added) or grows:
            return None
        added = (
            f"{folder} has {len(found.added):,} items beyond {total}, such as item_id {_id_of(catalogue, found.added)}"
        )
        if trains:
            raise DataError(
                f"{added}: the candidates of a training are those that it started with. Remove the new items, or "
                f"{ANOTHER_RUN} A catalogue that grows during the training needs data.follow."
            )
        return f"{added}: their vectors come from their features alone."


@dataclass(frozen=True)
class KnownUsers:
    """Digests of users/, which detect any change of a value that features read."""

    rows: int
    total: int  # sum over users of the digests, mixed with the keys
    sums: Mapping[str, int]  # the same by column

    @classmethod
    def of(cls, users: Catalogue) -> KnownUsers:
        return cls(len(users), users.total, users.column_sums(np.ones(len(users), bool)))

    def check(self, users: Catalogue, run_dir: Path) -> None:
        """Raise DataError where the users are not those that the run began with, in any order."""
        if (len(users), users.total) == (self.rows, self.total):
            return
        folder = users.split.folder
        if len(users) != self.rows:
            found = f"has {len(users):,} users, but had {self.rows:,} when {run_dir} began"
        else:
            sums = users.column_sums(np.ones(len(users), bool))
            columns = [name for name, value in sums.items() if value != self.sums.get(name)]
            found = f"has other users or values than when {run_dir} began, in {', '.join(map(repr, columns))}"
        raise DataError(f"{folder} {found}: bring the old users back, or {ANOTHER_RUN}")


@dataclass(frozen=True)
class Difference:
    """Differences between a catalogue and the items that a run started with; rows are the catalogue's."""

    added: np.ndarray  # rows of items that the run does not know
    num_removed: int
    changed: np.ndarray  # rows of items with other values
    is_reordered: bool  # the known items are in another order, or after new ones


def _mask(size: int, without: np.ndarray) -> np.ndarray:
    mask = np.ones(size, bool)
    mask[without] = False
    return mask


def _id_of(catalogue: Catalogue, rows: np.ndarray) -> Any:
    return repr(python_value(catalogue.ids, int(rows[0])))
