"""Every setting of the system: loaded from YAML, overridden by key=value, saved beside every artefact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from trec_twotower.config.schema import HISTORY, FeatureSpec, Schema, Seed, Settings, Side, TableSpec
from trec_twotower.config.yaml_io import parse_yaml, read_yaml
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.storage.package_files import shipped_configs

Model = TypeVar("Model", bound=BaseModel)


def _plain(place: Any) -> Any:
    return str(place) if isinstance(place, Path) else place


class FollowConfig(Settings):
    """Files that appear in train/ while a run goes on, each of which it reads once."""

    poll_s: PositiveFloat = 10.0  # seconds between looks for new files, while it waits for some
    idle_s: NonNegativeFloat | None = None  # a run ends that has waited so long; 0: at once; default: never


class DataConfig(Settings):
    """What is read, and in which order."""

    dataset: Annotated[str, BeforeValidator(_plain)]  # the folder that `prepare` wrote, or a URL that fsspec knows
    rows: Literal["event", "user"] = "event"  # user: a row holds all of a user's positives (of train_users/, if there)
    batch_size: PositiveInt = 4096  # rows a step, over all ranks together
    seed: Seed = 0  # of the order, the split of a user's items and the samples
    shuffle_rows: PositiveInt = 1 << 19  # rows that are permuted together; memory grows with it
    # rows: user - how much of a user's items is input; 0: all are asked for, as where users are known by their id.
    input_share: float = Field(default=0.5, ge=0, lt=1)
    threads: NonNegativeInt = 1  # that read, hash and make batches ahead; 0: the trainer's own, in between
    prefetch: PositiveInt | None = None  # batches made ahead of the trainer; null: 32, or fewer of large ones
    cache: Path | None = None  # a folder for hashed rows, which later epochs read in place of Parquet, and catalogues
    cache_gb: PositiveFloat = 50.0  # the most that folder may hold
    # The item that a row asks for, in its own history: kept (where things are taken again), left out, or an error.
    own_item: Literal["keep", "drop", "refuse"] = "keep"
    drop_last: bool = False  # leave out an epoch's last rows, where they are no whole batch
    follow: FollowConfig | None = None  # train on a folder that grows: no epochs, and no cache of what is read once

    @model_validator(mode="after")
    def _own_item_stands_in_histories(self) -> Self:
        if self.own_item != "keep" and self.rows == "user":
            raise ValueError(
                f"data.own_item is {self.own_item}, but with data.rows: user a history is drawn apart from what is "
                "asked for: leave it out."
            )
        return self


class GatingConfig(Settings):
    """Weights of features, made of them."""

    reduction: PositiveInt = 2  # the layer between is so many times narrower than there are features
    by: tuple[str, ...] = ()  # features that alone decide the weights; default: the mean of each


class ExpertsConfig(Settings):
    """Layers side by side in place of one, among which each row's router chooses."""

    count: int = Field(ge=2)
    width: PositiveInt
    top: PositiveInt | None = None  # only so many count for a row, those of the highest weights; default: all
    balance: NonNegativeFloat = 0.01  # with top: weight of what is added to the loss where experts are used unevenly

    @model_validator(mode="after")
    def _some_are_left_out(self) -> Self:
        if self.top is not None and self.top >= self.count:
            raise ValueError(f"experts.top is {self.top} of {self.count} experts: choose fewer, or leave it out.")
        return self


class TowerConfig(Settings):
    """A multi-layer perceptron from the features to the vector."""

    combine: Literal["concat", "sum"] = "concat"  # of the features' vectors; sum: all are of one dim, none a number
    mlp: tuple[PositiveInt, ...] = ()  # widths of the hidden layers, each with ReLU
    project: bool = True  # a last linear layer to model.dim; false: the features' width must be model.dim
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the features that enter
    # Of a feature: the share of rows in which it is zero in training, as it is of what is new.
    drop: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    missing: tuple[str, ...] | None = None  # features with a learned vector where they are zero: dropped, or not there
    unit: tuple[str, ...] = ()  # features that together have length 1 among the others, as each side has under cosine
    gating: GatingConfig | None = None  # a weight for each feature
    crosses: NonNegativeInt = 0  # learned crosses of the features (DCN-v2), one degree more each
    short: tuple[str, ...] = ()  # features of the short term, met with all others by a learned gate
    wide: tuple[str, ...] = ()  # features of model.dim that are also added to the vector, past all layers
    experts: ExpertsConfig | None = None  # before mlp

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.combine == "sum" and (self.crosses or self.short):
            found = "short" if self.short else "crosses"
            raise ValueError(f"{found} wants the features side by side, but combine is sum: set it to concat.")
        return self

    def widths(self, widths: Sequence[int], dim: int) -> list[int]:
        """What stands behind each part that changes the width: the last is what leaves the hidden layers."""
        width = widths[0] if self.combine == "sum" else sum(widths)
        width = dim if self.short else width
        width = self.experts.width if self.experts is not None else width
        return [width, *self.mlp]


class ModelConfig(Settings):
    """Both towers and how their vectors meet."""

    dim: PositiveInt = 64
    user_tower: TowerConfig = TowerConfig()
    item_tower: TowerConfig = TowerConfig()
    similarity: Literal["cosine", "dot"] = "cosine"
    user_vector: Literal["gaussian"] | None = None  # a mean and a variance for each number; default: a point

    @property
    def vector_dim(self) -> int:
        """Numbers of the vectors that are scored, exported and indexed."""
        return self.dim if self.user_vector is None else 2 * self.dim


