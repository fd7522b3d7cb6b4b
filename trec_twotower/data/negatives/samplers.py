"""Negative samplers, and the probability that each item is among the negatives of a step.

All rows of a step share one set of candidates. Samplers add negatives of all rows. Lists add negatives of their own
row, and of the other rows if they are shared. Each source returns -log(1 - p) for the probability p that a step samples
an item. Sources are independent, so these values add up; log q follows from the sum. A new sampler is a class here, an
entry in SAMPLERS, a field of NegativesConfig, and a test.
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
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.feature_dataset import Counter, FeatureDataset
from trec_twotower.data.features.transform import one_chunk
from trec_twotower.data.loading.examples import RowItems
from trec_twotower.data.negatives.mined import KeyedLists, check_given, given_columns, read_given
from trec_twotower.ops.hashing import id_keys, mix, uniform
from trec_twotower.ops.kernels import draw_from_lists
from trec_twotower.ops.ragged import Ragged, distinct, offsets_of

# Streams of random numbers that differ from others of the same seed.
_SAMPLED, _SAME_POSITIVE, _SAME_ITEM, _MINED, _REFRESHED = 0x6E6567, 0x73616D, 0x73616E, 0x6D696E, 0x726566
_POPULAR = 0x706F70


@dataclass(frozen=True)
class StepItems:
    """The items of a step's rows on all ranks, in an order that does not depend on the number of ranks."""

    step: int
    rows: RowItems

    @property
    def positive_items(self) -> np.ndarray:
        return self.rows.positives.values

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
    """Facts about items and steps from which the sources of negatives are built."""

    num_items: int
    interactions_I: np.ndarray  # number of interactions of each item
    batch_size: int
    seed: int
    catalogue_values: Callable[[str], np.ndarray]  # the bucket of every item in a feature with one id per item


# ---------------------------------------------------------------- negatives of all rows


class Sampler(ABC):
    """Samples negatives of all rows of a step, except of those that know the item."""

    expected_I: np.ndarray  # float64: -log(1 - p), p: probability that a step samples an item

    @abstractmethod
    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        """Return catalogue rows, equal on all ranks. `positives` are those of the step."""


