"""Settings of the model's parts: embedding tables, sequence encoders, towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trec_twotower.config.base import ByKind, KindSettings, Seed, Settings, Side, refusal, validate
from trec_twotower.errors import ConfigError

Pooling = Literal["sum", "mean", "sqrtn"]
ShardingKind = Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]
Share = Annotated[float, Field(ge=0, lt=1)]


def auto_dim(buckets: int) -> int:
    """Return the width that `dim: auto` gives a table: 6 * buckets ** 1/4 (Wang et al. 2017), a multiple of 4."""
    return 4 * -(-int(6 * buckets**0.25) // 4)


def resolve_auto_dim(values: Any) -> Any:
    """Return the settings with `dim: auto` replaced by the number that `buckets` implies."""
    if not isinstance(values, dict) or values.get("dim") != "auto":
        return values
    buckets = values.get("buckets")
    if not isinstance(buckets, int) or buckets < 1:
        raise refusal("has dim: auto, which is computed from `buckets`, but gives none: write a number")
    return {**values, "dim": auto_dim(buckets)}


class TableSpec(Settings):
    """One embedding table, which any number of features may share."""

    buckets: int = Field(ge=1, le=1 << 32)  # number of rows; ids are hashed into them
    dim: PositiveInt  # number of columns, a multiple of 4 (any for data_parallel); auto: about 6 * buckets ** 1/4
    hashes: Literal[1, 2] = 1  # rows per id; 2: an id is the sum of two rows, so that few ids share both
    sharding: ShardingKind = "auto"  # auto: the planner chooses; row_wise on CPUs of one machine
    shard_columns: PositiveInt | None = None  # columns per shard for column_wise; default: about dim / ranks
    # Where a GPU run keeps the table. fused_uvm: host memory; fused_uvm_caching: host memory with a cache on the GPU.
    kernel: Kernel = "fused"
    cache_share: float | None = Field(default=None, gt=0, lt=1)  # cached share of rows (default 0.2), fused_uvm_caching
    dtype: Literal["fp32", "fp16"] = "fp32"  # type of the weights; pooled sums, gradients and optimizer state are fp32
    # mix: a 64-bit hash; modulo: ids 0..buckets-1 keep one row each, without collisions.
    hashing: Literal["mix", "modulo"] = "mix"
    seed: Seed = 0  # seed of the hash
    init_scale: NonNegativeFloat | None = None  # initial weights are uniform in ±init_scale; default: 1 / sqrt(dim)

    @property
    def start_scale(self) -> float:
        return self.init_scale if self.init_scale is not None else self.dim**-0.5

    @property
    def weight_bytes(self) -> int:
        """Return the size of one weight in bytes."""
        return 2 if self.dtype == "fp16" else 4

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto_dim(cls, values: Any) -> Any:
        return resolve_auto_dim(values)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.hashes == 2 and self.hashing == "modulo":
            raise refusal("has hashes: 2, but hashing: modulo gives every id a row of its own: remove one of them")
        if self.cache_share is not None and self.kernel != "fused_uvm_caching":
            raise refusal(
                f"has cache_share {self.cache_share:g}, but kernel {self.kernel} has no cache: remove it, or set "
                "kernel: fused_uvm_caching"
            )
        if self.shard_columns is not None and (
            self.sharding != "column_wise" or self.shard_columns % 4 or self.dim % self.shard_columns
        ):
            raise refusal(
                f"has shard_columns {self.shard_columns} with sharding {self.sharding} and dim {self.dim}: it belongs "
                "to column_wise, and must be a multiple of 4 that divides dim"
            )
        if self.sharding == "data_parallel" and (self.kernel != "fused" or self.dtype != "fp32"):
            raise refusal(
                f"has sharding data_parallel, a whole fp32 table on every rank without fused kernel, with kernel "
                f"{self.kernel} and dtype {self.dtype}: choose another sharding, or remove these"
            )
        return self


class EncoderSpec(KindSettings):
    """An encoder of the steps of a sequence into a vector; see model/sequence_encoders.py."""

    dropout: Share = 0.0  # share of the numbers of a step's vector that are zero in training

    @property
    def num_vectors(self) -> int:
        """Return the number of vectors per user."""
        return 1

    def check_width(self, dim: int, name: str) -> None:
        """Raise ConfigError if the encoder does not support vectors of width `dim`; `name` is the feature's."""


