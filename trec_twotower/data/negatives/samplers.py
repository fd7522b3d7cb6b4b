"""Sources of negatives, and the probability that each item is a negative in a step.

The candidates of a step are one set. Samplers add negatives of all rows. Lists add negatives of the rows that name
them, and of the other rows too if they are shared. Each source has `expected_I`: -log of the probability that a step
does not draw the item. The sources are independent, so these values add up, and log q follows from the sum. A new
sampler is a class in this module, an entry in SAMPLERS, an option of NegativesConfig, and a test.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trec_twotower.config.losses import ImpressionsConfig, LossConfig, MinedConfig, NegativesConfig, RefreshConfig
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.feature_dataset import Counter, FeatureDataset
from trec_twotower.data.loading.examples import RowItems
from trec_twotower.data.negatives.mined import KeyedLists, check_impressions, impression_columns, read_impressions
from trec_twotower.ops.hashing import id_keys, mix, uniform
from trec_twotower.ops.kernels import draw_from_lists
from trec_twotower.ops.ragged import Ragged, distinct, offsets_of

# Seeds of independent random streams.
_SAMPLED, _SAME_POSITIVE, _SAME_ITEM, _MINED, _REFRESHED = 0x6E6567, 0x73616D, 0x73616E, 0x6D696E, 0x726566
_POPULAR = 0x706F70


@dataclass(frozen=True)
class StepItems:
    """The items of a step's rows over all ranks, in an order that does not depend on the number of ranks."""

    step: int
    rows: RowItems

    @property
    def positives(self) -> Ragged:
        return self.rows.positives

    @property
    def given(self) -> Ragged:
        assert self.rows.given is not None
        return self.rows.given

    @property
    def user_key(self) -> np.ndarray:
        assert self.rows.user_key is not None
        return self.rows.user_key


@dataclass(frozen=True)
class Facts:
    """The facts about items and steps that the sources of negatives are built from."""

    num_items: int
    interactions_I: np.ndarray  # number of interactions of each item
    batch_size: int
    seed: int
    catalogue_values: Callable[[str], np.ndarray]  # feature with one id per item -> bucket of every item


# ---------------------------------------------------------------- negatives of all rows


class Sampler(ABC):
    """Draws negatives of all rows of a step, except the rows that know the item."""

    expected_I: np.ndarray  # float64: -log of the probability that a step does not draw the item

    @abstractmethod
    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        """Return catalogue rows, the same on all ranks; `positives` are those of the step."""