class SameConfig(Settings):
    """Items of the positives' own categories."""

    feature: str  # an item feature with one id a row
    count: PositiveInt  # positives drawn a step, over all ranks; each brings an item of its category


class PopularConfig(Settings):
    """Items by how often they were taken, drawn beside those of loss.negatives.sampled."""

    count: PositiveInt  # drawn from the catalogue a step, over all ranks
    power: NonNegativeFloat = 0.75  # an item taken n times is drawn in proportion to n ** power


class MinedConfig(Settings):
    """Items that a file names for each item or user."""

    file: Path  # Parquet: the key's column, each id once, and `negatives`, a list of item ids
    key: Literal["item_id", "user_id"] = "item_id"  # item_id: of the row's positives
    count: PositiveInt  # drawn from its list for each row
    shared: bool = True  # what one row brings also stands against the others that do not know it
    unknown: Literal["error", "skip"] = "error"  # what becomes of items that are not in the catalogue


class RefreshConfig(Settings):
    """Neighbours of the positives among the items' vectors, found anew as the model changes."""

    every: PositiveInt  # steps
    ranks: tuple[PositiveInt, PositiveInt] = (50, 500)  # which neighbours; the nearest other item is the first
    count: PositiveInt  # drawn for each row
    shared: bool = True  # what one row brings also stands against the others that do not know it

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(
                f"loss.negatives.refresh.ranks is {list(self.ranks)}: name the nearest first, such as [50, 500]."
            )
        return self


class HardestConfig(Settings):
    """More weight for the negatives of a row that score highest; a number alone is the count."""

    count: PositiveInt  # negatives of a row with weight 1
    others: float = Field(default=0.1, ge=0, le=1)  # weight of each of the other negatives

    @model_validator(mode="after")
    def _pushes_all(self) -> Self:
        if self.others == 0:
            raise ValueError(
                "loss.negatives.hardest.others is 0: items that are not among the hardest would only be pulled toward "
                "users, and all vectors would collapse to one direction. Set it above 0, such as 0.1, the default."
            )
        return self