class MeanEncoderSpec(EncoderSpec):
    kind: Literal["mean"] = "mean"  # mean of the steps


class HeadedEncoderSpec(EncoderSpec):
    """An encoder that splits vectors into heads, each with its own weights or attention."""

    heads: PositiveInt = 1  # number of parts

    def check_width(self, dim: int, name: str) -> None:
        if dim % self.heads:
            raise ConfigError(
                f"user feature {name!r} splits vectors of {dim} numbers into {self.heads} heads: choose a divisor of "
                f"{dim}."
            )


class HeadsEncoderSpec(HeadedEncoderSpec):
    kind: Literal["heads"] = "heads"  # weighted means with learned weights by age, one per part of the vector
    heads: PositiveInt = 8
    fastest: PositiveFloat = 1.5  # initial decrease of the first head's log weights per step of age
    slowest: PositiveFloat = 0.02  # the same of the last head; the heads between decay in equal ratios


class GruEncoderSpec(EncoderSpec):
    kind: Literal["gru"] = "gru"  # last state of a recurrent unit
    layers: PositiveInt = 1  # number of recurrent layers


class CnnEncoderSpec(EncoderSpec):
    kind: Literal["cnn"] = "cnn"  # causal convolutions
    layers: PositiveInt = 2  # number of convolutions
    width: PositiveInt = 3  # number of steps that a filter covers, itself included


class TransformerEncoderSpec(HeadedEncoderSpec):
    kind: Literal["transformer"] = "transformer"  # self-attention blocks
    layers: PositiveInt = 1  # number of self-attention blocks
    heads: PositiveInt = 2
    positions: Literal["learned", "rotary"] = "learned"  # position embedding, counted from the newest step
    causal: bool = True  # a step attends to earlier steps only, and the newest step's output is the result

    def check_width(self, dim: int, name: str) -> None:
        super().check_width(dim, name)
        width = dim // self.heads
        if self.positions == "rotary" and width % 2:
            raise ConfigError(
                f"user feature {name!r} has positions: rotary, which rotates numbers in pairs, but splits vectors of "
                f"{dim} numbers into {self.heads} heads of {width}: choose heads of even width, or positions: learned."
            )


class AttentionEncoderSpec(HeadedEncoderSpec):
    kind: Literal["attention"] = "attention"  # weighted means by learned queries
    heads: PositiveInt = 4


class HierarchicalEncoderSpec(EncoderSpec):
    kind: Literal["hierarchical"] = "hierarchical"  # a recurrent unit over segments, then another encoder over these
    segment: PositiveInt = 8  # number of consecutive steps in a segment
    over: Literal["gru", "transformer"] = "gru"  # kind of the encoder over the segments


class MultiInterestEncoderSpec(EncoderSpec):
    """An encoder that makes several vectors per user, one per interest."""

    interests: int = Field(default=4, ge=2)  # number of vectors per user

    @property
    def num_vectors(self) -> int:
        return self.interests


class RoutingEncoderSpec(MultiInterestEncoderSpec):
    kind: Literal["routing"] = "routing"  # several vectors by dynamic routing of steps to interests (MIND)
    iterations: PositiveInt = 3  # number of times that steps are assigned to interests


class SelfAttentionEncoderSpec(MultiInterestEncoderSpec):
    kind: Literal["self_attention"] = "self_attention"  # several vectors by learned queries and positions (ComiRec-SA)


Encoder = Annotated[EncoderSpec, ByKind("mean")]


def build_encoder(**settings: Any) -> EncoderSpec:
    """Return the encoder that settings, written as in a config, describe; raises ConfigError."""
    return validate(Encoder, settings, "encoder")


