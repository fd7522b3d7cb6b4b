"""A sequence's steps, oldest first, as one vector: the encoders behind one face.

Steps lie below each other, those of row 0 first (N of them, of B rows of `length_B`); nothing is padded unless an
encoder does so for itself, and then at the end. A row without steps becomes the zero vector.
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
from trec_twotower.data.features.transform import GAP_BUCKETS
from trec_twotower.data.loading.batch import JaggedLookup


class SequenceEncoder(nn.Module, ABC):
    """Makes one vector of each row's steps, as wide as theirs, or M vectors."""

    @abstractmethod
    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        """(B, D), or (B, M, D), of the steps (N, D), of which each row has `length_B`."""


class SequenceInput(nn.Module):
    """One sequence feature: its steps' vectors put together, and encoded."""

    def __init__(self, feature: SequenceFeature, dim: int) -> None:
        super().__init__()
        spec = feature.encoder
        # They start at zero: what a gap or an action says is learned as a difference from saying nothing.
        self.gap = _zeros(GAP_BUCKETS, dim) if feature.times else None
        self.action = _zeros(feature.action_buckets, dim) if feature.actions else None
        self.dropout = nn.Dropout(spec.dropout)
        self.encoder = ENCODERS[spec.kind](spec, dim, feature.max_length)

    def forward(self, item_UD: Tensor, listed: JaggedLookup) -> Tensor:
        """(B, D), or (B, M, D), of the distinct items' vectors and of how the rows' steps take them."""
        assert listed.place is not None and listed.length is not None
        step_ND = F.embedding(listed.place, item_UD)
        if self.gap is not None:
            assert listed.gap is not None
            step_ND = step_ND + self.gap(listed.gap)
        if self.action is not None:
            assert listed.action is not None
            step_ND = step_ND + self.action(listed.action)
        return self.encoder(self.dropout(step_ND), listed.length)


