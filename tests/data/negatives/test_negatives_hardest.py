"""More weight for a row's hardest negatives: the loss is that of weighted negatives, sorted and written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.kinds import WITH_HARDEST
from tests.model.losses.test_losses import CASES, KINDS, assert_equal, block_of
from trec_twotower.model.losses import LOSSES, Hardest, Pairs, Relations

SELECTING = [kind for kind in KINDS if KINDS[kind][0] in WITH_HARDEST]
SIMPLE = ("one positive a row", "corrections", "no negative is left", "no column is a negative", "no rows")


@pytest.mark.parametrize("hardest", [Hardest(1, 0.1), Hardest(3, 0.5), Hardest(3, 0.01), Hardest(8, 1.0)])
@pytest.mark.parametrize("rows_a_block", [1, 4, 100])
@pytest.mark.parametrize("kind", SELECTING)
def test_the_negatives_below_the_highest_scores_have_their_weight(kind, rows_a_block, hardest, monkeypatch):
    """The highest are found by sorting scores without log q, row by row; with everything else in the case."""
    for name in (*SIMPLE, "drawn, narrow", "given, drawn, narrow", "given, drawn, wide", "given: rows without"):
        case = CASES[name]
        block_of(monkeypatch, rows_a_block * max(case.num_columns, 1))
        try:
            assert_equal(kind, case, hardest=hardest)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("kind", ["softmax", "bsl"])
def test_kernels_that_add_log_q_later_find_the_same_negatives(kind):
    """float32, which has kernels of our own, against float64."""
    for name in ("drawn, narrow", "drawn, wide", "given, drawn, wide"):
        assert_equal(kind, CASES[name], 0.5, 2e-4, dtype=torch.float32, hardest=Hardest(2, 0.1))


@pytest.mark.parametrize("kind", WITH_HARDEST)
def test_more_than_there_are_is_all(kind):
    case = CASES["given, drawn, narrow"]
    user_BD, item_CD = case.vectors()
    plain = torch.autograd.grad(LOSSES[kind](user_BD, item_CD, case.relations()), (user_BD, item_CD))
    for count in (case.num_columns, 10**9):
        relations = replace(case.relations(), hardest=Hardest(count, 0.1))
        found = torch.autograd.grad(LOSSES[kind](user_BD, item_CD, relations), (user_BD, item_CD))
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", WITH_HARDEST)
def test_a_negative_that_is_not_among_the_hardest_is_pushed_away_too(kind):
    """Left alone, it would only ever be pulled: by the rows that it is a positive of."""
    rng = np.random.default_rng(0)
    user_BD, item_CD = (F.normalize(torch.from_numpy(rng.standard_normal((n, 4))), dim=1) for n in (1, 9))
    item_CD = F.normalize(item_CD + 2 * user_BD, dim=1).requires_grad_()  # all score high enough to cost something
    own = Pairs(torch.tensor([0]), torch.tensor([0]))
    loss = LOSSES[kind](user_BD, item_CD, Relations(own, own, hardest=Hardest(1, 0.1)))
    (slope_CD,) = torch.autograd.grad(loss, item_CD)
    assert ((slope_CD[1:] @ user_BD[0]) > 0).all()