class FullCatalogue(Sampler):
    """Returns the whole catalogue in every step."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.expected_I = np.full(num_items, np.inf)

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        return np.arange(self.num_items)


class UniformSampler(Sampler):
    """Draws `count` items uniformly from the catalogue."""

    def __init__(self, count: int, num_items: int, seed: int) -> None:
        self.count, self.num_items, self.seed = count, num_items, seed
        self.expected_I = np.full(num_items, -count * _log_complement(1 / num_items))

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        draw = uniform(_SAMPLED, self.seed, step, np.arange(self.count))
        return (draw * self.num_items).astype(np.int64)


class PopularitySampler(Sampler):
    """Draws `count` items with probability proportional to max(interactions, 1) ** power."""

    def __init__(self, count: int, power: float, interactions_I: np.ndarray, seed: int, kind: int = _SAMPLED) -> None:
        """`kind` seeds an independent random stream."""
        self.count, self.seed, self.kind = count, seed, kind
        weight_I = np.maximum(interactions_I, 1).astype(np.float64) ** power
        self.cumulative_I = np.cumsum(weight_I / weight_I.sum())
        self.expected_I = -count * _log_complement(weight_I / weight_I.sum())

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        draw = uniform(self.kind, self.seed, step, np.arange(self.count)) * self.cumulative_I[-1]
        return np.searchsorted(self.cumulative_I, draw, side="right")


class SameCategorySampler(Sampler):
    """Draws `count` positives of the step, and an item from the category of each.

    A category is a bucket of the feature, so categories in the same bucket count as one.
    """

    def __init__(self, count: int, category_I: np.ndarray, interactions_I: np.ndarray, seed: int) -> None:
        self.count, self.seed = count, seed
        _, self.category_I, size_K = np.unique(category_I, return_inverse=True, return_counts=True)
        self.offset_K = offsets_of(size_K)
        self.item_I = np.argsort(self.category_I, kind="stable")
        share_K = np.bincount(self.category_I, interactions_I) / max(interactions_I.sum(), 1)
        self.expected_I = -count * _log_complement((share_K / size_K)[self.category_I])

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        if not len(positives):
            return positives
        number = np.arange(self.count)
        positive = positives[(uniform(_SAME_POSITIVE, self.seed, step, number) * len(positives)).astype(np.int64)]
        category = self.category_I[positive]
        low, size = self.offset_K[category], np.diff(self.offset_K)[category]
        return self.item_I[low + (uniform(_SAME_ITEM, self.seed, step, number) * size).astype(np.int64)]


def _sampled(config: NegativesConfig, facts: Facts) -> Sampler | None:
    if config.sampled == "all":
        return FullCatalogue(facts.num_items)
    if not config.sampled:
        return None
    count = _at_most_all("sampled", config.sampled, facts.num_items)
    if config.power:
        return PopularitySampler(count, config.power, facts.interactions_I, facts.seed)
    return UniformSampler(count, facts.num_items, facts.seed)


def _popular(config: NegativesConfig, facts: Facts) -> Sampler | None:
    if config.popular is None:
        return None
    count = _at_most_all("popular.count", config.popular.count, facts.num_items)
    return PopularitySampler(count, config.popular.power, facts.interactions_I, facts.seed, _POPULAR)


def _at_most_all(name: str, count: int, num_items: int) -> int:
    """Return `count`, at most the number of items; the first rank warns if it is larger."""
    if count > num_items and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"loss.negatives.{name} is {count:,}, but the catalogue has {num_items:,} items: {num_items:,} are drawn "
            "per step. Set it to that or less (or sampled to all).",
            stacklevel=2,
        )
    return min(count, num_items)


def _same(config: NegativesConfig, facts: Facts) -> Sampler | None:
    if config.same_category is None:
        return None
    return SameCategorySampler(
        config.same_category.count,
        facts.catalogue_values(config.same_category.feature),
        facts.interactions_I,
        facts.seed,
    )


SAMPLERS: dict[str, Callable[[NegativesConfig, Facts], Sampler | None]] = {
    "sampled": _sampled,
    "popular": _popular,
    "same_category": _same,
}


# ---------------------------------------------------------------- negatives of the rows that name them


class RowLists(ABC):
    """Returns negatives of single rows; shared ones are negatives of the other rows as well."""

    shared: bool
    expected_I: np.ndarray  # as in Sampler

    @abstractmethod
    def of(self, items: StepItems) -> Ragged:
        """Return the items of every row of a step, with labels as weights; without weights, all labels are 0."""


class ImpressionNegatives(RowLists):
    """Returns the items in a column of the training rows; see ImpressionsConfig."""

    def __init__(self, config: ImpressionsConfig, share_I: np.ndarray, facts: Facts) -> None:
        """`share_I` is the share of training rows whose impressions include the item with a label of 0 or less."""
        self.shared = config.shared
        self.expected_I = -facts.batch_size * _log_complement(share_I)

    def of(self, items: StepItems) -> Ragged:
        return items.given


class MinedNegatives(RowLists):
    """Draws from the lists of a file; see MinedConfig."""

    def __init__(
        self, config: MinedConfig, lists: KeyedLists, share_I: np.ndarray, sources: FeatureDataset, facts: Facts
    ):
        """`share_I` is the share of training rows that draw each item (key user_id) or have it as key (item_id)."""
        self.config, self.lists, self.seed = config, lists, facts.seed
        self.shared = config.shared
        self.list_of_item: np.ndarray | None = None
        if config.key == ITEM_ID:
            self.list_of_item = lists.rows_of(sources.catalogue.keys)
            share_I = sampled_share(lists.lists, self.list_of_item, share_I, config.count)
        self.expected_I = -facts.batch_size * _log_complement(share_I)

    def of(self, items: StepItems) -> Ragged:
        if self.list_of_item is not None:
            positives = items.positives
            list_rows = Ragged(positives.offsets, self.list_of_item[positives.values])
        else:
            list_rows = Ragged.singles(self.lists.rows_of(items.user_key))
        return sampled_from(list_rows, self.lists.lists, self.config.count, _MINED, self.seed, items.step)


class RefreshedNegatives(RowLists):
    """Draws from lists by item that are rebuilt during training; see RefreshConfig."""

    def __init__(
        self, config: RefreshConfig, lists: Ragged, list_of_item: np.ndarray, key_share_I: np.ndarray, facts: Facts
    ) -> None:
        """`list_of_item` is the number of each item's list in `lists`, -1 if it has none."""
        self.config, self.lists, self.seed = config, lists, facts.seed
        self.shared = config.shared
        self.list_of_item = list_of_item
        share_I = sampled_share(lists, list_of_item, key_share_I, config.count)
        self.expected_I = -facts.batch_size * _log_complement(share_I)

    def of(self, items: StepItems) -> Ragged:
        positives = items.positives
        list_rows = Ragged(positives.offsets, self.list_of_item[positives.values])
        return sampled_from(list_rows, self.lists, self.config.count, _REFRESHED, self.seed, items.step)


