"""Optional layers of a tower: modules on (B, E), the concatenated features.

`widths` are the widths of the features in order. The last one covers all numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trec_twotower.config.model import ExpertsConfig, GatingConfig
from trec_twotower.distributed.ranks import Ranks


class Summed(nn.Module):
    """The sum of features of equal width."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, feature_BE: Tensor) -> Tensor:
        return feature_BE.unflatten(1, (self.count, -1)).sum(1) if self.count > 1 else feature_BE


class FeatureDropout(nn.Module):
    """Dropout of whole features in training, so that the tower learns to work without them (DropoutNet).

    Values are not scaled up, because a missing feature is zero as well.
    """

    rate_F: Tensor

    def __init__(self, widths: Sequence[int], rates: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("rate_F", torch.tensor(rates), persistent=False)
        self.widths = list(widths)

    def forward(self, feature_BE: Tensor) -> Tensor:
        if not self.training:
            return feature_BE
        draw_BF = torch.rand(len(feature_BE), len(self.widths), device=feature_BE.device)
        return feature_BE * _spread((draw_BF >= self.rate_F).to(feature_BE.dtype), self.widths)


class Missing(nn.Module):
    """Adds a learned vector where a feature is zero: dropped, an empty bag, an id without training rows.

    It is added, so that the gradient still reaches the feature and table rows that start at zero are trained.
    """

    def __init__(self, widths: Sequence[int], places: Sequence[int]) -> None:
        super().__init__()
        self.widths, self.places = list(widths), list(places)
        self.vector_E = nn.Parameter(torch.zeros(sum(widths[place] for place in places)))

    def forward(self, feature_BE: Tensor) -> Tensor:
        parts = list(feature_BE.split(self.widths, dim=1))
        for place, vector in zip(self.places, self.vector_E.split([self.widths[n] for n in self.places]), strict=True):
            is_zero_B1 = ~parts[place].detach().any(dim=1, keepdim=True)
            parts[place] = parts[place] + is_zero_B1 * vector
        return torch.cat(parts, dim=1)


class FeatureGates(nn.Module):
    """Multiplies each feature by a weight between 0 and 2, a function of all features (SENET; FiBiNET).

    With `by`, the weights depend on these features only, such as a context. All weights start at 1.
    """

    def __init__(self, widths: Sequence[int], config: GatingConfig, by: Sequence[int]) -> None:
        super().__init__()
        self.widths, self.by = list(widths), list(by)
        inward = sum(widths[number] for number in by) if by else len(widths)
        hidden = max(len(widths) // config.reduction, 1)
        self.squeeze, self.excite = nn.Linear(inward, hidden), nn.Linear(hidden, len(widths))
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def forward(self, feature_BE: Tensor) -> Tensor:
        parts = feature_BE.split(self.widths, dim=1)
        if self.by:
            context = torch.cat([parts[number] for number in self.by], dim=1)
        else:
            context = torch.stack([part.mean(1) for part in parts], dim=1)
        weight_BF = 2 * torch.sigmoid(self.excite(F.relu(self.squeeze(context))))
        return feature_BE * _spread(weight_BF, self.widths)


class Unit(nn.Module):
    """Normalizes the concatenation of some features to length 1; zero rows stay zero."""

    def __init__(self, widths: Sequence[int], places: Sequence[int]) -> None:
        super().__init__()
        self.widths, self.is_unit = list(widths), [number in places for number in range(len(widths))]

    def forward(self, feature_BE: Tensor) -> Tensor:
        if all(self.is_unit):
            return F.normalize(feature_BE, dim=1)
        parts = feature_BE.split(self.widths, dim=1)
        chosen = torch.cat([part for part, is_unit in zip(parts, self.is_unit, strict=True) if is_unit], dim=1)
        length_B1 = torch.linalg.vector_norm(chosen, dim=1, keepdim=True).clamp(min=1e-12)
        scaled = [part / length_B1 if is_unit else part for part, is_unit in zip(parts, self.is_unit, strict=True)]
        return torch.cat(scaled, dim=1)


class Crosses(nn.Module):
    """Cross layers x0 * (W x + b) + x (DCN-v2, Wang et al. 2021)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, feature_BE: Tensor) -> Tensor:
        crossed_BE = feature_BE
        for layer in self.layers:
            crossed_BE = feature_BE * layer(crossed_BE) + crossed_BE
        return crossed_BE


class ShortLong(nn.Module):
    """g * short + (1 - g) * long, elementwise, with a gate g in [0, 1] from all features (SDM, Lv et al. 2019).

    `short` are the indices of short-term features; all others are long-term. Each group has a linear layer to `dim`.
    """

    def __init__(self, widths: Sequence[int], short: Sequence[int], dim: int) -> None:
        super().__init__()
        self.widths, self.is_short = list(widths), [number in short for number in range(len(widths))]
        of_short = sum(widths[number] for number in short)
        self.short, self.long = nn.Linear(of_short, dim), nn.Linear(sum(widths) - of_short, dim)
        self.gate = nn.Linear(sum(widths), dim)
        self.gate_B: Tensor | None = None  # mean gate per row of this rank's last batch

    def forward(self, feature_BE: Tensor) -> Tensor:
        parts = list(zip(feature_BE.split(self.widths, dim=1), self.is_short, strict=True))
        short_BD = self.short(torch.cat([part for part, is_short in parts if is_short], dim=1))
        long_BD = self.long(torch.cat([part for part, is_short in parts if not is_short], dim=1))
        gate_BD = torch.sigmoid(self.gate(feature_BE))
        self.gate_B = gate_BD.detach().mean(1)
        return gate_BD * short_BD + (1 - gate_BD) * long_BD

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean gate of the last batch over all ranks, which call together."""
        return row_means(["gate"], None if self.gate_B is None else self.gate_B[:, None], ranks)


class Experts(nn.Module):
    """Mixture of experts: a mean of layers, weighted by a router; with `top_k`, of the best `top_k` layers per row.

    With `top_k` (Shazeer et al. 2017), `penalty` balances the load: K sum_e f_e P_e, where f_e is the share of rows
    whose best expert is e, and P_e is the mean weight of e (Fedus et al. 2021). It is 1 for equal load.
    """

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, config.width), nn.ReLU()) for _ in range(config.count)
        )
        self.weight_BK: Tensor | None = None  # router weights of the last batch
        self.used_BK: Tensor | None = None  # the same after `top_k`

    def forward(self, feature_BE: Tensor) -> Tensor:
        logit_BK = self.router(feature_BE)
        self.weight_BK = weight_BK = logit_BK.softmax(1)
        if self.config.top_k is not None:
            least_B1 = logit_BK.topk(self.config.top_k, dim=1).values[:, -1:]
            weight_BK = logit_BK.masked_fill(logit_BK < least_B1, float("-inf")).softmax(1)
        self.used_BK = weight_BK.detach()
        each_BKW = torch.stack([expert(feature_BE) for expert in self.experts], dim=1)
        return (weight_BK[..., None] * each_BKW).sum(1)

    def penalty(self, ranks: Ranks) -> Tensor:
        """Return the penalty of the last batch, scaled so that its mean over ranks is the total; all ranks call it."""
        assert self.weight_BK is not None
        count = self.config.count
        best_K = torch.bincount(self.weight_BK.argmax(1), minlength=count)
        used_K = torch.from_numpy(ranks.sum(best_K.cpu().numpy())).to(self.weight_BK)
        rows = used_K.sum().clamp(min=1)
        share = ranks.num_ranks / rows
        return self.config.balance * count * (used_K / rows * self.weight_BK.sum(0)).sum() * share

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean weight of each expert in the last batch of all ranks, which call together."""
        return row_means([f"expert_{number}" for number in range(self.config.count)], self.used_BK, ranks)


def row_means(names: Sequence[str], value_BK: Tensor | None, ranks: Ranks) -> dict[str, float]:
    """Return the mean of each column over the rows of all ranks; empty if there are no rows."""
    mine_K = np.zeros(len(names)) if value_BK is None else value_BK.double().sum(0).cpu().numpy()
    rows, *sums = ranks.sum(np.array([0 if value_BK is None else len(value_BK), *mine_K])).tolist()
    return {name: value / rows for name, value in zip(names, sums, strict=True)} if rows else {}


def _spread(value_BF: Tensor, widths: Sequence[int]) -> Tensor:
    """Return (B, E): the number of each feature, repeated for its columns."""
    return torch.cat([value_BF[:, number, None].expand(-1, width) for number, width in enumerate(widths)], dim=1)
