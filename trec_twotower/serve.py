"""Recommendations for one user: state, vector, neighbours, ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from trec_twotower.data.catalogue import find_id
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, SERVING, USER_ID, Split
from trec_twotower.data.features import Sources
from trec_twotower.data.lists import Lists, side_by_side
from trec_twotower.data.transforms import Columns, key_lists, one_chunk
from trec_twotower.data.words import python_value, python_values
from trec_twotower.distributed import Ranks
from trec_twotower.encode import encode
from trec_twotower.encoder import load_whole
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.export import LoadedModel, load_model
from trec_twotower.index import Allowed, ItemIndex, mask_of
from trec_twotower.rerank import Rules, apply_rules
from trec_twotower.run import Run
from trec_twotower.schema import HISTORY


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


class UnknownUser(DataError):
    """A user of whom the dataset says nothing."""


class Retriever:
    """A run's towers and its index, ready to answer; `with start_ranks() as ranks: Retriever.open(run, ranks)`."""

    def __init__(self, loaded: LoadedModel, index: ItemIndex, ranks: Ranks) -> None:
        self.loaded = loaded
        self.index = index
        self.ranks = ranks

    @classmethod
    def open(cls, run_dir: Path | str, ranks: Ranks, checkpoint: str = "best", *, mapped: bool = False) -> Retriever:
        """Raises ConfigError when the index was built from the weights of another checkpoint.

        `mapped`: the index is shared with other processes of the host, see `ItemIndex.load`.
        """
        run = Run.open(Path(run_dir))
        loaded = load_model(run, ranks, checkpoint)
        return cls(loaded, ItemIndex.load(run.folder / "index", model_version=loaded.version, mapped=mapped), ranks)

    @classmethod
    def alone(cls, run_dir: Path | str, checkpoint: str = "best", *, mapped: bool = False) -> Retriever:
        """The same in a process that is in no group, such as a server: the tables lie whole on its device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ranks, run = Ranks(0, 1, device), Run.open(Path(run_dir))
        loaded = load_whole(run, run.sources(ranks), device, checkpoint)
        return cls(loaded, ItemIndex.load(run.folder / "index", model_version=loaded.version, mapped=mapped), ranks)

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
        self,
        user_ids: Sequence[Any],
        k: int = 10,
        *,
        allowed: Allowed | None = None,
        rules: Rules | None = None,
        history_shown: int = 5,
    ) -> list[Recommendations]:
        """The best `k` items each user has not taken, of those `allowed`; fewer only where there are fewer.

        With `rules` the best are chosen by them. Raises UnknownUser for one that no part of the dataset has.
        """
        sources = self.loaded.sources
        answers = []
        for user_id in user_ids:
            table, split = find_user(sources, user_id)
            given, seen = _state(sources, table, split)
            features = sources.user_features(table, str(split.folder), given)
            answers.append(self._answer(table, features, seen, k, allowed, rules, history_shown))
        return answers

    def recommend_now(
        self,
        states: Sequence[Mapping[str, Any]],
        k: int = 10,
        *,
        allowed: Allowed | None = None,
        rules: Rules | None = None,
        history_shown: int = 5,
    ) -> list[Recommendations]:
        """The best `k` items for users as they are at this moment: each state is a row as train/ has it, as a dict.

        A session's newest events change the answer so without training. Columns of users/ may be given, too: they
        count before what stands there, which a state without them, of a user who is there, falls back to. All others
        that are left out are null. Raises ConfigError for a column that no feature of the user reads, DataError for
        values that training would refuse.
        """
        sources = self.loaded.sources
        answers = []
        for number, state in enumerate(states):
            where = f"state {number:,}"
            table = state_table(sources, state, where)
            seen = Lists.empty(1)
            given = None
            if HISTORY in table.column_names:
                history = one_chunk(table[HISTORY])
                seen = sources.item_row_lists(history, where, known_only=True)
                given = {HISTORY: key_lists(history, where)} if sources.rows == "user" else None
            features = sources.state_features(table, where, given)
            answers.append(self._answer(table, features, seen, k, allowed, rules, history_shown))
        return answers

    def _answer(
        self,
        table: pa.Table,
        features: Columns,
        seen: Lists,
        k: int,
        allowed: Allowed | None,
        rules: Rules | None,
        history_shown: int,
    ) -> Recommendations:
        """For the user of one row."""
        sources = self.loaded.sources
        if not 1 <= k <= len(self.index):
            raise ConfigError(
                f"k is {k:,}, but the catalogue has {len(self.index):,} items: ask for 1 to {len(self.index):,}."
            )
        user_BD = encode(self.loaded.model, "user", features, self.ranks).cpu().numpy()
        excluded = seen if self.loaded.run.config.evaluate.exclude_seen else Lists.empty(1)
        score_BK, item_row_BK = self._ranked(user_BD, k, excluded, allowed, rules)
        found = item_row_BK[0][item_row_BK[0] >= 0]
        about = sources.catalogue.words(found)
        ids = python_values(sources.catalogue.ids.take(pa.array(found)))
        items = [Recommendation(*entry) for entry in zip(ids, score_BK[0][: len(found)].tolist(), about, strict=True)]
        newest = seen.values[::-1][:history_shown]
        return Recommendations(python_value(table[USER_ID], 0), items, sources.catalogue.words(newest))

    def _ranked(
        self, user_BD: np.ndarray, k: int, seen: Lists, allowed: Allowed | None, rules: Rules | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and item rows: those of the index, or what rules choose from as many more as they need.

        A boost lifts an item only from among those that were found: 4 k + 50 of them, or more where rules run short.
        """
        if rules is None:
            return self.index.search(user_BD, k, seen=seen, allowed=allowed)
        fetched = 4 * k + 50
        while True:
            fetched = min(fetched, len(self.index))
            found_BK = self.index.search(user_BD, fetched, seen=seen, allowed=allowed)
            score_BK, item_row_BK = apply_rules(*found_BK, k, rules)
            if fetched == len(self.index) or (item_row_BK >= 0).all() or (found_BK[1] < 0).any():
                return score_BK, item_row_BK
            fetched *= 4


