"""A tower: from one side's features to its vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trec_twotower.config import TowerConfig


class Tower(nn.Module):
    """Hidden layers with ReLU, then (unless `project` is off) a linear layer to `dim`; E in, D out."""

    def __init__(self, width: int, dim: int, config: TowerConfig, *, is_unit: bool) -> None:
        super().__init__()
        self.is_unit = is_unit  # cosine similarity: the vectors have length 1
        layers: list[nn.Module] = [nn.Dropout(config.dropout)] if config.dropout else []
        for hidden in config.mlp:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        if config.project:
            layers.append(nn.Linear(width, dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, feature_BE: Tensor) -> Tensor:
        vector_BD = self.layers(feature_BE)
        return F.normalize(vector_BD, dim=1) if self.is_unit else vector_BD