class FullCatalogue(Sampler):
    """The full catalogue in every step."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.expected_I = np.full(num_items, np.inf)

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        return np.arange(self.num_items)


class UniformSampler(Sampler):
    """`count` samples from the catalogue, uniform."""

    def __init__(self, count: int, num_items: int, seed: int) -> None:
        self.count, self.num_items, self.seed = count, num_items, seed
        self.expected_I = np.full(num_items, -count * _log_of_missing(1 / num_items))

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        draw = uniform(_SAMPLED, self.seed, step, np.arange(self.count))
        return (draw * self.num_items).astype(np.int64)


class PopularitySampler(Sampler):
    """`count` samples with probability proportional to n ** power, n: interactions of an item, at least 1."""

    def __init__(self, count: int, power: float, interactions_I: np.ndarray, seed: int, kind: int = _SAMPLED) -> None:
        """`kind` selects a stream of random numbers that differs from others of the same seed."""
        self.count, self.seed, self.kind = count, seed, kind
        weight_I = np.maximum(interactions_I, 1).astype(np.float64) ** power
        self.cumulative_I = np.cumsum(weight_I / weight_I.sum())
        self.expected_I = -count * _log_of_missing(weight_I / weight_I.sum())

    def draw(self, step: int, positives: np.ndarray) -> np.ndarray:
        draw = uniform(self.kind, self.seed, step, np.arange(self.count)) * self.cumulative_I[-1]
        return np.searchsorted(self.cumulative_I, draw, side="right")


class SameCategorySampler(Sampler):
    """`count` samples from the items in the categories of the step's positives.

    A category is a bucket of the feature; categories that share a bucket are one category.
    """

    def __init__(self, count: int, category_I: np.ndarray, interactions_I: np.ndarray, seed: int) -> None:
        self.count, self.seed = count, seed
        _, self.category_I, size_K = np.unique(category_I, return_inverse=True, return_counts=True)
        self.offset_K = offsets_of(size_K)
        self.item_I = np.argsort(self.category_I, kind="stable")
        share_K = np.bincount(self.category_I, interactions_I) / max(interactions_I.sum(), 1)
        self.expected_I = -count * _log_of_missing((share_K / size_K)[self.category_I])

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
    """Return `count`, at most the number of items; the first rank warns if it is reduced."""
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


# ---------------------------------------------------------------- negatives of single rows


class RowLists(ABC):
    """Adds negatives of single rows; if they are shared, they are negatives of the other rows as well."""

    shared: bool
    expected_I: np.ndarray  # as in Sampler

    @abstractmethod
    def of(self, items: StepItems) -> Ragged:
        """Return the items of every row of a step, with their labels as weights. Without weights, all labels are 0."""


class ImpressionNegatives(RowLists):
    """Items in a column of the training rows; see ImpressionsConfig."""

    def __init__(self, config: ImpressionsConfig, share_I: np.ndarray, facts: Facts) -> None:
        """`share_I` is the share of training rows that have the item with a label of 0 or less."""
        self.shared = config.shared
        self.expected_I = -facts.batch_size * _log_of_missing(share_I)

    def of(self, items: StepItems) -> Ragged:
        return items.given


class MinedNegatives(RowLists):
    """Samples from the lists of a file; see MinedConfig."""

    def __init__(
        self, config: MinedConfig, lists: KeyedLists, share_I: np.ndarray, sources: FeatureDataset, facts: Facts
    ):
        """`share_I` is the expected share of training rows that sample the item; used if `config.key` is user_id."""
        self.config, self.lists, self.seed = config, lists, facts.seed
        self.shared = config.shared
        self.list_of_item: np.ndarray | None = None
        if config.key == ITEM_ID:
            self.list_of_item = lists.rows_of(sources.catalogue.keys)
            share_I = drawn_share(lists.lists, self.list_of_item, share_I, config.count)
        self.expected_I = -facts.batch_size * _log_of_missing(share_I)

    def of(self, items: StepItems) -> Ragged:
        if self.list_of_item is not None:
            positives = items.positives
            list_rows = Ragged(positives.offsets, self.list_of_item[positives.values])
        else:
            list_rows = Ragged.singles(self.lists.rows_of(items.user_key))
        return drawn_from(list_rows, self.lists.lists, self.config.count, _MINED, self.seed, items.step)


class RefreshedNegatives(RowLists):
    """Samples from lists by item that are mined during training; see RefreshConfig."""

    def __init__(
        self, config: RefreshConfig, lists: Ragged, list_of_item: np.ndarray, key_share_I: np.ndarray, facts: Facts
    ) -> None:
        """`list_of_item` is the index of each item's list in `lists`, -1 for none."""
        self.config, self.lists, self.seed = config, lists, facts.seed
        self.shared = config.shared
        self.list_of_item = list_of_item
        share_I = drawn_share(lists, list_of_item, key_share_I, config.count)
        self.expected_I = -facts.batch_size * _log_of_missing(share_I)

    def of(self, items: StepItems) -> Ragged:
        positives = items.positives
        list_rows = Ragged(positives.offsets, self.list_of_item[positives.values])
        return drawn_from(list_rows, self.lists, self.config.count, _REFRESHED, self.seed, items.step)


def drawn_from(list_rows: Ragged, lists: Ragged, count: int, *seeds: int) -> Ragged:
    """Return `count` samples per row from one of its lists, chosen uniformly (indices into `lists`, -1: none)."""
    state = 0
    for seed in seeds:
        state = mix(state ^ seed)
    offsets, out = np.empty(len(list_rows) + 1, np.int64), np.empty(len(list_rows) * count, np.int64)
    total = draw_from_lists(
        list_rows.offsets, list_rows.values, lists.offsets, lists.values, count, np.uint64(state), offsets, out
    )
    return Ragged(offsets, out[:total])


