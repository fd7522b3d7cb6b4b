"""All sources of negatives of a training step: the samplers and the lists of rows."""

from __future__ import annotations

import numpy as np

from trec_twotower.config.data import DataConfig
from trec_twotower.config.losses import LossConfig
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.negatives.samplers import (
    SAMPLERS,
    Facts,
    ImpressionNegatives,
    MinedNegatives,
    RefreshedNegatives,
    RowLists,
    counted,
    read_mined,
)
from trec_twotower.errors import ConfigError
from trec_twotower.ops.ragged import Ragged


class Negatives:
    """The sources of negatives of a config, and the logQ correction of every item.

    The candidates that are negatives of all rows form a set. Item i is in this set with probability

        1 - exp(-(draws p_i + sum over the other sources of expected_i))

    where a step draws `draws` positives, each of which is item i with probability p_i (Poisson approximation). Without
    in-batch negatives the first term is 0. Subtracting the log of this probability from the logits makes the softmax
    over the set an estimate of the softmax over the catalogue (Yi et al. 2019, with inclusion probabilities in place of
    frequencies).
    """

    def __init__(
        self, sources: FeatureDataset, data: DataConfig, loss: LossConfig, count_NI: np.ndarray, counted_rows: int
    ) -> None:
        """`count_NI` is the result of count_items over `counted_rows` rows."""
        self.loss = loss
        interactions_I, *others = np.atleast_2d(count_NI)
        num_items = len(sources.catalogue)
        names = counted(loss, sources.rows)
        assert len(others) == len(names), f"{len(others)} counts besides the interactions, but {names} are needed"
        share = {name: count_I / counted_rows for name, count_I in zip(names, others, strict=True)}
        self.facts = facts = Facts(
            num_items,
            interactions_I,
            data.batch_size,
            data.seed,
            lambda name: sources.catalogue.columns.sparse[name].values,
        )
        is_by_user = data.rows == "user"
        draws = interactions_I.sum() / counted_rows * (1 - data.input_share if is_by_user else 1) * data.batch_size
        # Expected positives of an item in a step, per interaction with it.
        self._positives_per_interaction = draws / max(interactions_I.sum(), 1)
        self._key_share_I = share.get("key", interactions_I / counted_rows)
        refresh = loss.negatives.refresh
        if refresh is not None and refresh.neighbor_range[0] >= num_items:
            raise ConfigError(
                f"loss.negatives.refresh.neighbor_range begins with {refresh.neighbor_range[0]:,}, but each item "
                f"has only {num_items - 1:,} neighbours in this catalogue: choose a lower range."
            )
        samplers = (build(loss.negatives, facts) for build in SAMPLERS.values())
        self.samplers = [sampler for sampler in samplers if sampler is not None]
        self._lists: list[RowLists] = []
        if loss.impressions is not None:
            self._lists.append(ImpressionNegatives(loss.impressions, share["given"], facts))
        if (mined := loss.negatives.mined) is not None:
            share_I = share.get("mined", self._key_share_I)
            self._lists.append(MinedNegatives(mined, read_mined(sources, mined), share_I, sources, facts))
        self.lists = list(self._lists)
        self.log_I = self._log()
        self._check_memory_size()

    def refresh(self, lists: Ragged, list_of_item: np.ndarray) -> None:
        """Replace the refreshed lists from which rows draw hard negatives."""
        config = self.loss.negatives.refresh
        assert config is not None
        self.lists = [*self._lists, RefreshedNegatives(config, lists, list_of_item, self._key_share_I, self.facts)]
        self.log_I = self._log()

    def _check_memory_size(self) -> None:
        """Raise ConfigError if the cross-batch memory has no room for the candidates of one step."""
        size = self.loss.negatives.cross_batch_memory
        if size and size < (mean := float(-np.expm1(-self._expected()).sum())):
            raise ConfigError(
                f"loss.negatives.cross_batch_memory is {size:,}, but a step has some {mean:,.0f} candidates to "
                f"store: set it to those of several steps (such as {round(8 * mean):,}), or remove "
                "cross_batch_memory."
            )

    def _expected(self) -> np.ndarray:
        """Return -log of the probability that an item is not a negative of all rows: (I,)."""
        interactions_I = self.facts.interactions_I
        expected_I = (
            interactions_I * self._positives_per_interaction
            if self.loss.negatives.in_batch
            else np.zeros(len(interactions_I))
        )
        sources = [sampler.expected_I for sampler in self.samplers]
        sources += [lists.expected_I for lists in self.lists if lists.shared]
        for source_I in sources:
            expected_I = expected_I + source_I
        return expected_I

    def _log(self) -> np.ndarray:
        """Return the log of the probability that an item is a negative of all rows: (I,) float32."""
        expected_I = self._expected()
        # A positive needs a finite correction even if its probability is 0, as with a count of 0.
        expected_I = np.where(expected_I > 0, expected_I, self._positives_per_interaction or 1.0)
        return np.log(-np.expm1(-expected_I)).astype(np.float32)