def state_table(sources: Sources, state: Mapping[str, Any], where: str) -> pa.Table:
    """One row with the columns that the user's features read, of the types that train/ has.

    Those of users/ stand in it where the state has them.
    """
    train = sources.dataset.train.columns
    kinds = {name: train[name] for name in sources.user_columns() if name in train}
    if sources.rows == "user":
        kinds[HISTORY] = train[POSITIVES]
    elif HISTORY in train:
        kinds[HISTORY] = train[HISTORY]
    known = list(kinds)
    if sources.users is not None:
        of_users = sources.users.split.columns
        kinds |= {name: of_users[name] for name in sources.static_columns() if name in state}
        known = [*kinds, *sources.static_columns()]
    for name in state:
        if name not in kinds:
            raise ConfigError(f"{where} has a column {name!r}, which no user feature reads{nearest(name, known)}.")
    try:
        return pa.table({name: pa.array([state.get(name)], kind) for name, kind in kinds.items()})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise DataError(f"{where} does not have the types of {sources.dataset.folder}: {error}") from None


def find_user(sources: Sources, user_id: Any) -> tuple[pa.Table, Split]:
    """Return a user's newest row and its part of the dataset: serving/, test/, valid/ or the last of train/."""
    for name in (SERVING, "test", "valid", "train"):
        if not sources.dataset.has(name):
            continue
        split = sources.dataset.split(name)
        if name != "train":
            for column in sources.user_columns():
                split.require(column, "the user tower reads")
        found = _last_row(split, user_id)
        if found is not None:
            return found, split
    raise UnknownUser(
        f"User {user_id!r} is in no part of {sources.dataset.folder}: give one of its user_ids, such as those of test/."
    )


def _last_row(split: Split, user_id: Any) -> pa.Table | None:
    for group in reversed(split.row_groups):
        ids = one_chunk(split.read(group, [USER_ID])[USER_ID])
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        try:
            first = find_id(ids, str(user_id))
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no column
            return None
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
        if name not in ("item_id", "title") and _is_told(value)
    ]
    title = about.get("title") or f"item {about['item_id']}"
    return f"{title}" + (f" ({', '.join(rest)})" if rest else "")


def _is_told(value: Any) -> bool:
    """Whether people read it: no vectors, no structs, nothing empty."""
    if isinstance(value, list):
        return any(each is not None for each in value) and not isinstance(value[0], float | dict | list)
    return value is not None and not isinstance(value, dict)


def _word(value: Any) -> str:
    if isinstance(value, list):
        value = [each for each in value if each is not None]
        return " ".join(map(str, value[:6])) + (" ..." if len(value) > 6 else "")
    return f"{value:.2f}" if isinstance(value, float | np.floating) else str(value)
