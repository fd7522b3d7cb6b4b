"""A tower: from one side's features to its vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trec_twotower.config import TowerConfig, TrainConfig


class Tower(nn.Module):
    """Hidden layers with ReLU, then (unless `project` is off) a linear layer to `dim`; E in, D out.

    How it computes while it is trained, `trains_as` says; vectors are float32 in any case. With an average (`ema`), it
    encodes with the averaged weights when it is not being trained, and keeps both.
    """

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
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._precision = "fp32"
        self._micro_batch: int | None = None
        self._averaged: list[str] = []  # weights that have an average
        self.note_length: Callable[[Tensor], None] | None = None  # is shown the vectors before they are normalised

    def trains_as(self, config: TrainConfig) -> None:
        """Take the precision, the rows at a time and the average that a config asks for; before the first step."""
        self._precision = config.precision
        self._micro_batch = config.micro_batch
        if config.compile:
            self._compiled = torch.compile(self.layers.forward, dynamic=True)
        if config.optimizer.ema is not None:
            self._averaged = [name for name, _ in self.layers.named_parameters()]
            for name, weight in self.layers.named_parameters():
                self.register_buffer(_average_of(name), weight.detach().clone())

    def forward(self, feature_BE: Tensor) -> Tensor:
        if self.training:
            vector_BD = self._in_parts(feature_BE)
        elif self._averaged:
            averages = {name: getattr(self, _average_of(name)) for name in self._averaged}
            vector_BD = torch.func.functional_call(self.layers, averages, (feature_BE,))
        else:
            vector_BD = self.layers(feature_BE)
        if self.note_length is not None:
            self.note_length(vector_BD)
        return F.normalize(vector_BD, dim=1) if self.is_unit else vector_BD

    def _in_parts(self, feature_BE: Tensor) -> Tensor:
        """All rows, or `micro_batch` of them at a time, of which the backward pass recomputes what it needs.

        The loss and the tables see one batch either way, so that the tables are updated once, as from one pass.
        """
        size = self._micro_batch
        if size is None or len(feature_BE) <= size:
            return self._layered(feature_BE)
        parts = [checkpoint(self._layered, part, use_reentrant=False) for part in feature_BE.split(size)]
        return torch.cat(parts)

    def _layered(self, feature_BE: Tensor) -> Tensor:
        layers = self._compiled or self.layers
        if self._precision == "fp32":
            return layers(feature_BE)
        with torch.autocast(feature_BE.device.type, torch.bfloat16):
            return layers(feature_BE).float()

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weight."""
        weights = dict(self.layers.named_parameters())
        averages = [getattr(self, _average_of(name)) for name in self._averaged]
        if averages:
            torch._foreach_lerp_(averages, [weights[name] for name in self._averaged], 1.0 - decay)


def _average_of(name: str) -> str:
    return "average_" + name.replace(".", "_")
