"""A learned temperature between two bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trec_twotower.config.losses import LearnedTemperature


class Temperature(nn.Module):
    """Scalar t with log t = log low + (log high - log low) * sigmoid(x), where x is the parameter.

    t stays within its bounds and has a gradient everywhere between them.
    """

    def __init__(self, config: LearnedTemperature, device: torch.device) -> None:
        super().__init__()
        self.low = config.low
        self.log_range = math.log(config.high / config.low)
        share = math.log(config.start / config.low) / self.log_range
        self.position = nn.Parameter(torch.tensor(math.log(share / (1 - share)), device=device))

    def forward(self) -> Tensor:
        """Return the temperature, a scalar with gradient."""
        return self.low * (self.log_range * torch.sigmoid(self.position)).exp()