def _zeros(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.zeros_(table.weight)
    return table


def rows_of(length_B: Tensor, num_steps: int) -> Tensor:
    """(N,): the row of each step."""
    rows = torch.arange(length_B.shape[0], device=length_B.device)
    return torch.repeat_interleave(rows, length_B, output_size=num_steps)


def ages_of(length_B: Tensor, row_N: Tensor) -> Tensor:
    """(N,): how many steps of its row are newer; 0 for the newest."""
    return length_B.cumsum(0)[row_N] - 1 - torch.arange(row_N.shape[0], device=row_N.device)


def padded(step_ND: Tensor, length_B: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """(B, L, D) with zeros behind each row's newest step, and (B, L), where there is a step; L is at least 1.

    torch.export cannot have a width that depends on numbers: there L is `max_length`.
    """
    is_fixed = torch.compiler.is_exporting() or not length_B.shape[0]
    longest = max_length if is_fixed else max(int(length_B.max()), 1)
    is_step_BL = torch.arange(longest, device=length_B.device) < length_B[:, None]
    step_BLD = step_ND.new_zeros(length_B.shape[0], longest, step_ND.shape[1])
    return step_BLD.masked_scatter(is_step_BL[..., None], step_ND), is_step_BL


def newest(step_BLD: Tensor, length_B: Tensor) -> Tensor:
    """(B, D): each row's newest step of padded ones, zeros where there is none."""
    at_B = (length_B - 1).clamp(min=0)
    vector_BD = step_BLD[torch.arange(length_B.shape[0], device=length_B.device), at_B]
    return vector_BD * (length_B > 0)[:, None]


class Mean(SequenceEncoder):
    """The mean of the steps; their order does not count."""

    def __init__(self, spec: MeanEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        sum_BD = step_ND.new_zeros(length_B.shape[0], step_ND.shape[1])
        sum_BD = sum_BD.index_add(0, rows_of(length_B, step_ND.shape[0]), step_ND)
        return sum_BD / length_B.clamp(min=1)[:, None]


class Heads(SequenceEncoder):
    """Weighted means, one a head (a part of the vector), the weights learned by how old a step is.

    Head h weighs a step of age a (0: the newest) by softmax over its row of w[h, a], which starts at -rate_h * a; the
    rates go from `fastest` to `slowest` in equal ratios, from short memory to long. Then h + W h, W zero at the start.
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
        # A row's sum of weights depends on its length alone.
        log_sum_AH = torch.logcumsumexp(self.log_weight_AH, dim=0)
        log_sum_BH = F.embedding((length_B - 1).clamp(min=0), log_sum_AH)
        log_weight_NH = F.embedding(ages_of(length_B, row_N), self.log_weight_AH)
        weight_NH = (log_weight_NH - F.embedding(row_N, log_sum_BH)).exp()
        parts_NHP = step_ND.unflatten(1, (self.heads, -1)) * weight_NH[..., None]
        vector_BD = step_ND.new_zeros(length_B.shape[0], step_ND.shape[1])
        vector_BD = vector_BD.index_add(0, row_N, parts_NHP.flatten(1).to(vector_BD.dtype))
        return vector_BD + self.mix(vector_BD)


class Gru(SequenceEncoder):
    """The state of a gated recurrent unit after the newest step (Cho et al. 2014; GRU4Rec)."""

    def __init__(self, spec: GruEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.gru = nn.GRU(dim, dim, spec.layers, batch_first=True)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, _ = padded(step_ND, length_B, self.max_length)
        return newest(self.gru(step_BLD)[0], length_B)


class Cnn(SequenceEncoder):
    """Causal convolutions, each twice as far apart as the one before, added to what they read (Yuan et al. 2019).

    The result is the newest step's plus the mean of all, so that no step is out of sight.
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
    """Blocks of self-attention and a layer of four times the width, both behind a normalisation (as in SASRec).

    Places are counted from the newest step, by a learned vector each or by turning keys and queries (RoFormer, Su et
    al. 2021). Causal: the newest step's output; otherwise the mean of all.
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
        seen_BLL = seen_BLL | torch.eye(order_L.shape[0], dtype=torch.bool, device=step_ND.device)  # else 0 / 0
        for block in self.blocks:
            step_BLD = block(step_BLD, seen_BLL, order_L)
        step_BLD = self.last(step_BLD)
        if self.is_causal:
            return newest(step_BLD, length_B)
        return (step_BLD * is_step_BL[..., None]).sum(1) / length_B.clamp(min=1)[:, None]


class _Block(nn.Module):
    """x + attention(norm x), then x + wide(norm x)."""

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
    """(..., L, P) with each pair of numbers turned by its place, so that products depend on distances alone."""
    half = part.shape[-1] // 2
    rate_P = 10_000.0 ** (-torch.arange(half, device=part.device) / half)
    angle_LP = order_L[:, None] * rate_P
    first, second = part[..., :half], part[..., half : 2 * half]
    cos, sin = angle_LP.cos().to(part.dtype), angle_LP.sin().to(part.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, part[..., 2 * half :]], dim=-1)


class Attention(SequenceEncoder):
    """Weighted means, one a head, by how well each step answers a learned question; order does not count."""

    def __init__(self, spec: AttentionEncoderSpec, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.heads = spec.heads
        self.question = nn.Linear(dim, self.heads)
        self.value = nn.Linear(dim, dim)

    def forward(self, step_ND: Tensor, length_B: Tensor) -> Tensor:
        step_BLD, is_step_BL = padded(step_ND, length_B, self.max_length)
        logit_BLH = self.question(step_BLD).masked_fill(~is_step_BL[..., None], -math.inf)
        # A row without steps weighs its padding, which is zero, evenly.
        logit_BLH = logit_BLH.masked_fill((length_B == 0)[:, None, None], 0.0)
        value_BLHP = self.value(step_BLD).unflatten(-1, (self.heads, -1))
        vector_BD = torch.einsum("blh,blhp->bhp", logit_BLH.softmax(1), value_BLHP).flatten(1)
        return vector_BD * (length_B > 0)[:, None]


class Hierarchical(SequenceEncoder):
    """A unit over each segment of steps (counted from the newest), and another encoder over the segments' states."""

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
        length_G[first_B] = (length_B - (segments_B - 1) * self.segment)[has_steps_B]  # the oldest may be short
        return self.over(self.within(step_ND, length_G), segments_B)


class Routing(SequenceEncoder):
    """M interests among which steps are shared out by agreement: capsules (Sabour et al. 2017), as in MIND (Li 2019).

    With e_n = S step_n, step n gives interest m the weight w_nm = softmax over m of b_nm; so many times over

        interest_m = squash(sum over n of w_nm * e_n),    b_nm <- b_nm + interest_m . e_n

    with squash(z) = |z|² / (1 + |z|²) * z / |z|. MIND draws the first b at random, that interests may differ; here it
    is e_n . start_m with learned starts, so that a user's interests are the same each time, and in whatever order.
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
    """Vectors of the same direction, and of lengths |z|² / (1 + |z|²)."""
    square = vector.square().sum(-1, keepdim=True)
    return vector * (square + 1e-12).sqrt() / (1 + square)


class SelfAttention(SequenceEncoder):
    """M weighted means of the steps, the weights of each a softmax over steps of W2 tanh(W1 (step + place)).

    Lin et al. 2017; as interests, and with places (counted from the newest step), ComiRec-SA, Cen et al. 2020.
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
        # A row without steps weighs its padding, which is zero, evenly.
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
