"""A row's hardest negatives alone: the loss is that of all negatives where only those are left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trec_twotower.config import SELECTIVE
from trec_twotower.model.losses import LOSSES, Pairs, Relations, blocks

ROWS, COLUMNS, DIM = 13, 17, 4
CORRECTED = ("softmax", "bsl")


@pytest.fixture
def world(rng):
    """Vectors in float64, and relations with everything in them: several positives, given pairs, rare columns."""
    user_BD, item_CD = (torch.from_numpy(rng.standard_normal((n, DIM))) for n in (ROWS, COLUMNS))
    user_BD, item_CD = (torch.nn.functional.normalize(each).requires_grad_() for each in (user_BD, item_CD))

    def pairs(count: int, **parts) -> Pairs:
        row, column = (torch.from_numpy(rng.integers(0, n, count)) for n in (ROWS, COLUMNS))
        return Pairs(row, column, **parts)

    positive = pairs(20, weight_P=torch.from_numpy(rng.random(20)))
    more = pairs(15)
    known = Pairs(torch.cat([positive.row_P, more.row_P]), torch.cat([positive.column_P, more.column_P]))
    given = pairs(25, label_P=torch.from_numpy(rng.integers(0, 2, 25).astype(np.float64)))
    is_negative_C = torch.from_numpy(rng.random(COLUMNS) < 0.8)
    log_q_C = torch.from_numpy(-2 * rng.random(COLUMNS))
    return user_BD, item_CD, Relations(positive, known, given, log_q_C, is_negative_C)


def loss_and_gradients(kind: str, world, relations: Relations) -> list[torch.Tensor]:
    user_BD, item_CD, _ = world
    loss = LOSSES[kind](user_BD, item_CD, relations)
    return [loss.detach(), *torch.autograd.grad(loss, (user_BD, item_CD))]


@pytest.mark.parametrize("rows_a_block", [1, 4, 100])
@pytest.mark.parametrize("hardest", [1, 3, 8])
@pytest.mark.parametrize("kind", SELECTIVE)
def test_only_the_negatives_of_the_highest_logits_count(world, monkeypatch, kind, hardest, rows_a_block):
    """Those that do not are made known to the row, one by one, by sorting all its negatives in plain Python."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 1)
    monkeypatch.setitem(blocks.BLOCK_CELLS, "cpu", rows_a_block * COLUMNS)
    user_BD, item_CD, relations = world
    known = set(zip(relations.known.row_P.tolist(), relations.known.column_P.tolist(), strict=True))
    given = list(zip(relations.given.row_P.tolist(), relations.given.column_P.tolist(), strict=True))
    labels = relations.given.label_P.tolist()
    taken = {pair for pair, label in zip(given, labels, strict=True) if label > 0}
    refused = {pair for pair, label in zip(given, labels, strict=True) if label <= 0}
    score_BC = (user_BD @ item_CD.T).tolist()
    extra = []
    for row in range(ROWS):
        logits = []
        for column in range(COLUMNS):
            stands = bool(relations.is_negative_C[column])
            if (row, column) in known | taken or not (stands or (row, column) in refused):
                continue
            # A column that stands against this row alone is no sample, and so not corrected.
            off = float(relations.log_q_C[column]) if kind in CORRECTED and stands else 0.0
            logits.append((score_BC[row][column] - off, column))
        extra += [(row, column) for _, column in sorted(logits, reverse=True)[hardest:]]
    row, column = (torch.tensor(part) for part in zip(*extra, strict=True))
    less = Pairs(torch.cat([relations.known.row_P, row]), torch.cat([relations.known.column_P, column]))
    wanted = loss_and_gradients(kind, world, replace(relations, known=less))
    found = loss_and_gradients(kind, world, replace(relations, hardest=hardest))
    everything = loss_and_gradients(kind, world, relations)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert abs(float(found[0] - everything[0])) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CORRECTED)
def test_the_hardest_are_those_after_the_correction_where_kernels_add_it_later_else(world, kind, precision):
    """float32, whose log q is added with the exponentials unless negatives are chosen first."""
    user_BD, item_CD = (each.detach().float().requires_grad_() for each in world[:2])
    relations = replace(world[2], given=None)
    relations = replace(
        relations, log_q_C=4 * relations.log_q_C.float(), positive=replace(relations.positive, weight_P=None)
    )
    score_BC = (user_BD.double() @ item_CD.double().T - relations.log_q_C.double()).detach()
    score_BC[:, ~relations.is_negative_C] = -torch.inf
    score_BC[relations.known.row_P, relations.known.column_P] = -torch.inf
    row, column = (score_BC < score_BC.topk(3, dim=1).values[:, -1:]).nonzero(as_tuple=True)
    less = Pairs(torch.cat([relations.known.row_P, row]), torch.cat([relations.known.column_P, column]))
    found, wanted = (
        torch.autograd.grad(LOSSES[kind](user_BD, item_CD, each, precision=precision), (user_BD, item_CD))
        for each in (replace(relations, hardest=3), replace(relations, known=less))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SELECTIVE)
def test_more_than_there_are_is_all(world, kind):
    _, _, relations = world
    for hardest in (COLUMNS, 10**9):
        found = loss_and_gradients(kind, world, replace(relations, hardest=hardest))
        for one, other in zip(found, loss_and_gradients(kind, world, relations), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