def drawn_share(lists: Ragged, list_of_item: np.ndarray, key_share_I: np.ndarray, count: int) -> np.ndarray:
    """Return (I,): the probability that a row samples each item, if its list is that of item k with probability
    key_share_I[k]."""
    has_list = list_of_item >= 0
    share_L = np.bincount(list_of_item[has_list], key_share_I[has_list], minlength=len(lists))
    return share_of_lists(lists, share_L, count, len(list_of_item))


def share_of_lists(lists: Ragged, share_L: np.ndarray, count: int, num_items: int) -> np.ndarray:
    """Return (I,): the sum over lists of share times the probability that `count` uniform samples contain the item.

    An item that is in a list twice counts as two.
    """
    chance_L = -np.expm1(count * _log_of_missing(1 / np.maximum(lists.lengths, 1)))
    return np.bincount(lists.values, np.repeat(share_L * chance_L, lists.lengths), minlength=num_items)


# ---------------------------------------------------------------- counted in one pass over the training rows


class _RefusedItems:
    """Counts the rows that have each item with a label of 0 or less."""

    def __init__(self, sources: FeatureDataset, loss: LossConfig, given: ImpressionsConfig) -> None:
        self.sources, self.loss = sources, loss
        self.columns = given_columns(given)

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        items, _ = read_given(self.sources, self.loss, table, where)
        if items.weights is not None:
            items = items.where(items.weights <= 0)
        num_items = len(self.sources.catalogue)
        once = distinct(items.rows * num_items + items.values)  # items that a row has twice
        return np.bincount(once % num_items, minlength=num_items).astype(np.float64)


class _UsersItems:
    """Expected number of rows that sample each item from the user's list."""

    def __init__(self, sources: FeatureDataset, lists: KeyedLists, count: int) -> None:
        self.sources, self.lists, self.draws = sources, lists, count
        self.columns = [USER_ID]

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        list_of_row = self.lists.rows_of(id_keys(one_chunk(table[USER_ID]), where))
        rows_L = np.bincount(list_of_row[list_of_row >= 0], minlength=len(self.lists.lists)).astype(np.float64)
        return share_of_lists(self.lists.lists, rows_L, self.draws, len(self.sources.catalogue))


class _EvenOverRows:
    """Expected number of rows whose uniformly chosen positive is the item."""

    columns: Sequence[str] = ()

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def count(self, table: pa.Table, where: str, positives: Ragged) -> np.ndarray:
        share = 1 / np.repeat(positives.lengths, positives.lengths)
        return np.bincount(positives.values, share, minlength=self.num_items)


def counted(loss: LossConfig, rows: str) -> list[str]:
    """Return what has to be counted in addition to interactions."""
    mined = loss.negatives.mined
    by_item = loss.negatives.refresh is not None or (mined is not None and mined.key == ITEM_ID)
    wanted = {
        "given": loss.impressions is not None,
        "mined": mined is not None and mined.key == USER_ID,
        "key": by_item and rows == "user",
    }
    return [word for word, is_wanted in wanted.items() if is_wanted]


def count_items(sources: FeatureDataset, loss: LossConfig) -> np.ndarray:
    """Return (N, I): the interactions of each item in train, then the other counts that the negatives need."""
    counters: list[Counter] = []
    for word in counted(loss, sources.rows):
        if word == "given":
            assert loss.impressions is not None
            check_given(sources.dataset.train, loss.impressions)
            counters.append(_RefusedItems(sources, loss, loss.impressions))
        elif word == "mined":
            mined = loss.negatives.mined
            assert mined is not None
            counters.append(_UsersItems(sources, read_mined(sources, mined), mined.count))
        else:
            counters.append(_EvenOverRows(len(sources.catalogue)))
    return sources.item_counts(counters)


def read_mined(sources: FeatureDataset, mined: MinedConfig) -> KeyedLists:
    return KeyedLists.read(
        mined.file, mined.key, "negatives", sources, "loss.negatives.mined.file", skips_unknown=mined.unknown == "skip"
    )


# ----------------------------------------------------------------


def _log_of_missing(chance: Any) -> Any:
    """Return log(1 - p) for probabilities that may exceed 1 by rounding."""
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(chance, 1.0))