class GatingConfig(Settings):
    """A learned weight for each feature (squeeze-and-excitation)."""

    reduction: PositiveInt = 2  # number of features divided by the width of the hidden layer
    by: tuple[str, ...] = ()  # features that determine the weights; default: the mean of each feature


class ExpertsConfig(Settings):
    """A mixture of experts: parallel layers in place of one, weighted by a router for each row."""

    count: int = Field(ge=2)  # number of layers
    width: PositiveInt  # width of each layer
    top_k: PositiveInt | None = None  # number of experts of the highest weights that a row uses; default: all
    balance: NonNegativeFloat = 0.01  # weight of the loss term for uneven use of experts, with top_k

    @model_validator(mode="after")
    def _check_top(self) -> Self:
        if self.top_k is not None and self.top_k >= self.count:
            raise refusal(f"has top_k: {self.top_k} of {self.count} experts: choose fewer, or remove it")
        return self


class TowerConfig(Settings):
    """A multi-layer perceptron from the features to the vector."""

    # How features are combined; sum needs features of one width and no plain numbers.
    combine: Literal["concat", "sum"] = "concat"
    mlp: tuple[PositiveInt, ...] = ()  # widths of the hidden layers, each with ReLU
    project: bool = True  # a last linear layer to model.dim; false: the last width must be model.dim
    dropout: Share = 0.0  # share of the input numbers that are zero in training
    feature_dropout: dict[str, Share] = Field(default_factory=dict)  # share of rows where a feature is zero in training
    missing_vectors: tuple[str, ...] | None = None  # features with a learned vector in place of zeros
    unit_length: tuple[str, ...] = ()  # features scaled so that together they have length 1 among the others
    gating: GatingConfig | None = None
    crosses: NonNegativeInt = 0  # number of cross layers (DCN-v2); each raises the degree by one
    short_term: tuple[str, ...] = ()  # short-term features, combined with all others by a learned gate
    wide: tuple[str, ...] = ()  # features of width model.dim that are also added to the output vector
    experts: ExpertsConfig | None = None  # placed before mlp

    @model_validator(mode="after")
    def _check_combine(self) -> Self:
        if self.combine == "sum" and (self.crosses or self.short_term):
            setting = "short_term" if self.short_term else "crosses"
            raise refusal(f"has {setting}, which needs concatenated features, but combine is sum: set it to concat")
        return self

    @property
    def named_features(self) -> tuple[str, ...]:
        """Return the features that the settings name."""
        by = self.gating.by if self.gating is not None else ()
        return (
            *self.feature_dropout,
            *self.unit_length,
            *self.short_term,
            *self.wide,
            *(self.missing_vectors or ()),
            *by,
        )

    def layer_widths(self, input_widths: Sequence[int], dim: int) -> list[int]:
        """Return the width before the hidden layers, then that of each hidden layer."""
        width = input_widths[0] if self.combine == "sum" else sum(input_widths)
        width = dim if self.short_term else width
        width = self.experts.width if self.experts is not None else width
        return [width, *self.mlp]


class ModelConfig(Settings):
    """Both towers and the similarity of their vectors."""

    dim: PositiveInt = 64  # width of both towers' vectors
    user_tower: TowerConfig = TowerConfig()
    item_tower: TowerConfig = TowerConfig()
    similarity: Literal["cosine", "dot"] = "cosine"  # cosine: vectors are scaled to length 1; dot: they are not
    user_vector: Literal["gaussian"] | None = None  # gaussian: a mean and a variance per number; default: a point

    @property
    def towers(self) -> tuple[tuple[Side, TowerConfig], tuple[Side, TowerConfig]]:
        return ("user", self.user_tower), ("item", self.item_tower)

    @property
    def vector_dim(self) -> int:
        """Return the width of the vectors that are scored, exported and indexed."""
        return self.dim if self.user_vector is None else 2 * self.dim
