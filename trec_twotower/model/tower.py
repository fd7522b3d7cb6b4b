"""A tower: from the features of users or items to their vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trec_twotower.config.model import TowerConfig
from trec_twotower.config.training import TrainConfig
from trec_twotower.data.loading.batch import JaggedLookup
from trec_twotower.distributed.compat import lerp_
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.tower_layers import (
    Crosses,
    Experts,
    FeatureDropout,
    FeatureGates,
    Missing,
    ShortLong,
    Summed,
    Unit,
)


class Tower(nn.Module):
    """Hidden layers with ReLU, then (unless `project` is off) a linear layer to `dim`; E in, D out.

    `trains_as` sets precision, micro-batches and averaging for training. Vectors are always float32. With averaging
    (`ema`), the tower keeps the weights and their average, and encodes with the average outside training.
    """

    def __init__(
        self,
        widths: Sequence[int],
        dim: int,
        config: TowerConfig,
        *,
        is_unit: bool,
        place: Callable[[str], int] = lambda name: 0,
        output: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`widths` are the widths of the concatenated features; `place` returns the index of a feature by name.

        `output` is applied to the vectors.
        """
        super().__init__()
        self._output = output
        self.is_unit = is_unit  # cosine similarity: the vectors have length 1
        layers: list[nn.Module] = [nn.Dropout(config.dropout)] if config.dropout else []
        if config.feature_dropout:
            by_place = {place(name): rate for name, rate in config.feature_dropout.items()}
            layers.append(FeatureDropout(widths, [by_place.get(number, 0.0) for number in range(len(widths))]))
        if config.missing_vectors:
            layers.append(Missing(widths, sorted({place(name) for name in config.missing_vectors})))
        if config.unit_length:
            layers.append(Unit(widths, sorted({place(name) for name in config.unit_length})))
        if config.gating is not None:
            layers.append(FeatureGates(widths, config.gating, sorted({place(name) for name in config.gating.by})))
        if config.crosses:
            layers.append(Crosses(sum(widths), config.crosses))
        if config.combine == "sum":
            layers.append(Summed(len(widths)))
        width = widths[0] if config.combine == "sum" else sum(widths)
        if config.short_term:
            layers.append(ShortLong(widths, sorted({place(name) for name in config.short_term}), dim))
            width = dim
        if config.experts is not None:
            layers.append(Experts(width, config.experts))
        width, *hidden_widths = config.layer_widths(widths, dim)
        for hidden in hidden_widths:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        if config.project:
            layers.append(nn.Linear(width, dim))
        self.layers = nn.Sequential(*layers)
        ends = list(accumulate(widths))
        self._wide = [slice(ends[number] - widths[number], ends[number]) for number in map(place, config.wide)]
        self.encoders = nn.ModuleDict()  # encoders of sequences, texts, numbers and vectors by `encoder_name`
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._precision = "fp32"
        self._encodes_narrow = False
        self._micro_batch: int | None = None
        self._averaged: list[str] = []  # names of the averaged weights

    def trains_as(self, config: TrainConfig, ranks: Ranks) -> None:
        """Set precision, micro-batch and averaging by the config; call it before the first step."""
        self._precision = ranks.precision(config.precision)
        # Sequence encoders (GRUs, softmax over steps) use bfloat16 only if the config requests it explicitly.
        self._encodes_narrow = config.precision == "bf16"
        self._micro_batch = config.micro_batch
        if config.compile:
            self._compiled = torch.compile(self.layers.forward, dynamic=True)
        if config.optimizer.ema is not None:
            weights = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
            self._averaged = list(weights)
            for name, weight in weights.items():
                self.register_buffer(average_of(name), weight.detach().clone())

    def forward(self, feature_BE: Tensor, on_raw: Callable[[Tensor], None] | None = None) -> Tensor:
        """Return (B, D), of length 1 for cosine similarity; (B, M, D) for (B, M, E), where each user has M vectors.

        `on_raw` is called with the vectors before they are normalized.
        """
        if feature_BE.ndim == 3:
            return self.forward(feature_BE.flatten(0, 1), on_raw).unflatten(0, feature_BE.shape[:2])
        vector_BD = self._in_parts(feature_BE) if self.training else self._averaging(self.layers, "layers.", feature_BE)
        for part in self._wide:
            vector_BD = vector_BD + feature_BE[:, part]
        if on_raw is not None:
            on_raw(vector_BD)
        vector_BD = F.normalize(vector_BD, dim=1) if self.is_unit else vector_BD
        return vector_BD if self._output is None else self._output(vector_BD)

    def penalty(self, ranks: Ranks) -> Tensor | None:
        """Return the penalty of the experts for the last batch, or None without experts. All ranks call together."""
        added = [part.penalty(ranks) for part in self.layers if isinstance(part, Experts) and part.config.top_k]
        return added[0] if added else None

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Return the metrics of the layers for the last (micro-)batch of all ranks, which call together."""
        found: dict[str, float] = {}
        for part in self.layers:
            if isinstance(part, ShortLong | Experts):
                found |= part.figures(ranks)
        return found

    def encode(self, name: str, *given: Tensor | JaggedLookup) -> Tensor:
        """Return (B, D): the output of a feature's encoder."""
        encoder = self.encoders[encoder_name(name)]
        if not self.training:
            return self._averaging(encoder, f"encoders.{encoder_name(name)}.", *given)
        if not self._encodes_narrow:
            return encoder(*given)
        with torch.autocast(next(encoder.parameters()).device.type, torch.bfloat16):
            return encoder(*given).float()

    def _averaging(self, part: nn.Module, prefix: str, *inputs: object) -> Tensor:
        """Return the output of a part of this tower, with averaged weights if there are any."""
        averages = {
            name.removeprefix(prefix): getattr(self, average_of(name))
            for name in self._averaged
            if name.startswith(prefix)
        }
        return torch.func.functional_call(part, averages, inputs) if averages else part(*inputs)

    def _in_parts(self, feature_BE: Tensor) -> Tensor:
        """Encode all rows, or `micro_batch` rows at a time, with activation checkpointing.

        The loss and the tables see one batch either way, so the tables are updated once.
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
    def begin_average(self) -> None:
        """Set each average to its weight."""
        weights = dict(self.named_parameters())
        for name in self._averaged:
            getattr(self, average_of(name)).copy_(weights[name])

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """Update each average: decay * average + (1 - decay) * weight."""
        weights = dict(self.named_parameters())
        averages = [getattr(self, average_of(name)) for name in self._averaged]
        if averages:
            lerp_(averages, [weights[name] for name in self._averaged], 1.0 - decay)


def encoder_name(feature: str) -> str:
    """Return the key of a feature's encoder: a ModuleDict reserves names such as `items` and `type`."""
    return f"of_{feature}"


def average_of(name: str) -> str:
    """Return the buffer name of the average of a weight."""
    return "average_" + name.removeprefix("layers.").replace(".", "_")
