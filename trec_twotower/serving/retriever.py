"""Recommendations for users: state, vector, neighbours, ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID
from trec_twotower.data.features.columns import Columns
from trec_twotower.distributed.ranks import Ranks, check_process, quiet_libraries, usable_device
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.index import Allowed, ItemIndex, mask_of
from trec_twotower.index.aligned_index import CatalogueIndex, aligned
from trec_twotower.inference.model_loader import LoadedModel, load_model
from trec_twotower.model.encode import encode
from trec_twotower.ops.ragged import Ragged
from trec_twotower.serving.business_rules import Rules, apply_rules
from trec_twotower.serving.user_state import UnknownUser, UserState, given_state, newest_state
from trec_twotower.storage.arrow_values import python_values
from trec_twotower.training.run_dir import Run


@dataclass(frozen=True)
class Recommendation:
    """One item for one user."""

    item_id: Any
    score: float
    about: dict[str, Any]  # the item's row in the catalogue


@dataclass(frozen=True)
class Recommendations:
    """The answer for one user: items, best first, or the reason why there are none."""

    user_id: Any
    items: list[Recommendation]
    history: list[dict[str, Any]]  # the newest seen items, newest first
    error: str | None = None  # set for an unknown user

    @property
    def is_known(self) -> bool:
        return self.error is None


class Retriever:
    """The towers and the index of a run, for recommendations.

    `Retriever.alone(run)` opens a run in one process; `Retriever.open(run, ranks)` spreads the tables over ranks.
    """

    def __init__(self, loaded: LoadedModel, index: ItemIndex | CatalogueIndex, ranks: Ranks) -> None:
        self.loaded = loaded
        self.index = index
        self.ranks = ranks
        self._pid = os.getpid()

    @classmethod
    def open(
        cls, run_dir: Path | str, ranks: Ranks, checkpoint: str | int = "best", *, mapped: bool = False
    ) -> Retriever:
        """Open a run inside `with start_ranks() as ranks`; all ranks call together, here and for recommendations.

        `mapped` shares the index with other processes of the host, see `ItemIndex.load`. Raises ConfigError where the
        index was built from the weights of another checkpoint.
        """
        run = Run.open(Path(run_dir))
        _check_indexed(run)
        return cls._of(load_model(run, ranks, str(checkpoint)), ranks, mapped)

    @classmethod
    def alone(cls, run_dir: Path | str, checkpoint: str | int = "best", *, mapped: bool = False) -> Retriever:
        """Open a run in one process without a process group, such as a server: its device holds the whole tables."""
        quiet_libraries()
        device = usable_device()
        ranks, run = Ranks(0, 1, device), Run.open(Path(run_dir))
        _check_indexed(run)
        return cls._of(load_model(run, ranks, str(checkpoint), is_sharded=False), ranks, mapped)

    @classmethod
    def _of(cls, loaded: LoadedModel, ranks: Ranks, mapped: bool) -> Retriever:
        """Return the Retriever of a model and of its run's index."""
        index = ItemIndex.load(loaded.run.folder / "index", model_version=loaded.version, mapped=mapped)
        return cls(loaded, aligned(index, loaded.sources.catalogue, warns=ranks.is_first), ranks)

    def allow(
        self,
        *,
        where: Mapping[str, Sequence[Any]] | None = None,
        only: Sequence[Any] | None = None,
        without: Sequence[Any] = (),
    ) -> Allowed:
        """Return the items that `recommend` may choose from; build it once and use it for many users.

        `where` names columns of the catalogue, each with values of which an item has one (its list, where the column
        has lists). `only` and `without` are item ids; ids outside the catalogue have no effect. Raises ConfigError
        for an unknown column or a value of another type, DataError when no item is left.
        """
        check_process(self._pid, "Retriever")
        catalogue = self.loaded.sources.catalogue
        mask_I = np.ones(len(catalogue), bool)
        if not isinstance(where, Mapping | None):
            raise ConfigError(f"where is {where!r}: give a dict of columns, each with a list of values.")
        for column, values in (where or {}).items():
            known = catalogue.split.columns
            if column not in known:
                raise ConfigError(
                    f"{catalogue.split.folder} has no column {column!r} to filter by{nearest(column, known)}."
                )
            cells = one_chunk(catalogue.split.table([column])[column])
            mask_I &= mask_of(cells, _several(values, f"where[{column!r}]"), column)
        if only is not None:
            mask_I &= mask_of(catalogue.ids, _several(only, "only"), ITEM_ID)
        if len(excluded := _several(without, "without")):
            mask_I &= ~mask_of(catalogue.ids, excluded, ITEM_ID)
        return self.index.allow(mask_I)

    def recommend(
        self,
        user_ids: Iterable[Any],
        k: int = 10,
        *,
        allowed: Allowed | None = None,
        rules: Rules | None = None,
        history_shown: int = 5,
    ) -> list[Recommendations]:
        """Return for each user the best `k` items that the user has not seen, of those `allowed`.

        A user is known by the newest row of the dataset, with the row's own positives counted as seen (user_state.py);
        with evaluate.exclude_seen: false, seen items are recommended as well.
        A user without a row gets an answer with `error` and no items. There are fewer than `k` items where fewer are
        left. `rules` choose among the items found. Raises ConfigError for `user_ids` that are no list of ids.
        """
        check_process(self._pid, "Retriever")
        k = self.check_counts(k, history_shown)
        answers = []
        for user_id in _several(user_ids, "user_ids"):
            try:
                state = newest_state(self.loaded.sources, user_id)
            except UnknownUser as unknown:
                answers.append(Recommendations(user_id, [], [], str(unknown)))
            else:
                answers.append(self._answer(state, k, allowed, rules, history_shown))
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
        """Return the best `k` items for users as they are now: each state is a row of train/ as a dict.

        The newest events of a session change the answer without training. Columns of users/ may be given as well and
        take precedence over users/; without them, those of a user in users/ count. All other missing columns are null.
        Raises ConfigError for a column that no user feature reads, DataError for values that training would refuse.
        """
        check_process(self._pid, "Retriever")
        k = self.check_counts(k, history_shown)
        answers = []
        for number, state in enumerate(_several(states, "states")):
            if not isinstance(state, Mapping):
                raise ConfigError(f"state {number:,} is {type(state).__name__}: give a dict of columns and values.")
            known = given_state(self.loaded.sources, state, f"state {number:,}")
            answers.append(self._answer(known, k, allowed, rules, history_shown))
        return answers

    def check_counts(self, k: Any, history_shown: Any = 0) -> int:
        """Return `k` as an int; raises ConfigError for counts that cannot be."""
        for name, value in (("k", k), ("history_shown", history_shown)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ConfigError(f"{name} is {value!r}: give a whole number.")
        if not 1 <= k <= len(self.index):
            raise ConfigError(
                f"k is {k:,}, but the catalogue has {len(self.index):,} items: ask for 1 to {len(self.index):,}."
            )
        if history_shown < 0:
            raise ConfigError(f"history_shown is {history_shown}: give 0 or more.")
        return int(k)

    def _answer(
        self, state: UserState, k: int, allowed: Allowed | None, rules: Rules | None, history_shown: int
    ) -> Recommendations:
        sources = self.loaded.sources
        score_BK, item_row_BK = self.rank(state.features, state.seen, k, allowed=allowed, rules=rules)
        found = item_row_BK[0][item_row_BK[0] >= 0]
        about = sources.catalogue.words(found)
        ids = python_values(sources.catalogue.ids.take(pa.array(found)))
        items = [Recommendation(*entry) for entry in zip(ids, score_BK[0][: len(found)].tolist(), about, strict=True)]
        newest = state.seen.values[::-1][:history_shown]
        return Recommendations(state.user_id, items, sources.catalogue.words(newest))

    def rank(
        self, features: Columns, seen: Ragged, k: int, *, allowed: Allowed | None = None, rules: Rules | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (float32) and catalogue rows (int64), both (B, k), of the best items of users, best first.

        `features` and `seen` are those of user_state.py, one row per user. Rows end in -inf and -1 where fewer items
        are left. All ranks call together, each with any number of users.
        """
        user_BD = encode(self.loaded.model, "user", features, self.ranks).cpu().numpy()
        excluded = seen if self.loaded.run.config.evaluate.exclude_seen else Ragged.empty(len(seen))
        return self._ranked(user_BD, k, excluded, allowed, rules)

    def _ranked(
        self, user_BD: np.ndarray, k: int, seen: Ragged, allowed: Allowed | None, rules: Rules | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and item rows: those of the index, or those that rules choose from more of them.

        A boost lifts an item only from among those that were found: 2 K + 50, where K is the least `k` or double of it
        that the index was tuned for (index.k: 100), so that a shorter answer is the head of a longer one; or more where
        rules run short.
        """
        if rules is None:
            return self.index.search(user_BD, k, seen=seen, allowed=allowed)
        fetched = 2 * self.index.tuned_k(k) + 50
        while True:
            fetched = min(fetched, len(self.index))
            found_BK = self.index.search(user_BD, fetched, seen=seen, allowed=allowed)
            score_BK, item_row_BK = apply_rules(*found_BK, k, rules)
            if fetched == len(self.index) or (item_row_BK >= 0).all() or (found_BK[1] < 0).any():
                return score_BK, item_row_BK
            fetched *= 4


def _check_indexed(run: Run) -> None:
    """Raise ConfigError for a run without an index, with the stages to run."""
    if not (run.folder / "index").is_dir():
        export = "" if (run.folder / "export").is_dir() else "trec-twotower export RUN, then "
        raise ConfigError(f"There is no index in {run.folder / 'index'}: run {export}trec-twotower index RUN.")


def _several(values: Any, name: str) -> Sequence[Any]:
    """Return the elements of a list, an array or another collection; raises ConfigError for a single value."""
    is_list = isinstance(values, Iterable) and not isinstance(values, Mapping)
    if isinstance(values, str | bytes):
        raise ConfigError(f"{name} is the single value {values!r}: give a list, such as [{values!r}].")
    if not is_list or (isinstance(values, np.ndarray) and not values.ndim):
        raise ConfigError(f"{name} is {values!r}: give a list.")
    return list(values)
