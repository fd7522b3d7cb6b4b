"""Recommendations for one user: state, vector, neighbours, ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.catalogue import find_id
from trec_twotower.data.dataset import HISTORY, ITEM_ID, POSITIVES, USER_ID, Split
from trec_twotower.data.features import Sources
from trec_twotower.data.lists import Lists, side_by_side
from trec_twotower.data.transforms import key_lists, one_chunk
from trec_twotower.distributed import Ranks
from trec_twotower.encode import encode
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.export import LoadedModel, load_model
from trec_twotower.index import Allowed, ItemIndex, mask_of
from trec_twotower.run import Run


@dataclass(frozen=True)
class Recommendation:
    """One item for one user."""

    item_id: Any
    score: float
    about: dict[str, Any]  # what the catalogue says of it


@dataclass(frozen=True)
class Recommendations:
    """What a user gets, and what it rests on."""

    user_id: Any
    items: list[Recommendation]
    history: list[dict[str, Any]]  # the newest items the user took, newest first


class Retriever:
    """A run's towers and its index, ready to answer; `with start_ranks() as ranks: Retriever.open(run, ranks)`."""

    def __init__(self, loaded: LoadedModel, index: ItemIndex, ranks: Ranks) -> None:
        self.loaded = loaded
        self.index = index
        self.ranks = ranks

    @classmethod
    def open(cls, run_dir: Path | str, ranks: Ranks, checkpoint: str = "best") -> Retriever:
        """Raises ConfigError when the index was built from the weights of another checkpoint."""
        run = Run.open(Path(run_dir))
        loaded = load_model(run, ranks, checkpoint)
        return cls(loaded, ItemIndex.load(run.folder / "index", model_version=loaded.version), ranks)

    def allow(
        self,
        *,
        where: Mapping[str, Sequence[Any]] | None = None,
        only: Sequence[Any] | None = None,
        without: Sequence[Any] = (),
    ) -> Allowed:
        """The items that `recommend` may choose from, to be made once and used for many users.

        `where` names columns of the catalogue, each with values of which an item has one (its list, where the column
        has lists). `only` and `without` are item ids; those that the catalogue lacks say nothing. Raises ConfigError
        for an unknown column or a value of another type, DataError when no item is left.
        """
        catalogue = self.loaded.sources.catalogue
        mask_I = np.ones(len(catalogue), bool)
        for column, values in (where or {}).items():
            known = catalogue.split.columns
            if column not in known:
                raise ConfigError(
                    f"{catalogue.split.folder} has no column {column!r} to filter by{nearest(column, known)}."
                )
            mask_I &= mask_of(one_chunk(catalogue.split.table([column])[column]), values, column)
        if only is not None:
            mask_I &= mask_of(catalogue.ids, only, ITEM_ID)
        if len(without):
            mask_I &= ~mask_of(catalogue.ids, without, ITEM_ID)
        return self.index.allow(mask_I)

    def recommend(
        self, user_ids: Sequence[Any], k: int = 10, *, allowed: Allowed | None = None, history_shown: int = 5
    ) -> list[Recommendations]:
        """The best `k` items each user has not taken, of those `allowed`; fewer only where there are fewer.

        Raises DataError for a user that no part of the dataset has.
        """
        sources = self.loaded.sources
        if not 1 <= k <= len(self.index):
            raise ConfigError(
                f"k is {k:,}, but the catalogue has {len(self.index):,} items: ask for 1 to {len(self.index):,}."
            )
        answers = []
        for user_id in user_ids:
            table, split = find_user(sources, user_id)
            given, seen = _state(sources, table, split)
            features = sources.user_features(table, str(split.folder), given)
            user_BD = encode(self.loaded.model, "user", features, self.ranks).cpu().numpy()
            score_BK, item_row_BK = self.index.search(user_BD, k, seen=seen, allowed=allowed)
            found = item_row_BK[0][item_row_BK[0] >= 0]
            about = sources.catalogue.words(found)
            ids = sources.catalogue.ids.take(pa.array(found)).to_pylist()
            items = [
                Recommendation(*entry) for entry in zip(ids, score_BK[0][: len(found)].tolist(), about, strict=True)
            ]
            newest = seen.values[::-1][:history_shown]
            answers.append(Recommendations(table[USER_ID][0].as_py(), items, sources.catalogue.words(newest)))
        return answers


def find_user(sources: Sources, user_id: Any) -> tuple[pa.Table, Split]:
    """A user's newest row, and the part of the dataset it is from: test/, else valid/, else the last of train/."""
    for name in ("test", "valid", "train"):
        if not sources.dataset.has(name):
            continue
        split = sources.dataset.split(name)
        if name != "train":
            for column in sources.user_columns():
                split.require(column, "the user tower reads")
        found = _last_row(split, user_id)
        if found is not None:
            return found, split
    raise DataError(
        f"User {user_id!r} is in no part of {sources.dataset.folder}: give one of its user_ids, such as those of test/."
    )


def _last_row(split: Split, user_id: Any) -> pa.Table | None:
    for group in reversed(split.row_groups):
        ids = one_chunk(split.read(group, [USER_ID])[USER_ID])
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        first = find_id(ids, str(user_id))
        if first is not None:
            rows = np.flatnonzero(pc.equal(ids, ids[first]).fill_null(False).to_numpy(zero_copy_only=False))
            return split.read(group, list(split.columns)).slice(rows[-1], 1).combine_chunks()
    return None


def _state(sources: Sources, table: pa.Table, split: Split) -> tuple[dict[str, Lists] | None, Lists]:
    """What stands for the drawn history of a user's row, and the items already taken, newest last.

    What a row of train/ asks for has been taken, too; what one of valid/ or test/ asks for is yet to be found.
    """
    where = str(split.folder)
    seen = Lists.empty(1)
    given = None
    if HISTORY in table.column_names:
        seen = sources.item_row_lists(one_chunk(table[HISTORY]), where, known_only=True)
    if split.name != "train":
        return given, seen
    if sources.rows == "user":
        positives = one_chunk(table[POSITIVES])
        taken = sources.item_row_lists(positives, where)
        given = {HISTORY: key_lists(positives, where)}
    else:
        taken = Lists.singles(sources.item_rows(one_chunk(table[ITEM_ID]), where))
    return given, side_by_side(seen, taken)


def in_words(about: dict[str, Any]) -> str:
    """An item's row as a line to read: its title first, then the rest but for the id."""
    rest = [
        f"{name} {_word(value)}"
        for name, value in about.items()
        if name not in ("item_id", "title") and value is not None and not (isinstance(value, list) and not value)
    ]
    title = about.get("title") or f"item {about['item_id']}"
    return f"{title}" + (f" ({', '.join(rest)})" if rest else "")


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value[:6])) + (" ..." if len(value) > 6 else "")
    return f"{value:.2f}" if isinstance(value, float | np.floating) else str(value)