def _counted(value: Any) -> Any:
    """32 -> {"count": 32}; raises ValueError for what is neither a number nor a group of settings."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return {"count": value}
    if not isinstance(value, dict | HardestConfig):
        raise ValueError(
            f"loss.negatives.hardest is {value!r}: set it to a number of negatives, such as 32, or to {{count: 32, "
            "others: 0.1}."
        )
    return value


class NegativesConfig(Settings):
    """Where the items that a user did not take come from; all of them form one set of candidates."""

    in_batch: bool = True  # the other rows' positives, over all ranks
    sampled: NonNegativeInt | Literal["all"] = 0  # drawn from the catalogue a step, over all ranks
    power: NonNegativeFloat = 0.0  # an item taken n times is drawn in proportion to n ** power; 0: evenly
    popular: PopularConfig | None = None
    same: SameConfig | None = None
    mined: MinedConfig | None = None
    refresh: RefreshConfig | None = None
    queue: NonNegativeInt = 0  # candidates of earlier steps that are negatives too, with their vectors of then
    hardest: Annotated[HardestConfig, BeforeValidator(_counted)] | None = None  # that count more than the others

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        beside = [name for name in ("popular", "same", "mined", "refresh", "queue") if getattr(self, name)]
        if self.sampled == "all" and (beside or self.power):
            raise ValueError(
                "loss.negatives.sampled is all, so every item is a candidate already: take "
                f"{', '.join(beside or ['power'])} out, or set sampled to a count."
            )
        if self.power and not self.sampled:
            raise ValueError(
                f"loss.negatives.power is {self.power:g}, but nothing is drawn by it: set loss.negatives.sampled."
            )
        return self


class GivenConfig(Settings):
    """Items that a train row itself names beside its positives: impressions, hard negatives, graded lists."""

    column: str  # of train/: a list of item ids, empty or null where there are none
    labels: str | None = None  # of train/: as long; 0: refused, above: taken, or a grade; default: all are refused
    weights: str | None = None  # of train/: as long; default: 1 (of bce and listwise)
    shared: bool = True  # what one row refused also stands against the others that do not know it
    unknown: Literal["error", "skip"] = "error"  # what becomes of items that are not in the catalogue


class LearnedTemperature(Settings):
    """A temperature that is fitted with the towers and stays between two bounds."""

    learned: Literal[True]
    start: PositiveFloat = 0.1
    low: PositiveFloat = 0.01
    high: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _starts_within(self) -> Self:
        if not self.low < self.start < self.high:
            raise ValueError(
                f"loss.temperature starts at {self.start:g}, which is not between low = {self.low:g} and high = "
                f"{self.high:g}: a learned temperature stays between them."
            )
        return self


# The names of the choices begin with |, so that messages about a value leave them out of its place.
_NumberOrLearned = Annotated[
    Annotated[PositiveFloat, Tag("|number")] | Annotated[LearnedTemperature, Tag("|learned")],
    Discriminator(lambda value: "|learned" if isinstance(value, dict | LearnedTemperature) else "|number"),
]


class RegulariseConfig(Settings):
    """Weights of what is added to the loss, per row; 0: none of it."""

    norm: NonNegativeFloat = 0.0  # mean squared length of the users' vectors and of the candidates'
    alignment: NonNegativeFloat = 0.0  # squared distance of positives
    uniformity: NonNegativeFloat = 0.0  # log of the mean of exp(-2 squared distance), of users and of candidates


Precision = Literal["auto", "fp32", "bf16"]  # auto: bf16 where the hardware multiplies such numbers faster


# What each loss can be told, and the values it has where a config says nothing.
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


class InterestsConfig(Settings):
    """How several vectors of a user are trained; see model/interests.py."""

    # max: an item's score is the highest by any of them, for positives and negatives, as in search; costs a product of
    # rows and candidates for each. attention: of the row's positive, and one mean of the vectors meets all items.
    score: Literal["max", "attention"] = "max"
    sharpness: PositiveFloat = 10.0  # attention: the mean's weights are softmax(sharpness * score of the positive)
    diversity: NonNegativeFloat = 0.1  # weight of what is added to the loss where a user's vectors are alike


CORRECTED = ("softmax", "bce", "softmax_bce", "bsl", "bpr", "margin")  # the losses that log_q is for
GRADUAL = ("bce", "softmax_bce")  # the losses that take a given label as a share, from 0 to 1
SELECTIVE = ("softmax", "bsl", "ccl", "bpr", "margin")  # the losses that may give hardest negatives more weight


class LossConfig(Settings):
    """What tells a row's positives from the candidates; see model/losses for the formulas."""

    kind: Literal["softmax", "bce", "softmax_bce", "bsl", "ccl", "bpr", "margin", "listwise"] = "softmax"
    # One of LOSS_PARAMETERS each; null where the loss has no such parameter.
    temperature: _NumberOrLearned | None = None  # scores are divided by it; {learned: true, start, low, high}: fitted
    # Of the gradients' products; logits stay fp32, but with bf16_logits, which makes the negatives' of bf16, too.
    precision: Literal["auto", "fp32", "bf16", "bf16_logits"] | None = None
    softmax_share: float | None = Field(default=None, ge=0, le=1)  # softmax_bce: of softmax; the rest is bce
    negative_weight: PositiveFloat | None = None  # bce, ccl: of all negatives of a row together
    temperature_ratio: PositiveFloat | None = None  # bsl: the positives' temperature over the negatives'
    margin: float | None = Field(default=None, ge=-1)  # ccl: above which a negative costs; margin: the wanted lead
    grades: Literal["share", "softmax"] | None = None  # listwise: what is made of a list's labels
    log_q: float = Field(default=1.0, ge=0, le=1)  # strength of the correction for how often an item is a candidate
    log_q_estimate: Literal["exact", "streaming"] = "exact"  # streaming: by how often it was one up to now
    positive_power: NonNegativeFloat = 1.0  # a row of n positives gives each the weight n ** -positive_power
    mask_history: bool = True  # items of the row's history are not its negatives
    known: Path | None = None  # Parquet of user_id and item_ids: further items that are not its negatives
    negatives: NegativesConfig = NegativesConfig()
    given: GivenConfig | None = None
    regularise: RegulariseConfig = RegulariseConfig()
    interests: InterestsConfig | None = None  # of a sequence whose encoder has interests; default: as there

    @property
    def parameters(self) -> dict[str, Any]:
        """What the loss function is to be told, by name."""
        return {name: getattr(self, name) for name in LOSS_PARAMETERS[self.kind]}

    @property
    def has_other_negatives(self) -> bool:
        """Whether there are negatives beside the other rows' positives, or none are needed."""
        others = self.negatives
        drawn = (others.sampled, others.popular, others.same, others.mined, self.given)
        return any(each is not None and each != 0 for each in drawn)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "softmax")
        if not isinstance(kind, str) or kind not in LOSS_PARAMETERS:
            return values  # whose kind is then refused
        known = {**LOSS_PARAMETERS[kind], "log_q": 1.0 if kind in CORRECTED else 0.0}
        return {**values, **{name: value for name, value in known.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for name in sorted({name for parameters in LOSS_PARAMETERS.values() for name in parameters}):
            if name not in LOSS_PARAMETERS[self.kind] and getattr(self, name) is not None:
                others = ", ".join(kind for kind, parameters in LOSS_PARAMETERS.items() if name in parameters)
                raise ValueError(
                    f"loss.{name} is set, but loss.kind {self.kind} has no {name} (it belongs to {others}): leave it "
                    f"out (loss.{name}=null), or choose another kind."
                )
        if self.kind not in CORRECTED and self.log_q:
            raise ValueError(
                f"loss.log_q is {self.log_q:g}, but loss.kind {self.kind} takes no correction: leave it out, or choose "
                f"{', '.join(CORRECTED)}."
            )
        if self.log_q_estimate == "streaming" and not self.log_q:
            raise ValueError(
                "loss.log_q_estimate is streaming, but loss.log_q is 0, so nothing is corrected by it: leave it out, "
                "or set loss.log_q."
            )
        if self.negatives.hardest is not None and self.kind not in SELECTIVE:
            raise ValueError(
                f"loss.negatives.hardest is set, but loss.kind {self.kind} weighs all negatives of a row (those that "
                f"select are {', '.join(SELECTIVE)}): leave it out, or choose another kind."
            )
        if self.kind == "ccl" and self.margin is not None and self.margin >= 1:
            raise ValueError(
                f"loss.margin is {self.margin:g}, but no cosine is above 1, so no negative would ever count in ccl: "
                "choose one below 1."
            )
        if self.kind == "margin" and self.margin is not None and self.margin <= 0:
            raise ValueError(
                f"loss.margin is {self.margin:g}: equal vectors would cost nothing; choose a lead above 0."
            )
        return self

    @model_validator(mode="after")
    def _has_something_to_tell_apart(self) -> Self:
        if self.kind == "listwise":
            if self.given is None or self.given.labels is None:
                raise ValueError(
                    "loss.kind is listwise, which ranks a row's graded list, but loss.given names no column of labels: "
                    "set loss.given.column and loss.given.labels, or choose another kind."
                )
            if unused := [name for name in ("popular", "same", "queue") if getattr(self.negatives, name)]:
                raise ValueError(
                    "loss.kind is listwise, which looks at a row's own list alone, but loss.negatives has "
                    f"{', '.join(unused)}: take that out, or choose another kind."
                )
        elif not self.negatives.in_batch and not self.has_other_negatives:
            raise ValueError(
                "loss.negatives has in_batch: false and sampled: 0, so nothing is left to tell a positive from: "
                "set in_batch: true, or sampled to a count or all (or popular, same, mined, or loss.given)."
            )
        return self


RateSchedule = Literal["constant", "linear", "cosine"]


class OptimizerConfig(Settings):
    """Fused updates of the tables, and Adam for everything else."""

    # The last three on GPU alone: fbgemm has them for no other device.
    sparse: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.05  # of the tables
    eps: PositiveFloat = 1e-8  # of the tables' Adagrad or Adam
    weight_decay: NonNegativeFloat = 0.0  # of the rows a step looks up; adam, partial_rowwise_adam and lamb have it
    dense_lr: PositiveFloat = 1e-3
    dense_weight_decay: NonNegativeFloat = 0.0  # of the layers' matrices, decoupled (AdamW)
    clip_norm: PositiveFloat | None = None  # the most that the gradient of all but the tables may measure
    warmup_steps: NonNegativeInt = 0  # the rates rise linearly over them
    schedule: RateSchedule = "constant"  # the others: to a fiftieth at the end
    dense_warmup_steps: NonNegativeInt | None = None  # default: as the tables
    dense_schedule: RateSchedule | None = None  # default: as the tables
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay a step of averaged towers, to evaluate and export

    @model_validator(mode="after")
    def _decays_what_decays(self) -> Self:
        if self.weight_decay and self.sparse not in GPU_OPTIMIZERS:
            raise ValueError(
                f"train.optimizer.weight_decay is {self.weight_decay:g}, but fbgemm's {self.sparse} has no weight "
                f"decay: set it to 0 (dense_weight_decay is that of the layers), or take {', '.join(GPU_OPTIMIZERS)}."
            )
        return self


GPU_OPTIMIZERS = ("adam", "partial_rowwise_adam", "lamb")  # of tables


class SpectralStart(Settings):
    """The closed form of spectral.py as the weights of a history's table and of the item's."""

    at: Literal["start", "end"] = "start"  # end: beside what all other features were trained to, without these two
    history: str  # the user's bag of items
    item: str = "item_id"  # the item's id
    user_power: NonNegativeFloat = 0.4  # how much users with many items count for less
    item_power: NonNegativeFloat = 0.4  # the same of popular items
    history_power: NonNegativeFloat = 0.3  # how much less a popular item says of a user
    length_power: float = 0.3  # how much higher a popular item scores
    spectrum_power: NonNegativeFloat = 0.3  # weight of strong directions; 0: all alike
    spread: PositiveFloat | None = None  # standard deviation of its scores, users by items; default: as it comes
    oversampling: PositiveInt = 64  # directions beyond the tables' dim that the search keeps
    iterations: PositiveInt = 2


class TrainConfig(Settings):
    """How long, how, and how often one looks."""

    epochs: NonNegativeInt = 10  # 0: the first weights, as they are
    seed: Seed = 0  # of the first weights
    start: SpectralStart | None = None  # default: small random weights
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "auto"  # of the towers' products; weights, vectors and logits are fp32
    micro_batch: PositiveInt | None = None  # rows that the towers take at a time, and again in the backward pass
    pipeline: Literal["plain", "sparse_dist"] = "plain"  # sparse_dist: the next batch travels during a step
    compile: bool = False  # the towers, by torch.compile
    profile_steps: NonNegativeInt = 0  # steps to trace, after a few to warm up, into RUN/profile
    log_every: PositiveInt = 20  # steps
    evaluate_every: PositiveInt | None = None  # steps; default: after each epoch
    timeout_s: PositiveInt = 300  # a collective that takes longer, as where a rank hangs, ends the job
    first_timeout_s: PositiveInt = 900  # the same until the first step is done: ranks start and load unevenly
    max_failures: PositiveInt = 5  # after dying so often in a row without a new checkpoint, a run refuses to start
    threads: NonNegativeInt = 0  # of torch on a rank; 0: OMP_NUM_THREADS, or the cores divided by the ranks
    # auto: the GPUs of this machine, the CPU where there is none; a GPU that torch cannot use is an error.
    device: Literal["auto", "cpu", "cuda"] = "auto"


class CheckpointConfig(Settings):
    every: PositiveInt | None = None  # steps; default: after each epoch
    keep: int = Field(default=2, ge=2)  # the newest so many stay, and the best: one may turn out damaged
    in_background: bool = True  # training goes on when a rank's shards are copied; costs memory for that copy


METRICS = ("recall", "ndcg", "hit", "mrr", "map", "precision")  # of one user's ranking, each at every evaluate.k
SLICES = ("tail", "popularity", "activity")  # beside user.COLUMN and item.COLUMN


class EvaluateConfig(Settings):
    k: tuple[PositiveInt, ...] = (10, 20, 50)
    best: str = "recall@20"  # the validation metric that chooses the best step
    users: PositiveInt | None = None  # during training: a seeded sample of so many; default: all
    block: PositiveInt = 1024  # users scored together
    # Items of a row's history are left out of its ranking: all, none, or all but those to find. `recommend` and
    # `serve`, which look for no item, leave out all of them unless this is false.
    exclude_seen: bool | Literal["except_target"] = True
    # What `evaluate` reports beside the metrics; training measures none of it.
    slices: tuple[str, ...] = SLICES
    item_to_item: bool = True  # the baseline of items that were taken together
    svd: int = Field(default=64, ge=0)  # dim of the baseline of two towers in closed form (spectral.py); 0: without
    bootstrap: int = Field(default=1000, ge=0)  # resamples of the users, for intervals; 0: no intervals
    # Metrics over so many drawn items a positive, as papers give them, beside those over the whole catalogue
    sampled: int = Field(default=0, ge=0)  # 0: none
    sampled_same: str | None = None  # also drawn from items that are the positive's like in this column of items/

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        known = [f"{name}@{k}" for k in self.k for name in METRICS]
        if self.best not in known:
            raise ValueError(f"evaluate.best is {self.best!r}, which is not measured{nearest(self.best, known)}.")
        return self

    @property
    def best_label(self) -> str:
        """The metric `best` and what it excludes: values under different labels are not comparable."""
        if self.exclude_seen is True:
            return self.best
        return f"{self.best}, exclude_seen {str(self.exclude_seen).lower()}"

    @model_validator(mode="after")
    def _same_is_of_a_sample(self) -> Self:
        if self.sampled_same is not None and not self.sampled:
            raise ValueError(
                f"evaluate.sampled_same is {self.sampled_same!r}, but no negatives are drawn: set evaluate.sampled = "
                "100 or so (evaluate --sampled 100), or leave sampled_same out."
            )
        return self

    @model_validator(mode="after")
    def _slices_are_known(self) -> Self:
        for name in self.slices:
            side, dot, column = name.partition(".")
            if name not in SLICES and not (side in ("user", "item") and dot and column):
                known = [*SLICES, "user.COLUMN", "item.COLUMN"]
                raise ValueError(
                    f"evaluate.slices names {name!r}{nearest(name, known)}: give any of {', '.join(known)}."
                )
        return self


class IndexConfig(Settings):
    target_recall: float = Field(default=0.99, gt=0, le=1)  # of exact search's best k, on held-out users
    k: PositiveInt = 100
    memory_gb: PositiveFloat | None = None  # the most that the index may take; default: no bound
    factory: str | None = None  # FAISS's own words for an index, such as IVF1024,SQfp16; default: by the above
    lists: PositiveInt | None = None  # default: by the size of the catalogue
    shards: PositiveInt | None = None  # indexes that share the items; default: by their size
    max_train_vectors: PositiveInt | None = None  # which bounds lists; default: 48 a list, and 65,536 for codes
    tune_users: PositiveInt = 4096
    seed: Seed = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    blas_batch: PositiveInt = 4  # least batch of users that exact search scores by BLAS, smaller ones by FAISS's loop

    @model_validator(mode="before")
    @classmethod
    def _without_latency(cls, values: Any) -> Any:
        """Configs saved by earlier versions have `latency: online`, which is what is built now."""
        if isinstance(values, dict) and "latency" in values:
            if values["latency"] != "online":
                raise ValueError(
                    f"index.latency is {values['latency']!r}, but the setting was removed: its other kind of index "
                    "took many times as long to build and was slower in batches, too. Leave latency out."
                )
            values = {name: value for name, value in values.items() if name != "latency"}
        return values

    @model_validator(mode="after")
    def _factory_says_it_all(self) -> Self:
        given = [name for name in ("lists", "memory_gb") if getattr(self, name) is not None]
        if self.factory is not None and given:
            raise ValueError(
                f"index.factory is {self.factory!r}, which leaves nothing to choose, but index.{given[0]} is given, "
                "too: leave one of them out."
            )
        return self


TRAINED = "trained"  # in a run's folder: the run that was trained before a closed form was set beside it


class RunConfig(Settings):
    """One run, whole: what `train` takes and every later stage finds beside the run's artefacts."""

    data: DataConfig
    tables: dict[str, TableSpec] = Field(default_factory=dict)
    user: tuple[FeatureSpec, ...]
    item: tuple[FeatureSpec, ...]
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    index: IndexConfig = IndexConfig()
    run_dir: Path | None = None  # default: runs/NAME for configs/NAME.yaml

    @property
    def feature_schema(self) -> Schema:
        return Schema.build(self.tables, self.user, self.item)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        schema = self.feature_schema
        sides: list[tuple[Side, TowerConfig]] = [("user", self.model.user_tower), ("item", self.model.item_tower)]
        for side, tower in sides:
            widths = schema.widths(side)
            if tower.combine == "sum" and (len(set(widths)) > 1 or schema.numbers(side)):
                numbers = ", numbers among them" if schema.numbers(side) else ""
                raise ValueError(
                    f"model.{side}_tower.combine is sum, but the {side} features are {list(widths)} wide{numbers}: "
                    "give all tables one dim and let numbers have bins, or set combine: concat."
                )
            if self.train.micro_batch is not None and tower.experts is not None and tower.experts.top is not None:
                raise ValueError(
                    f"model.{side}_tower.experts.top looks at the use of experts in a whole batch, but "
                    "train.micro_batch cuts it: leave one of them out."
                )
            names = [feature.name for feature in schema.features(side)]
            missing, by = tower.missing or (), tower.gating.by if tower.gating else ()
            for name in (*tower.drop, *tower.unit, *tower.short, *tower.wide, *missing, *by):
                if name not in names:
                    raise ValueError(f"model.{side}_tower names the feature {name!r}{nearest(name, names)}.")
            for name in tower.wide:
                width = widths[schema.place(side, name)]
                if width != self.model.dim or name not in schema.parts(side):
                    found = "is a plain number" if name not in schema.parts(side) else f"is {width} wide"
                    raise ValueError(
                        f"model.{side}_tower.wide names {name!r}, which {found}, but is added to a vector of model.dim "
                        f"= {self.model.dim}: give it that dim."
                    )
            if tower.short and set(tower.short) >= set(schema.parts(side)):
                raise ValueError(f"model.{side}_tower.short names all features: leave some for the long term.")
            self._missing_are_zero(side, missing, schema)
            self._dropped_ids_start_at_zero(side, tower.drop, schema)
            last = tower.widths(widths, self.model.dim)[-1]
            if not tower.project and last != self.model.dim:
                raise ValueError(
                    f"model.{side}_tower has project: false, so its last width {last} must be model.dim = "
                    f"{self.model.dim}: change the dims, or set project: true."
                )
        self._user_vectors_fit(schema)
        self._inputs_are_drawn(schema)
        if self.ends_in_closed_form:
            self._closed_form_stands_alone(schema)
        if self.data.follow is not None:
            for name in ("schedule", "dense_schedule"):
                schedule = getattr(self.train.optimizer, name)
                if schedule not in ("constant", None):
                    raise ValueError(
                        f"train.optimizer.{name} is {schedule!r}, which needs to know the last step, "
                        "but with data.follow there is none: set it to constant, or take data.follow out."
                    )
            if self.train.pipeline != "plain":
                raise ValueError(
                    f"train.pipeline is {self.train.pipeline!r}, which takes batches ahead of the step, but with "
                    "data.follow the next rows may take hours to come: set it to plain, or take data.follow out."
                )
        if self.loss.negatives.refresh is not None and self.train.pipeline != "plain":
            raise ValueError(
                f"train.pipeline is {self.train.pipeline!r}, which takes batches ahead of the step, but those behind a "
                "refresh (loss.negatives.refresh) depend on all steps before it: set it to plain."
            )
        if self.data.batch_size < 2 and not self.loss.has_other_negatives:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}, but in-batch negatives need at least 2 rows: "
                "raise it, or set loss.negatives.sampled."
            )
        if (same := self.loss.negatives.same) is not None:
            kinds = {feature.name: feature.kind for feature in self.item}
            if kinds.get(same.feature) not in ("id", "category"):
                found = f"is a {kinds[same.feature]}" if same.feature in kinds else "is none of `item`"
                raise ValueError(
                    f"loss.negatives.same.feature is {same.feature!r}, which {found}"
                    f"{nearest(same.feature, kinds) if same.feature not in kinds else ''}: name an item feature with "
                    "one id a row (kind category or id)."
                )
        regularise = self.loss.regularise
        needs = {"loss.kind ccl": self.loss.kind == "ccl", "loss.regularise.alignment": regularise.alignment,
                 "loss.regularise.uniformity": regularise.uniformity}  # fmt: skip
        for name, is_wanted in needs.items():
            if is_wanted and self.model.similarity != "cosine":
                raise ValueError(
                    f"{name} is defined for vectors of length 1, but model.similarity is {self.model.similarity}: set "
                    "it to cosine, or do without."
                )
        return self

    @staticmethod
    def _missing_are_zero(side: Side, names: Sequence[str], schema: Schema) -> None:
        """A feature that is not there must be told by its zeros."""
        for feature in schema.features(side):
            if feature.name not in names:
                continue
            if feature in schema.numbers(side):
                raise ValueError(
                    f"model.{side}_tower.missing names {feature.name!r}, a number, which says itself where it is null: "
                    "leave it out."
                )
            scale = schema.table_of(feature).start_scale if feature.is_sparse else 0
            if feature.kind in ("id", "category", "cross") and scale > 0:
                raise ValueError(
                    f"model.{side}_tower.missing names {feature.name!r}, but its table {feature.table_name!r} starts "
                    f"within ±{scale:.3g}, so that ids which no row has trained are not zero: set "
                    f"tables.{feature.table_name}.init_scale: 0."
                )

    @staticmethod
    def _dropped_ids_start_at_zero(side: Side, drop: Mapping[str, float], schema: Schema) -> None:
        """An id that is dropped is zero in training: so must one be that training never saw."""
        for feature in schema.features(side):
            if feature.kind != "id" or not drop.get(feature.name):
                continue
            table = feature.table_name
            if (scale := schema.tables[table].start_scale) > 0:
                shares = any(each.table_name == table for each in (*schema.user, *schema.item) if each is not feature)
                own = f"give it a table of its own (others look up {table!r}, too) with" if shares else "set"
                raise ValueError(
                    f"model.{side}_tower.drop names the id {feature.name!r}, whose table {table!r} starts within "
                    f"±{scale:.3g}: the tower learns to do without an id that is zero, but a new one would be noise; "
                    f"{own} init_scale: 0 under `tables`, and name {feature.name!r} under missing, too."
                )

    def _inputs_are_drawn(self, schema: Schema) -> None:
        """Where all of a user's items are asked for, none is left to tell them by."""
        if self.data.rows != "user" or self.data.input_share:
            return
        filled = {self.train.start.history} if self.train.start is not None and self.ends_in_closed_form else set()
        for feature in schema.features("user"):
            if feature.reads == HISTORY and feature.name not in filled:
                raise ValueError(
                    f"data.input_share is 0, so that all of a user's items are asked for, but user feature "
                    f"{feature.name!r} is made of the rest, of which there is none: raise input_share, or take the "
                    "feature out."
                )

    @property
    def ends_in_closed_form(self) -> bool:
        return self.train.start is not None and self.train.start.at == "end"

    def _closed_form_stands_alone(self, schema: Schema) -> None:
        """The two parts of a vector add up to a score only where nothing comes between."""
        assert self.train.start is not None
        closed = {"user": self.train.start.history, "item": self.train.start.item}
        towers = {"user": self.model.user_tower, "item": self.model.item_tower}
        wrong = {"data.follow is set": self.data.follow, "model.user_vector is set": self.model.user_vector,
                 f"model.similarity is {self.model.similarity}": self.model.similarity != "dot"}  # fmt: skip
        for side, tower in towers.items():
            parts = ("project", "mlp", "gating", "crosses", "short", "experts")
            between = {name: getattr(tower, name) for name in parts}
            between["combine: sum"] = tower.combine == "sum"
            wrong |= {f"model.{side}_tower has {name}": value for name, value in between.items()}
            names = [feature.name for feature in schema.features("user" if side == "user" else "item")]
            wrong[f"there is no other {side} feature to train"] = names == [closed[side]]
            used = {*tower.drop, *(tower.missing or ()), *tower.unit}
            wrong[f"model.{side}_tower names {closed[side]!r} under drop, missing or unit"] = closed[side] in used
        for found, is_so in wrong.items():
            if is_so:
                raise ValueError(
                    f"train.start.at is end, which sets a closed form beside what was trained, one dot product for "
                    f"both, but {found}: set similarity: dot and project: false, with nothing after the features, or "
                    "at: start."
                )

    @property
    def without_closed_form(self) -> RunConfig:
        """What is trained before the closed form is set beside it (`train.start.at: end`), in RUN/trained."""
        start, schema = self.train.start, self.feature_schema
        assert start is not None
        user = tuple(feature for feature in self.user if feature.name != start.history)
        item = tuple(feature for feature in self.item if feature.name != start.item)
        left = {feature.table for feature in (*user, *item)}
        [closed] = [feature for feature in schema.sparse("item") if feature.name == start.item]
        values = as_values(self)
        values["user"], values["item"] = [as_values(each) for each in user], [as_values(each) for each in item]
        values["tables"] = {name: as_values(table) for name, table in self.tables.items() if name in left}
        values["model"]["dim"] -= schema.table_of(closed).dim
        values["train"]["start"] = None
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir / TRAINED)
        return validate(RunConfig, values, "what is trained beside the closed form of train.start")

    def _user_vectors_fit(self, schema: Schema) -> None:
        """Several vectors of a user, and Gaussian ones."""
        several, factory = schema.several, self.index.factory
        if several is None and self.loss.interests is not None:
            raise ValueError(
                "loss.interests is set, but no user feature makes several vectors of a user: give a sequence the "
                "encoder routing or self_attention, or leave it out."
            )
        if self.model.user_vector == "gaussian":
            wrong = {
                f"user feature {several.name if several else ''!r} makes several vectors of a user": several,
                "model.user_tower has project: false": not self.model.user_tower.project,
                "model.user_tower has wide features": self.model.user_tower.wide,
                "loss.kind is ccl": self.loss.kind == "ccl",
                "loss.regularise.alignment is set": self.loss.regularise.alignment,
                "loss.regularise.uniformity is set": self.loss.regularise.uniformity,
            }
            for found, is_so in wrong.items():
                if is_so:
                    raise ValueError(
                        f"model.user_vector is gaussian, but {found}, which cannot be together: take one of the "
                        "two out."
                    )
        by_attention = self.loss.interests is not None and self.loss.interests.score == "attention"
        if by_attention and self.data.rows == "user":
            raise ValueError(
                "loss.interests.score is attention, of a row's one positive, but data.rows: user gives it several: set "
                "it to max."
            )
        if several is None or factory is None:
            return
        scales = "L2norm" in factory and self.model.similarity == "dot"
        if scales or "LSH" in factory or "ITQ" in factory:
            why = "divides each vector's scores by its own length" if scales else "counts bits instead of scores"
            raise ValueError(
                f"index.factory {factory!r} {why}, but user feature {several.name!r} makes "
                f"{several.encoding.interests} vectors of a user, whose lists are merged by score: leave factory out, "
                "or take one of inner products, such as IVF1024,SQfp16."
            )


