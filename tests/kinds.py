"""The kinds of losses and encoders with their settings and defaults, as the pages describe them."""

from __future__ import annotations

from typing import Any

from trec_twotower.config.base import validate
from trec_twotower.config.losses import Loss, LossConfig

LOSS_PARAMETERS: dict[str, dict[str, Any]] = {
    "softmax": {"temperature": 0.1, "precision": "auto"},
    "bce": {"temperature": 0.1, "negative_weight": 1.0, "precision": "auto"},
    "softmax_bce": {"temperature": 0.1, "softmax_share": 0.5, "negative_weight": 1.0, "precision": "auto"},
    "bsl": {"temperature": 0.1, "temperature_ratio": 1.0, "precision": "auto"},
    "ccl": {"margin": 0.5, "negative_weight": 150.0, "precision": "auto"},
    "bpr": {"temperature": 0.1, "precision": "auto"},
    "margin": {"margin": 0.2, "precision": "auto"},
    "listwise": {"temperature": 0.1, "grades": "share"},
}
WITH_LOG_Q = ("softmax", "bce", "softmax_bce", "bsl", "bpr", "margin")
WITH_HARDEST = ("softmax", "bsl", "ccl", "bpr", "margin")
ENCODER_PARAMETERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "heads": {"heads": 8, "fastest": 1.5, "slowest": 0.02},
    "gru": {"layers": 1},
    "cnn": {"layers": 2, "width": 3},
    "transformer": {"layers": 1, "heads": 2, "positions": "learned", "causal": True},
    "attention": {"heads": 4},
    "hierarchical": {"segment": 8, "over": "gru"},
    "routing": {"interests": 4, "iterations": 3},
    "self_attention": {"interests": 4},
}
FEATURE_KINDS = ("id", "category", "number", "bag", "cross", "time", "sequence", "text", "vector")


def build_loss(**settings: Any) -> LossConfig:
    """Return the loss that settings, written as in a config, describe."""
    return validate(Loss, settings, "loss")
