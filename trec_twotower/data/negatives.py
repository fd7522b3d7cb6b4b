"""Which items stand as candidates beside the positives, and how likely each is to be one."""

from __future__ import annotations

import numpy as np

from trec_twotower.config import NegativesConfig
from trec_twotower.data.hashing import uniform

_STREAM = 0x6E6567  # keeps these draws apart from others of the same seed


def sampled_items(config: NegativesConfig, num_items: int, seed: int, step: int) -> np.ndarray:
    """The catalogue rows drawn evenly for a step: the same on all ranks, each of which takes its share."""
    if config.sampled == "all" or config.sampled >= num_items:
        return np.arange(num_items)
    draw = uniform(_STREAM, seed, step, np.arange(config.sampled))
    return (draw * num_items).astype(np.int64)


class InclusionProbability:
    """How likely item i is among a step's candidates: 1 - exp(-(draws p_i + sampled / I)).

    The candidates are a set: a step draws `draws` positives, item i being one with probability p_i, and `sampled`
    items evenly (Poisson approximation). Taking its log from the logits makes the softmax over the set an estimate of
    the softmax over the catalogue (Yi et al. 2019, with inclusion probabilities in place of frequencies).
    """

    def __init__(self, config: NegativesConfig, count_I: np.ndarray, draws: float) -> None:
        num_items = len(count_I)
        if config.sampled == "all" or config.sampled >= num_items:
            self.log_I = np.zeros(num_items, np.float32)
            return
        expected = np.full(num_items, config.sampled / num_items)
        if config.in_batch:
            expected += draws * count_I / max(count_I.sum(), 1)
        # An item that is a positive though its chance is nil (a count of 0) still needs a finite correction.
        floor = draws / max(count_I.sum(), 1) if config.in_batch else 0.0
        self.log_I = np.log(-np.expm1(-np.maximum(expected, floor))).astype(np.float32)
