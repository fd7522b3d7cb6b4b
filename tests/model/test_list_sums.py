"""Sums over lists in one pass against sums written out, and their dropout against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trec_twotower.config.features import build_feature
from trec_twotower.model.cpu.head_sums import head_sums, is_supported
from trec_twotower.model.sequence_encoders import SequenceInput

LENGTHS, VECTORS, HEADS, DIM = [3, 0, 5, 1], 6, 4, 8


def lists(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    place_N = torch.randint(VECTORS, (sum(LENGTHS),))
    return torch.randn(VECTORS, DIM), place_N, torch.tensor(LENGTHS), torch.rand(5, 5, HEADS)


def written_out(vector_UD: Tensor, place_N: Tensor, length_B: Tensor, weight_LAH: Tensor, kept_ND: Tensor) -> Tensor:
    rows = []
    for element_ID in (vector_UD[place_N] * kept_ND).split(length_B.tolist()):
        total = vector_UD.new_zeros(DIM)
        for step, element_D in enumerate(element_ID):
            weight_H = weight_LAH[len(element_ID) - 1, len(element_ID) - 1 - step]
            total = total + element_D * weight_H.repeat_interleave(DIM // HEADS)
        rows.append(total)
    return torch.stack(rows)


def kept_by(dropout: float, seed: int, place_N: Tensor, length_B: Tensor) -> Tensor:
    """(N, D): what each number is multiplied by, as lists of one element and weights of 1 show it."""
    torch.manual_seed(seed)
    ones = torch.ones(VECTORS, DIM)
    return head_sums(ones, place_N, torch.ones_like(place_N), torch.ones(1, 1, HEADS), dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.6])
def test_sums_and_gradients_are_those_written_out(dropout):
    vector_UD, place_N, length_B, weight_LAH = lists()
    kept_ND = kept_by(dropout, 3, place_N, length_B)
    found = []
    for made in (
        lambda vector, weight: written_out(vector, place_N, length_B, weight, kept_ND),
        lambda vector, weight: head_sums(vector, place_N, length_B, weight, dropout),
    ):
        vector, weight = vector_UD.clone().requires_grad_(), weight_LAH.clone().requires_grad_()
        torch.manual_seed(3)
        sum_BD = made(vector, weight)
        (sum_BD * torch.arange(1.0, DIM + 1)).sum().backward()
        found.append((sum_BD.detach(), vector.grad, weight.grad))
    for expected, value in zip(*found, strict=True):
        assert torch.allclose(value, expected, atol=1e-5)


def test_dropout_leaves_out_a_share_and_keeps_the_mean():
    torch.manual_seed(0)
    place_N, ones = torch.zeros(4000, dtype=torch.int64), torch.ones(1, 32)
    kept = head_sums(ones, place_N, torch.ones_like(place_N), torch.ones(1, 1, 1), 0.6)
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 2.5], abs=1e-6)
    assert float((kept == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
    is_out = (kept == 0).float()
    assert float((is_out[:, 0] * is_out[:, 1]).mean()) == pytest.approx(0.36, abs=0.03)  # columns are independent
    assert float((is_out[1:, 0] * is_out[:-1, 0]).mean()) == pytest.approx(0.36, abs=0.03)  # elements are, too
    again = head_sums(ones, place_N, torch.ones_like(place_N), torch.ones(1, 1, 1), 0.6)
    assert not torch.equal(kept, again)


def test_heads_make_the_same_either_way(monkeypatch):
    from trec_twotower.data.loading.batch import JaggedLookup

    vector_UD, place_N, length_B, _ = lists()
    feature = build_feature(
        name="history", kind="sequence", buckets=9, dim=DIM, max_length=5, encoder={"kind": "heads", "heads": HEADS}
    )
    part = SequenceInput(feature, DIM).eval()
    with torch.no_grad():
        for weight in part.parameters():
            weight.add_(torch.randn_like(weight))
    assert is_supported(vector_UD)
    fast = part(vector_UD, JaggedLookup(length_B, place=place_N))
    monkeypatch.setattr("trec_twotower.model.sequence_encoders.is_supported", lambda vector: False)
    assert torch.allclose(fast, part(vector_UD, JaggedLookup(length_B, place=place_N)), atol=1e-5)