def sampled_from(list_rows: Ragged, lists: Ragged, count: int, *seeds: int) -> Ragged:
    """Return `count` draws for each row from one of its lists (rows of `lists`, -1: none), chosen uniformly."""
    state = 0
    for seed in seeds:
        state = mix(state ^ seed)
    offsets, out = np.empty(len(list_rows) + 1, np.int64), np.empty(len(list_rows) * count, np.int64)
    total = draw_from_lists(
        list_rows.offsets, list_rows.values, lists.offsets, lists.values, count, np.uint64(state), offsets, out
    )
    return Ragged(offsets, out[:total])


def sampled_share(lists: Ragged, list_of_item: np.ndarray, key_share_I: np.ndarray, count: int) -> np.ndarray:
    """Return the probability (I,) that a row draws each item; it uses the list of item k with key_share_I[k]."""
    has_list = list_of_item >= 0
    share_L = np.bincount(list_of_item[has_list], key_share_I[has_list], minlength=len(lists))
    return share_of_lists(lists, share_L, count, len(list_of_item))


def share_of_lists(lists: Ragged, share_L: np.ndarray, count: int, num_items: int) -> np.ndarray:
    """Return the probability (I,) that `count` uniform draws from a list chosen by `share_L` include each item.

    Repeated items of a list count as different items.
    """
    probability_L = -np.expm1(count * _log_complement(1 / np.maximum(lists.lengths, 1)))
    return np.bincount(lists.values, np.repeat(share_L * probability_L, lists.lengths), minlength=num_items)


# ---------------------------------------------------------------- counts from one pass over the training rows


class _RefusedItems:
    """Counts the rows whose impressions include each item with a label of 0 or less."""

    def __init__(self, sources: FeatureDataset, loss: LossConfig, given: ImpressionsConfig) -> None:
        self.sources, self.loss = sources, loss
        self.columns = impression_columns(given)

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        items, _ = read_impressions(self.sources, self.loss, table, where)
        if items.weights is not None:
            items = items.where(items.weights <= 0)
        num_items = len(self.sources.catalogue)
        row_items = distinct(items.rows * num_items + items.values)  # without repetitions in a row
        return np.bincount(row_items % num_items, minlength=num_items).astype(np.float64)


class _UsersItems:
    """Counts the rows that draw each item from the user's list, as an expected value."""

    def __init__(self, sources: FeatureDataset, lists: KeyedLists, count: int) -> None:
        self.sources, self.lists, self.draws = sources, lists, count
        self.columns = [USER_ID]

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        list_of_row = self.lists.rows_of(id_keys(one_chunk(table[USER_ID]), where))
        rows_L = np.bincount(list_of_row[list_of_row >= 0], minlength=len(self.lists.lists)).astype(np.float64)
        return share_of_lists(self.lists.lists, rows_L, self.draws, len(self.sources.catalogue))


class _EvenOverRows:
    """Counts how often a uniform choice from a row's positives is each item, as an expected value."""

    columns: Sequence[str] = ()

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        share = 1 / np.repeat(positives.lengths, positives.lengths)
        return np.bincount(positives.values, share, minlength=self.num_items)


def counted(loss: LossConfig, rows: str) -> list[str]:
    """Return the names of the counts that are needed in addition to the interactions."""
    mined = loss.negatives.mined
    by_item = loss.negatives.refresh is not None or (mined is not None and mined.key == ITEM_ID)
    needed = {
        "given": loss.impressions is not None,
        "mined": mined is not None and mined.key == USER_ID,
        "key": by_item and rows == "user",
    }
    return [name for name, is_needed in needed.items() if is_needed]


def count_items(sources: FeatureDataset, loss: LossConfig) -> np.ndarray:
    """Return the interactions of each item in train (I,), or a row for each further count that the loss needs."""
    counters: list[Counter] = []
    for name in counted(loss, sources.rows):
        if name == "given":
            assert loss.impressions is not None
            check_impressions(sources.dataset.train, loss.impressions)
            counters.append(_RefusedItems(sources, loss, loss.impressions))
        elif name == "mined":
            mined = loss.negatives.mined
            assert mined is not None
            counters.append(_UsersItems(sources, read_mined(sources, mined), mined.count))
        else:
            counters.append(_EvenOverRows(len(sources.catalogue)))
    return sources.item_counts(counters)


def read_mined(sources: FeatureDataset, mined: MinedConfig) -> KeyedLists:
    """Read the file of mined negatives."""
    return KeyedLists.read(
        mined.file, mined.key, "negatives", sources, "loss.negatives.mined.file", skips_unknown=mined.unknown == "skip"
    )


def _log_complement(probability: Any) -> Any:
    """Return log(1 - probability) for probabilities that may exceed 1 by rounding."""
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(probability, 1.0))