# ---------------------------------------------------------------- load, override, check


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the config of a YAML file with `key.part=value` overrides; raises ConfigError.

    Where there is no such file, the name of a shipped config is enough: `gowalla` or `configs/gowalla.yaml`.
    """
    path = _config_file(Path(path))
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections such as data, user, item and model.")
    values = apply_overrides(values, overrides)
    if values.get("run_dir") is None:
        values["run_dir"] = f"runs/{path.stem}"
    config = validate(RunConfig, values, str(path))
    for feature in (*config.user, *config.item):
        feature.check_words()  # a saved run has its words, and is opened without the file
    return config


def _config_file(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.suffix in ("", ".yaml") and path.parent in (Path(), Path("configs")) and path.stem in shipped:
        return shipped[path.stem]
    here = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a config file in it, or a shipped config.")
    raise ConfigError(f"There is no config file {path}{nearest(path.name, sorted({*here, *shipped}))}.")


def with_index_settings(config: RunConfig, overrides: Iterable[str]) -> IndexConfig:
    """How a run's index is built, with some `index.key=value` changed; raises ConfigError for any other key."""
    overrides = list(overrides)
    for name in parse_overrides(overrides):
        if not name.startswith("index."):
            known = [f"index.{field}" for field in IndexConfig.model_fields]
            near = nearest(f"index.{name}", known) if f"index.{name}" in known else ""
            raise ConfigError(
                f"{name} is no setting of the index{near}, and the run is trained already: change index settings "
                "alone, such as index.target_recall=0.95."
            )
    return validate(RunConfig, apply_overrides(as_values(config), overrides), "index settings").index


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1"]` -> {"a.b": 1}; the values are read as YAML."""
    if isinstance(overrides, str | Mapping):
        raise ConfigError(f"Overrides are {overrides!r}: give a list of key=value, such as ['train.epochs=3'].")
    parsed = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"{override!r} is not an override: write key=value, such as train.epochs=3.")
        parsed[name] = parse_yaml(text, f"The value of {name}")
    return parsed


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `key.part=value` set; list elements are named by number or by their `name`."""
    result = json.loads(json.dumps(values, default=str))
    for name, value in parse_overrides(overrides).items():
        *parents, last = name.split(".")
        place = result
        for part in parents:
            place = _step_into(place, part, name)
        if isinstance(place, list):
            place[_position(place, last, name)] = value
        else:
            place[last] = value
    return result


def _step_into(place: Any, part: str, name: str) -> Any:
    if isinstance(place, list):
        inner = place[_position(place, part, name)]
    else:
        if place.get(part) is None:
            place[part] = {}
        inner = place[part]
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{name}: {part!r} is {inner!r}, which has no parts to set.")
    return inner


def _position(place: list[Any], part: str, name: str) -> int:
    if part.isdigit() and int(part) < len(place):
        return int(part)
    names = [element.get("name") for element in place if isinstance(element, dict)]
    if part in names:
        return names.index(part)
    raise ConfigError(f"{name}: no element {part!r} in a list of {len(place)}{nearest(part, filter(None, names))}.")


def validate(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """`values` as a `model`; raises ConfigError with one line for each mistake, nearest names included."""
    try:
        return model.model_validate(values)
    except ConfigError:
        raise
    except ValidationError as error:
        lines = [_mistake(model, values, detail) for detail in error.errors()]
        raise ConfigError(f"{origin}: " + "\n  ".join(dict.fromkeys(lines))) from None


def _mistake(model: type[BaseModel], values: Any, detail: Any) -> str:
    parts = [part for part in detail["loc"] if not str(part).startswith("|")]
    place = ".".join(_named(values, parts))
    if detail["type"] == "extra_forbidden":
        *parents, last = parts
        return f"unknown key {place!r}{nearest(str(last), _fields(model, parents))}."
    if detail["type"] == "missing":
        return f"{place!r} is missing: it has no default."
    if detail["type"] in ("value_error", "assertion_error"):
        return str(detail["ctx"]["error"])
    said = "input should be a list" if detail["type"] == "tuple_type" else detail["msg"].replace("Tuple", "List")
    return f"{place!r} is {detail['input']!r}: {said[0].lower()}{said[1:]}."


def _named(values: Any, parts: list[str | int]) -> list[str]:
    """`parts` as overrides have them: elements of lists by their `name`, without pydantic's words for a choice."""
    found = []
    for part in parts:
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
            name = values.get("name") if isinstance(values, dict) else None
            found.append(name if isinstance(name, str) and name else str(part))
        elif isinstance(values, dict):
            values = values.get(part)
            found.append(str(part))
    return found


def _fields(model: Any, path: list[str | int]) -> list[str]:
    """The keys that may stand at `path` below `model`."""
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        else:
            model = settings_in(model)
    model = settings_in(model)
    return list(model.model_fields) if model is not None else []


def settings_in(annotation: Any) -> type[BaseModel] | None:
    """The first group of settings that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := settings_in(part)) is not None), None)


def as_values(config: BaseModel) -> dict[str, Any]:
    """The config as plain values, as they stand in YAML and JSON."""
    return config.model_dump(mode="json")
