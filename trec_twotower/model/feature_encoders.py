"""Encoders of numeric, text and vector features: one class per kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import AgeFeature, LanguageModelFeature, NumberFeature, NumericFeature, VectorFeature
from trec_twotower.data.features.text import MAX_TOKENS, transformers
from trec_twotower.data.loading.batch import JaggedLookup
from trec_twotower.errors import ConfigError
from trec_twotower.ops.hashing import mix_torch

ENCODED_AT_ONCE = 256  # texts per forward pass without gradients
START_SPREAD = 1.0  # standard deviation of the initial frequencies


class VectorInput(nn.Module):
    """Precomputed vectors, projected if the feature has a `dim`, with a learned vector for missing ones."""

    def __init__(self, feature: VectorFeature) -> None:
        super().__init__()
        self.project = nn.Identity() if feature.dim is None else nn.Linear(feature.size, feature.dim)
        self.missing = nn.Parameter(torch.zeros(feature.dim or feature.size))

    def forward(self, number_BN: Tensor) -> Tensor:
        """Return (rows, width). The last number of a row is 1 where the others are missing."""
        return torch.where(number_BN[:, -1:] > 0, self.missing, self.project(number_BN[:, :-1]))


class WavesInput(nn.Module):
    """A number with sines and cosines of learned frequencies, followed by a layer (PLR, Gorishniy et al. 2022).

    relu(W [x, sin 2πcx, cos 2πcx, is missing] + b) with random initial frequencies c.
    """

    def __init__(self, feature: NumericFeature) -> None:
        super().__init__()
        assert feature.frequencies is not None and feature.dim is not None
        self.frequency = nn.Parameter(START_SPREAD * torch.randn(feature.frequencies))
        self.layer = nn.Linear(2 * feature.frequencies + 2, feature.dim)

    def forward(self, number_BN: Tensor) -> Tensor:
        """Return (rows, dim) from a normalized value and whether it is missing."""
        angle_BF = 2 * math.pi * number_BN[:, :1] * self.frequency
        return F.relu(self.layer(torch.cat([number_BN, angle_BF.sin(), angle_BF.cos()], dim=1)))


class TextInput(nn.Module):
    """The mean of a language model's token vectors, projected, with a learned vector for missing texts.

    The model encodes each distinct text of a batch once. Its outputs are cached while its weights do not change: always
    if it is frozen, otherwise until the next training step.
    """

    def __init__(self, feature: LanguageModelFeature) -> None:
        super().__init__()
        self.model = _load(feature)
        self.most_tokens = feature.max_length or MAX_TOKENS
        self.is_frozen = feature.tune == "frozen"
        width = _try(self.model, feature)
        _tune(self.model, feature)
        self.project = nn.Linear(width, feature.dim)
        self.missing = nn.Parameter(torch.zeros(feature.dim))
        self._place: dict[int, int] = {}  # index of a cached text by its hash
        self._kept: list[Tensor] = []

    def train(self, mode: bool = True) -> TextInput:
        super().train(mode)
        if self.is_frozen:
            self.model.eval()
        return self

    def forward(self, listed: JaggedLookup) -> Tensor:
        """Return (rows, dim) from the tokens of the rows."""
        assert listed.length is not None and listed.place is not None
        if torch.compiler.is_exporting():  # an exported program has no cache, and no sizes that depend on values
            token_BL, is_there_BL = _padded(listed.length, listed.place, self.most_tokens)
            vector_BD = self.project(self._mean(token_BL, is_there_BL))
            return torch.where(listed.length[:, None] > 0, vector_BD, self.missing)
        token_BL, is_there_BL = _padded(listed.length, listed.place)
        key_U, text_B = torch.unique(_hashed(token_BL, is_there_BL), return_inverse=True)
        first_U = torch.full_like(key_U, len(text_B)).scatter_reduce(
            0, text_B, torch.arange(len(text_B), device=text_B.device), "amin"
        )
        if not self.is_frozen and self.training and torch.is_grad_enabled():
            self.forget()
            made_UW = self._read(token_BL[first_U], is_there_BL[first_U])
        else:
            made_UW = self._known(key_U, token_BL[first_U], is_there_BL[first_U])
        vector_BD = self.project(made_UW)[text_B]
        return torch.where(listed.length[:, None] > 0, vector_BD, self.missing)

    def forget(self) -> None:
        """Clear the cache, because the weights are about to change."""
        self._place, self._kept = {}, []

    @torch.no_grad()
    def _known(self, key_U: Tensor, token_UL: Tensor, is_there_UL: Tensor) -> Tensor:
        """Return the outputs for these texts; only texts that are not cached are encoded."""
        keys = key_U.tolist()
        new = [number for number, key in enumerate(keys) if key not in self._place]
        for start in range(0, len(new), ENCODED_AT_ONCE):
            some = new[start : start + ENCODED_AT_ONCE]
            at = torch.tensor(some, device=key_U.device)
            made = self._read(token_UL[at], is_there_UL[at])
            self._place |= {keys[number]: len(self._place) + more for more, number in enumerate(some)}
            self._kept.append(made.detach())
        if not keys:
            return self._read(token_UL, is_there_UL)
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0][torch.tensor([self._place[key] for key in keys], device=key_U.device)]

    def _read(self, token_UL: Tensor, is_there_UL: Tensor) -> Tensor:
        """Return (texts, model width): the mean of the last layer over the tokens of each text."""
        if not len(token_UL):  # one dummy text, so that the weights get a gradient of zero
            one = torch.zeros(1, 1, dtype=torch.int64, device=token_UL.device)
            return self._read(one, one.bool().logical_not())[:0]
        longest = max(int(is_there_UL.sum(1).max()), 1)
        return self._mean(token_UL[:, :longest], is_there_UL[:, :longest])

    def _mean(self, token_UL: Tensor, is_there_UL: Tensor) -> Tensor:
        """Return (texts, model width): the mean of the last layer over tokens that are not padding."""
        is_there_UL = is_there_UL.clone()
        is_there_UL[:, 0] = True  # a text without tokens is dropped later
        state_ULW = self.model(input_ids=token_UL, attention_mask=is_there_UL.long()).last_hidden_state
        weight_UL1 = is_there_UL[..., None].to(state_ULW.dtype)
        return ((state_ULW * weight_UL1).sum(1) / weight_UL1.sum(1)).float()


def _padded(length_B: Tensor, token_N: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (rows, longest) tokens, padded with 0, and the mask of tokens; `longest` is the longest row by default."""
    if longest is None:
        longest = max(int(length_B.max()) if len(length_B) else 0, 1)
    is_there_BL = torch.arange(longest, device=length_B.device) < length_B[:, None]
    token_BL = torch.zeros(is_there_BL.shape, dtype=torch.int64, device=length_B.device)
    return token_BL.masked_scatter(is_there_BL, token_N), is_there_BL


