"""The candidates of a step, and the pairs between its rows and them: positives, known items and impressions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from trec_twotower.config.losses import LossConfig
from trec_twotower.data.dataset import USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.batch import Candidates
from trec_twotower.data.loading.examples import Examples
from trec_twotower.data.loading.pairs import Pairs, Targets
from trec_twotower.data.negatives.mined import KeyedLists
from trec_twotower.data.negatives.samplers import StepItems
from trec_twotower.data.negatives.step_negatives import Negatives
from trec_twotower.ops.hashing import fingerprints, mix_array
from trec_twotower.ops.kernels import find_columns, mark_distinct
from trec_twotower.ops.key_table import pairs_by_fingerprint
from trec_twotower.ops.ragged import Ragged, distinct

WORDS_PER_ITEM = 32  # 64-bit values scanned per item above which sorting is faster


class CandidateSets:
    """Builds the candidates of any step of a run, in any thread."""

    def __init__(
        self, sources: FeatureDataset, loss: LossConfig, negatives: Negatives, num_ranks: int, *, masks_history: bool
    ) -> None:
        self.loss = loss
        self.negatives = negatives
        self.num_ranks = num_ranks
        self.num_items = len(sources.catalogue)
        self.keeps_list = loss.negatives.cross_batch_memory > 0
        self.keeps_key = self.keeps_list or loss.streams_log_q
        self.catalogue_keys = sources.catalogue.keys
        self.fingerprint_I = fingerprints(self.catalogue_keys) if masks_history else None
        self.known: KeyedLists | None = None
        if loss.known is not None:
            self.known = KeyedLists.read(loss.known, USER_ID, "item_ids", sources, "loss.known", skips_unknown=True)
        self._scratch = threading.local()

    def of(self, items: StepItems, mine: Examples, my_places: Callable[[], np.ndarray]) -> tuple[Candidates, Targets]:
        """Return the candidates of a step, the same on all ranks, and the pairs of this rank's rows with them.

        `my_places` returns the places of this rank's rows among the rows of all ranks; it is called only if needed.
        """
        lists = [source.of(items) for source in self.negatives.lists]
        item_row, is_negative, column_I = self._set(items, lists)
        try:
            edges = [len(item_row) * rank // self.num_ranks for rank in range(self.num_ranks + 1)]
            exact = not self.loss.streams_log_q
            candidates = Candidates(
                item_row,
                self.negatives.log_I[item_row] if exact else None,
                is_negative,
                tuple(stop - start for start, stop in pairwise(edges)),
                self._key(item_row) if self.keeps_key else None,
            )
            own = [each.take(my_places()) for each in lists]
            return candidates, self._targets(mine, own, item_row, column_I)
        finally:
            column_I[item_row] = -1

    def _set(self, items: StepItems, lists: Sequence[Ragged]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the candidates, whether each is a negative of all rows, and the column of each catalogue row."""
        positives = items.positives.values
        shared = [positives] if self.loss.negatives.in_batch else []
        shared += [sampler.draw(items.step, positives) for sampler in self.negatives.samplers]
        others = [] if self.loss.negatives.in_batch else [positives]
        for source, source_lists in zip(self.negatives.lists, lists, strict=True):
            is_refused = None if source_lists.weights is None else source_lists.weights <= 0
            if not source.shared:
                others.append(source_lists.values)
            elif is_refused is None:
                shared.append(source_lists.values)
            else:
                shared.append(source_lists.values[is_refused])
                others.append(source_lists.values[~is_refused])
        item_row, column_I = self._distinct(_joined([*shared, *others]))
        if not others:
            return item_row, np.ones(len(item_row), bool), column_I
        is_negative = np.zeros(len(item_row), bool)
        for part in shared:
            is_negative[column_I[part]] = True
        return item_row, is_negative, column_I

    def _targets(self, mine: Examples, own: Sequence[Ragged], item_row: np.ndarray, column_I: np.ndarray) -> Targets:
        """Return the pairs of this rank's rows; `own` holds the items of the rows' own lists, by source."""
        positives = mine.positives
        row, column = positives.rows, column_I[positives.values]
        weight = np.ones(len(row), np.float32)
        if not positives.is_single:
            lengths = np.maximum(positives.lengths, 1).astype(np.float32)
            weight = np.repeat(lengths**-self.loss.positive_power, positives.lengths)
        if mine.weight is not None:
            weight = weight * mine.weight[row]
        known = [(row, column), *self._known(mine, item_row, column_I)]
        return Targets(
            positive=Pairs.from_numpy(row, column, weight),
            known=Pairs.from_numpy(*(_joined(parts) for parts in zip(*known, strict=True))),
            given=self._list_pairs(mine, own, column_I) if own else None,
            masked_keys=self._masked_keys(mine, own) if self.keeps_list else None,
        )

    def _known(
        self, mine: Examples, item_row: np.ndarray, column_I: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs of rows and candidates that are not negatives of the rows, in addition to the positives."""
        if mine.known is not None:
            column = column_I[mine.known.values]
            is_candidate = column >= 0
            yield mine.known.rows[is_candidate], column[is_candidate]
        if mine.history is not None:
            assert self.fingerprint_I is not None
            yield pairs_by_fingerprint(mine.history, self.fingerprint_I[item_row])
        if self.known is not None:
            lists, list_of_row = self.known.lists, self._list_of_row(mine)
            longest = lists.lengths[list_of_row[list_of_row >= 0]].sum()
            # The kernel may write one place beyond the pairs.
            row, column = (np.empty(longest + 1, np.int64) for _ in range(2))
            count = find_columns(lists.offsets, lists.values, list_of_row, column_I, row, column)
            yield row[:count], column[:count]

    def _list_pairs(self, mine: Examples, own: Sequence[Ragged], column_I: np.ndarray) -> Pairs:
        """Return the pairs of the rows with the items of their own lists."""
        label = [np.zeros(len(each.values), np.float32) if each.weights is None else each.weights for each in own]
        weight = [np.ones(len(each.values), np.float32) for each in own]
        if mine.given_weight is not None:  # the impressions, which are the first source
            weight[0] = mine.given_weight.values
        column = [column_I[each.values] for each in own]
        return Pairs.from_numpy(*map(np.concatenate, ([each.rows for each in own], column, weight, label)))

    def _masked_keys(self, mine: Examples, own: Sequence[Ragged]) -> Pairs:
        """Return rows, and the keys of all items that are not negatives of them, candidates or not."""
        lists = [each for each in (mine.positives, mine.known, *own) if each is not None]
        pairs = [(each.rows, self._key(each.values)) for each in lists]
        if mine.history is not None:
            pairs.append((mine.history.rows, ~mine.history.values.astype(np.int64)))  # a fingerprint: see ItemQueue
        if self.known is not None:
            list_of_row = self._list_of_row(mine)
            has_list = np.flatnonzero(list_of_row >= 0)
            lists_of_rows = self.known.lists.take(list_of_row[has_list])
            pairs.append((has_list[lists_of_rows.rows], self._key(lists_of_rows.values)))
        row, key = zip(*pairs, strict=True)
        return Pairs.from_numpy(np.concatenate(row), np.concatenate(key))

    def _list_of_row(self, mine: Examples) -> np.ndarray:
        """Return the number of each row's list in `known`, -1 if it has none."""
        assert self.known is not None and mine.user_key is not None
        return self.known.rows_of(mine.user_key)

    def _key(self, item_row: np.ndarray) -> np.ndarray:
        """Return 63-bit keys of items, which stay the same in all steps and when the catalogue grows.

        The low 32 bits are the item's fingerprint.
        """
        return (mix_array(self.catalogue_keys[item_row]) & np.uint64((1 << 63) - 1)).view(np.int64)

    def _distinct(self, item_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct catalogue rows, ascending, and the column of each catalogue row (-1: none).

        The second array belongs to this thread; the caller must reset it. A bitmap finds the distinct rows, or sorting
        if the catalogue is large for the number of rows.
        """
        if not hasattr(self._scratch, "column_I"):
            self._scratch.column_I = np.full(self.num_items, -1, np.int64)
            self._scratch.bits = np.zeros(-(-self.num_items // 64), np.uint64)
        column_I: np.ndarray = self._scratch.column_I
        if len(self._scratch.bits) > WORDS_PER_ITEM * len(item_rows):
            item_row = distinct(item_rows.astype(np.int32)).astype(np.int64)  # int32 sorts twice as fast
            column_I[item_row] = np.arange(len(item_row))
            return item_row, column_I
        out = np.empty(min(len(item_rows), self.num_items), np.int64)
        count = mark_distinct(item_rows, self._scratch.bits, out, column_I)
        return out[:count], column_I


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
