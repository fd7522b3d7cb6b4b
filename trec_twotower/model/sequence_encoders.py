"""Sequence encoders: one vector, or several, from the steps of a sequence, oldest first.

All rows' steps are concatenated, (N, D), with `length_B` steps per row. An encoder that needs padding adds it itself,
after the last step. A row without steps gets the zero vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trec_twotower.config.features import SequenceFeature
from trec_twotower.config.model import (
    AttentionEncoderSpec,
    CnnEncoderSpec,
    GruEncoderSpec,
    HeadsEncoderSpec,
    HierarchicalEncoderSpec,
    MeanEncoderSpec,
    RoutingEncoderSpec,
    SelfAttentionEncoderSpec,
    TransformerEncoderSpec,
    build_encoder,
)
from trec_twotower.data.features.lists import GAP_BUCKETS
from trec_twotower.data.loading.batch import JaggedLookup


class SequenceEncoder(nn.Module, ABC):
    """Base class: encodes the steps of each row to one vector of the same width, or to M vectors."""

    @abstractmethod
    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        """Return (B, D), or (B, M, D), from the steps (N, D), `length_B` per row."""


class SequenceInput(nn.Module):
    """One sequence feature: adds up the vectors of each step and encodes the sequence."""

    def __init__(self, feature: SequenceFeature, dim: int) -> None:
        super().__init__()
        spec = feature.encoder
        # They start at zero: the model learns the difference that a gap or an action makes.
        self.gap = _zeros(GAP_BUCKETS, dim) if feature.times else None
        self.action = _zeros(feature.action_buckets, dim) if feature.actions else None
        self.dropout = StepDropout(spec.dropout)
        self.encoder = ENCODERS[spec.kind](spec, dim, feature.max_length)

    def forward(self, item_UD: Tensor, listed: JaggedLookup) -> Tensor:
        """Return (B, D), or (B, M, D), from the vectors of distinct items and the item index of each step."""
        assert listed.place is not None and listed.length is not None
        step_ND = F.embedding(listed.place, item_UD)
        if self.gap is not None:
            assert listed.gap is not None
            step_ND = step_ND + self.gap(listed.gap)
        if self.action is not None:
            assert listed.action is not None
            step_ND = step_ND + self.action(listed.action)
        return self.encoder(self.dropout(step_ND), listed.length)


class StepDropout(nn.Module):
    """Dropout of the values of sequence steps. On CPU the probability is rounded to a multiple of 1/256.

    On CPU it draws one random byte per number. This makes `train configs/amazon_beauty.yaml` 1.35 times as fast
    (rows/s, one thread) as torch's dropout.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, value: Tensor) -> Tensor:
        if not self.training or not self.probability or not value.is_cpu:
            return F.dropout(value, self.probability, self.training)
        least = round(self.probability * 256)
        bits = torch.empty(-(-value.numel() // 8), dtype=torch.int64).random_(-(1 << 63), None)
        is_kept = bits.view(torch.uint8)[: value.numel()].view_as(value) >= least
        return value * (is_kept * (256 / max(256 - least, 1)))


def _zeros(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.zeros_(table.weight)
    return table


def rows_of(length_B: Tensor, num_steps: int) -> Tensor:
    """Return (N,): the row of each step."""
    rows = torch.arange(length_B.shape[0], device=length_B.device)
    return torch.repeat_interleave(rows, length_B, output_size=num_steps)


def ages_of(length_B: Tensor, row_N: Tensor) -> Tensor:
    """Return (N,): the number of newer steps in the same row; 0 for the newest."""
    return length_B.cumsum(0)[row_N] - 1 - torch.arange(row_N.shape[0], device=row_N.device)


def padded(step_ND: Tensor, length_B: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Return (B, L, D), padded with zeros after the newest step, and the (B, L) mask of steps; L is at least 1.

    For torch.export, which allows no size that depends on values, L is `max_length`.
    """
    is_fixed = torch.compiler.is_exporting() or not length_B.shape[0]
    longest = max_length if is_fixed else max(int(length_B.max()), 1)
    is_step_BL = torch.arange(longest, device=length_B.device) < length_B[:, None]
    step_BLD = step_ND.new_zeros(length_B.shape[0], longest, step_ND.shape[1])
    return step_BLD.masked_scatter(is_step_BL[..., None], step_ND), is_step_BL


def newest(step_BLD: Tensor, length_B: Tensor) -> Tensor:
    """Return (B, D): the newest step of each row of padded steps; zeros for a row without steps."""
    at_B = (length_B - 1).clamp(min=0)
    vector_BD = step_BLD[torch.arange(length_B.shape[0], device=length_B.device), at_B]
    return vector_BD * (length_B > 0)[:, None]


class Mean(SequenceEncoder):
    """The mean of the steps, independent of their order."""

    def __init__(self, spec: MeanEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        sum_BD = step_ND.new_zeros(length_B.shape[0], step_ND.shape[1])
        sum_BD = sum_BD.index_add(0, rows_of(length_B, step_ND.shape[0]), step_ND)
        return sum_BD / length_B.clamp(min=1)[:, None]


class Heads(SequenceEncoder):
    """A weighted mean per head (a slice of the vector), with learned weights by the age of a step.

    Head h weights a step of age a (0: the newest) by a softmax over the row of w[h, a], which starts at -rate_h * a.
    The rates form a geometric sequence from `fastest` to `slowest`. The result is h + W h, with W = 0 at the start.
    """

    def __init__(self, spec: HeadsEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.heads = spec.heads
        rate_H = torch.logspace(math.log10(spec.fastest), math.log10(spec.slowest), self.heads)
        self.log_weight_AH = nn.Parameter(-torch.arange(max_length)[:, None] * rate_H)
        self.mix = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        row_N = rows_of(length_B, step_ND.shape[0])
        # The normalizer of a row depends on its length only.
        log_sum_AH = torch.logcumsumexp(self.log_weight_AH, dim=0)
        log_sum_BH = F.embedding((length_B - 1).clamp(min=0), log_sum_AH)
        log_weight_NH = F.embedding(ages_of(length_B, row_N), self.log_weight_AH)
        weight_NH = (log_weight_NH - F.embedding(row_N, log_sum_BH)).exp()
        parts_NHP = step_ND.unflatten(1, (self.heads, -1)) * weight_NH[..., None]
        vector_BD = step_ND.new_zeros(length_B.shape[0], step_ND.shape[1])
        vector_BD = vector_BD.index_add(0, row_N, parts_NHP.flatten(1).to(vector_BD.dtype))
        return vector_BD + self.mix(vector_BD)


class Gru(SequenceEncoder):
    """The state of a GRU after the newest step (Cho et al. 2014; GRU4Rec)."""

    def __init__(self, spec: GruEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.gru = nn.GRU(dim, dim, spec.layers, batch_first=True)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, _ = padded(step_ND, length_B, self.max_length)
        return newest(self.gru(step_BLD)[0], length_B)


class Cnn(SequenceEncoder):
    """Causal convolutions with doubling dilation and residual connections (NextItNet, Yuan et al. 2019).

    The result is the output at the newest step plus the mean over all steps, so that every step contributes.
    """

    def __init__(self, spec: CnnEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.width = spec.width
        self.layers = nn.ModuleList(nn.Conv1d(dim, dim, self.width, dilation=2**n) for n in range(spec.layers))

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, is_step_BL = padded(step_ND, length_B, self.max_length)
        step_BDL = step_BLD.transpose(1, 2)
        for number, layer in enumerate(self.layers):
            seen_BDL = F.pad(step_BDL, ((self.width - 1) * 2**number, 0))
            step_BDL = step_BDL + F.relu(layer(seen_BDL))
        step_BLD = step_BDL.transpose(1, 2) * is_step_BL[..., None]
        return newest(step_BLD, length_B) + step_BLD.sum(1) / length_B.clamp(min=1)[:, None]


class Transformer(SequenceEncoder):
    """Pre-norm transformer blocks: self-attention and a layer of four times the width (as in SASRec).

    Positions count from the newest step, as learned embeddings or as rotary embeddings (RoFormer, Su et al. 2021). With
    causal attention the result is the output at the newest step, otherwise the mean of all outputs.
    """

    def __init__(self, spec: TransformerEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.is_causal = spec.causal
        self.is_rotary = spec.positions == "rotary"
        self.place = None if self.is_rotary else nn.Parameter(torch.randn(max_length, dim) * dim**-0.5)
        self.blocks = nn.ModuleList(_Block(dim, spec.heads, spec.dropout, self.is_rotary) for _ in range(spec.layers))
        self.last = nn.LayerNorm(dim)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, is_step_BL = padded(step_ND, length_B, self.max_length)
        order_L = torch.arange(is_step_BL.shape[1], device=step_ND.device)
        age_BL = (length_B[:, None] - 1 - order_L).clamp(min=0)
        if self.place is not None:
            step_BLD = step_BLD + F.embedding(age_BL, self.place)
        seen_BLL = is_step_BL[:, None, :].expand(-1, order_L.shape[0], -1)
        if self.is_causal:
            seen_BLL = seen_BLL & (order_L <= order_L[:, None])
        seen_BLL = seen_BLL | torch.eye(order_L.shape[0], dtype=torch.bool, device=step_ND.device)  # avoids 0 / 0
        for block in self.blocks:
            step_BLD = block(step_BLD, seen_BLL, order_L)
        step_BLD = self.last(step_BLD)
        if self.is_causal:
            return newest(step_BLD, length_B)
        return (step_BLD * is_step_BL[..., None]).sum(1) / length_B.clamp(min=1)[:, None]


class _Block(nn.Module):
    """Return x + attention(norm x), then x + wide(norm x)."""

    def __init__(self, dim: int, heads: int, dropout: float, is_rotary: bool) -> None:
        super().__init__()
        self.heads, self.is_rotary = heads, is_rotary
        self.before_attention, self.before_wide = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.inward, self.outward = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.wide = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, step_BLD: Tensor, seen_BLL: Tensor, order_L: Tensor) -> Tensor:
        parts = self.inward(self.before_attention(step_BLD)).chunk(3, dim=-1)
        query, keys, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if self.is_rotary:
            query, keys = turned(query, order_L), turned(keys, order_L)
        found = F.scaled_dot_product_attention(query, keys, value, attn_mask=seen_BLL[:, None])
        step_BLD = step_BLD + self.dropout(self.outward(found.transpose(1, 2).flatten(-2)))
        return step_BLD + self.dropout(self.wide(self.before_wide(step_BLD)))


def turned(part: Tensor, order_L: Tensor) -> Tensor:
    """Return (..., L, P) with rotary positions: dot products depend on distances only."""
    half = part.shape[-1] // 2
    rate_P = 10_000.0 ** (-torch.arange(half, device=part.device) / half)
    angle_LP = order_L[:, None] * rate_P
    first, second = part[..., :half], part[..., half : 2 * half]
    cos, sin = angle_LP.cos().to(part.dtype), angle_LP.sin().to(part.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, part[..., 2 * half :]], dim=-1)


class Attention(SequenceEncoder):
    """A weighted mean per head, by attention of a learned query to the steps, independent of their order."""

    def __init__(self, spec: AttentionEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.heads = spec.heads
        self.question = nn.Linear(dim, self.heads)
        self.value = nn.Linear(dim, dim)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, is_step_BL = padded(step_ND, length_B, self.max_length)
        logit_BLH = self.question(step_BLD).masked_fill(~is_step_BL[..., None], -math.inf)
        # A row without steps averages its padding, which is zero.
        logit_BLH = logit_BLH.masked_fill((length_B == 0)[:, None, None], 0.0)
        value_BLHP = self.value(step_BLD).unflatten(-1, (self.heads, -1))
        vector_BD = torch.einsum("blh,blhp->bhp", logit_BLH.softmax(1), value_BLHP).flatten(1)
        return vector_BD * (length_B > 0)[:, None]


class Hierarchical(SequenceEncoder):
    """A GRU over each segment of steps (counted from the newest), and another encoder over the segments' states."""

    def __init__(self, spec: HierarchicalEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.segment = spec.segment
        self.within = Gru(GruEncoderSpec(), dim, self.segment)
        over = build_encoder(kind=spec.over, dropout=spec.dropout)
        self.over = ENCODERS[spec.over](over, dim, -(-max_length // self.segment))

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        segments_B = -(-length_B // self.segment)
        length_G = torch.full((int(segments_B.sum()),), self.segment, device=length_B.device)
        has_steps_B = length_B > 0
        first_B = (segments_B.cumsum(0) - segments_B)[has_steps_B]
        # The oldest segment may be shorter.
        length_G[first_B] = (length_B - (segments_B - 1) * self.segment)[has_steps_B]
        return self.over(self.within(step_ND, length_G), segments_B)


class Routing(SequenceEncoder):
    """M interests by dynamic routing (Sabour et al. 2017), as in MIND (Li et al. 2019).

    With e_n = S step_n, step n has the weight w_nm = softmax over m of b_nm for interest m. Each iteration computes

        interest_m = squash(sum over n of w_nm * e_n),    b_nm <- b_nm + interest_m . e_n

    with squash(z) = |z|² / (1 + |z|²) * z / |z|. MIND initializes b at random, so that interests
    differ. Here b is e_n . start_m with learned starts, so that the interests of a user are deterministic.
    """

    def __init__(self, spec: RoutingEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.iterations = spec.iterations
        self.shared = nn.Linear(dim, dim, bias=False)
        self.start_MD = nn.Parameter(torch.randn(spec.interests, dim))

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, is_step_BL = padded(self.shared(step_ND), length_B, self.max_length)
        logit_BLM = step_BLD @ self.start_MD.T
        for number in range(self.iterations):
            weight_BLM = logit_BLM.softmax(2) * is_step_BL[..., None]
            interest_BMD = squashed(weight_BLM.transpose(1, 2) @ step_BLD)
            if number < self.iterations - 1:
                logit_BLM = logit_BLM + step_BLD @ interest_BMD.transpose(1, 2)
        return interest_BMD


def squashed(vector: Tensor) -> Tensor:
    """Return vectors of the same direction with lengths |z|² / (1 + |z|²)."""
    square = vector.square().sum(-1, keepdim=True)
    return vector * (square + 1e-12).sqrt() / (1 + square)


class SelfAttention(SequenceEncoder):
    """M weighted means of the steps, each with the weights softmax over steps of W2 tanh(W1 (step + position)).

    Lin et al. 2017. As interests, with positions counted from the newest step: ComiRec-SA, Cen et al. 2020.
    """

    def __init__(self, spec: SelfAttentionEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.place_AD = nn.Parameter(torch.zeros(max_length, dim))
        self.inward = nn.Linear(dim, dim, bias=False)
        self.outward = nn.Linear(dim, spec.interests, bias=False)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        place_ND = F.embedding(ages_of(length_B, rows_of(length_B, step_ND.shape[0])), self.place_AD)
        logit_NM = self.outward(torch.tanh(self.inward(step_ND + place_ND)))
        step_BLD, is_step_BL = padded(step_ND, length_B, self.max_length)
        logit_BLM, _ = padded(logit_NM, length_B, self.max_length)
        # A row without steps averages its padding, which is zero.
        is_hidden_BL = ~is_step_BL & (length_B > 0)[:, None]
        weight_BLM = logit_BLM.masked_fill(is_hidden_BL[..., None], -math.inf).softmax(1)
        return weight_BLM.transpose(1, 2) @ step_BLD.to(weight_BLM.dtype)


ENCODERS: dict[str, Callable[[Any, int, int], SequenceEncoder]] = {
    "mean": Mean,
    "heads": Heads,
    "gru": Gru,
    "cnn": Cnn,
    "transformer": Transformer,
    "attention": Attention,
    "hierarchical": Hierarchical,
    "routing": Routing,
    "self_attention": SelfAttention,
}