def _hashed(token_BL: Tensor, is_there_BL: Tensor) -> Tensor:
    """Return a 64-bit hash of the tokens of each row, without padding."""
    place_L = torch.arange(token_BL.shape[1], device=token_BL.device)
    mixed_BL = mix_torch(mix_torch(token_BL) + (place_L << 32))
    return (mixed_BL * is_there_BL).sum(1)


def _load(feature: LanguageModelFeature) -> Any:
    auto = transformers().AutoModel
    from safetensors import SafetensorError

    try:
        return auto.from_pretrained(feature.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"feature {feature.name!r}: {feature.folder} contains no model that transformers can load: {error}"
        ) from None


def _try(model: Any, feature: LanguageModelFeature) -> int:
    """Return the output width of the model. Raises ConfigError if it cannot encode a text of one token."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    try:
        with torch.no_grad():
            return model.eval()(input_ids=one, attention_mask=torch.ones_like(one)).last_hidden_state.shape[-1]
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ConfigError(
            f"feature {feature.name!r}: the {type(model).__name__} in {feature.folder} does not make vectors of a "
            f"text's tokens ({error}): take a plain encoder (bert, distilbert, roberta, mpnet and the like), or have "
            "the vectors made beforehand (kind vector)."
        ) from None


def _tune(model: Any, feature: LanguageModelFeature) -> None:
    """Make the weights that `tune` names trainable, except those that the output does not depend on."""
    model.eval()
    model.requires_grad_(feature.tune == "all")
    if isinstance(feature.tune, int):
        layers = _layers(model, feature)
        for layer in layers[len(layers) - feature.tune :]:
            layer.requires_grad_(True)
    if feature.tune == "frozen":
        return
    # Ranks would wait for the gradients of weights that get none, such as those of a pooler.
    one = torch.zeros(1, 1, dtype=torch.int64)
    model(input_ids=one, attention_mask=torch.ones_like(one)).last_hidden_state.sum().backward()
    for weight in model.parameters():
        weight.requires_grad_(weight.requires_grad and weight.grad is not None)
        weight.grad = None


def _layers(model: Any, feature: LanguageModelFeature) -> list[nn.Module]:
    """Return the layers of the model, first to last."""

    def lists() -> Iterator[nn.ModuleList]:
        return (each for each in model.modules() if isinstance(each, nn.ModuleList))

    count = model.config.num_hidden_layers
    found = next((list(each) for each in lists() if len(each) == count), None)
    if found is None or int(feature.tune) > count:
        raise ConfigError(
            f"feature {feature.name!r} has tune: {feature.tune}, but the model in {feature.folder} shows "
            f"{count if found else 'no list of its'} layers: take fewer, or all, or frozen."
        )
    return found


LAYERS: dict[type[FeatureSpec], Callable[[Any], nn.Module]] = {
    VectorFeature: VectorInput,
    LanguageModelFeature: TextInput,
    NumberFeature: WavesInput,
    AgeFeature: WavesInput,
}


def build_input(feature: FeatureSpec) -> nn.Module:
    """Return a feature's own layers, from (rows, num_numbers) or tokens (JaggedLookup) to (rows, layers_width)."""
    return LAYERS[type(feature)](feature)
