"""Sampled items are even and the same for all; an item is a candidate as often as the correction says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trec_twotower.config import NegativesConfig
from trec_twotower.data.negatives import InclusionProbability, sampled_items


def test_all_items_are_drawn_when_all_or_more_are_asked_for():
    for sampled in ("all", 30, 31):
        config = NegativesConfig(sampled=sampled)
        assert sampled_items(config, 30, seed=1, step=2).tolist() == list(range(30))
        assert np.exp(InclusionProbability(config, np.arange(30), 5.0).log_I).tolist() == [1.0] * 30


def test_none_are_drawn_when_none_are_asked_for():
    assert sampled_items(NegativesConfig(), 30, seed=1, step=2).size == 0


def test_items_are_drawn_evenly_and_anew_each_step():
    config = NegativesConfig(sampled=50)
    draws = np.stack([sampled_items(config, 200, seed=0, step=step) for step in range(2_000)])
    assert draws.min() >= 0 and draws.max() < 200
    counts = np.bincount(draws.reshape(-1), minlength=200)
    expected = draws.size / 200
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 199) < 5 * math.sqrt(2 * 199)
    # Two steps share a place's draw as often as chance has it.
    same = (draws[1:] == draws[:-1]).mean()
    assert abs(same - 1 / 200) < 5 * math.sqrt(1 / 200 / draws[1:].size)


def test_the_draw_depends_on_seed_and_step_alone():
    config = NegativesConfig(sampled=20)
    draw = sampled_items(config, 1000, seed=3, step=4)
    assert np.array_equal(draw, sampled_items(config, 1000, seed=3, step=4))
    assert not np.array_equal(draw, sampled_items(config, 1000, seed=4, step=4))
    assert not np.array_equal(draw, sampled_items(config, 1000, seed=3, step=5))
    assert np.array_equal(draw[:5], sampled_items(NegativesConfig(sampled=5), 1000, seed=3, step=4))


def test_the_correction_is_its_formula():
    """By hand: 4 items taken 6, 3, 1 and 0 times of 10; 5 draws and 2 samples a step."""
    found = np.exp(InclusionProbability(NegativesConfig(sampled=2), np.array([6, 3, 1, 0]), 5.0).log_I)
    by_hand = [1 - math.exp(-(5 * 0.6 + 0.5)), 1 - math.exp(-2.0), 1 - math.exp(-1.0), 1 - math.exp(-0.5)]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_without_in_batch_negatives_only_the_sample_counts():
    config = NegativesConfig(in_batch=False, sampled=2)
    found = np.exp(InclusionProbability(config, np.array([6, 3, 1, 0]), 5.0).log_I)
    np.testing.assert_allclose(found, [1 - math.exp(-0.5)] * 4, rtol=1e-6)


def test_an_item_that_was_never_taken_counts_as_taken_once():
    """It may be a positive all the same, after which its logarithm must be finite."""
    found = np.exp(InclusionProbability(NegativesConfig(), np.array([9, 1, 0]), 5.0).log_I)
    np.testing.assert_allclose(found, [1 - math.exp(-4.5), 1 - math.exp(-0.5), 1 - math.exp(-0.5)], rtol=1e-6)
    assert np.isfinite(InclusionProbability(NegativesConfig(), np.zeros(3, np.int64), 5.0).log_I).all()


def test_rare_items_keep_their_digits():
    """1 - exp(-x) is x for small x; computed as it stands it would be 0 in float32."""
    found = InclusionProbability(NegativesConfig(), np.array([10**9 - 1, 1]), 1.0).log_I
    np.testing.assert_allclose(found[1], math.log(1e-9), rtol=1e-6)


@pytest.mark.parametrize(("in_batch", "sampled"), [(True, 0), (True, 40), (False, 40)])
def test_items_are_candidates_as_often_as_the_correction_says(rng, in_batch, sampled):
    """Many steps drawn: the share of steps with item i, within five standard errors and the formula's own error."""
    num_items, draws, steps = 100, 60, 4_000
    config = NegativesConfig(in_batch=in_batch, sampled=sampled)
    counts = rng.integers(1, 500, num_items) ** 2 // 500 + 1
    taken = np.zeros(num_items)
    for step in range(steps):
        candidates = sampled_items(config, num_items, seed=0, step=step)
        if in_batch:
            positives = rng.choice(num_items, draws, p=counts / counts.sum())
            candidates = np.union1d(candidates, positives)
        taken[np.unique(candidates)] += 1
    formula = np.exp(InclusionProbability(config, counts, draws).log_I)
    error = np.sqrt(formula * (1 - formula) / steps)
    # Poisson for binomial: exp(-np) against (1 - p)^n differs by less than p / 2 of itself (and .004 at the most).
    assert (np.abs(taken / steps - formula) < 5 * error + 0.006).all()
    assert abs((taken / steps - formula).mean()) < 0.004
