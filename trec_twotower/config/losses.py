"""Settings of the loss: kind, negatives, impressions, regularization."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from trec_twotower.config.base import ByKind, KindSettings, Settings
from trec_twotower.errors import ConfigError

Unknown = Literal["error", "skip"]  # treatment of items that are not in the catalogue


class SameCategoryConfig(Settings):
    """Negatives from the categories of the positives."""

    feature: str  # an item feature of kind id or category
    count: PositiveInt  # positives drawn per step over all ranks; each adds one item of its category


class PopularConfig(Settings):
    """Negatives drawn by popularity, in addition to loss.negatives.sampled."""

    count: PositiveInt  # draws per step over all ranks
    power: NonNegativeFloat = 0.75  # an item with n interactions is drawn in proportion to n ** power


class MinedConfig(Settings):
    """Negatives that a file lists for each item or user."""

    file: Path  # Parquet with the key column (each id once) and `negatives` (lists of item ids)
    key: Literal["item_id", "user_id"] = "item_id"  # item_id: the lists belong to the row's positive
    count: PositiveInt  # draws per row from its list
    shared: bool = True  # the drawn items are negatives of the other rows, too
    unknown: Unknown = "error"  # skip: items that are not in the catalogue are left out


class RefreshConfig(Settings):
    """Negatives among the positive's nearest items, searched again as the model changes."""

    every: PositiveInt  # steps between searches
    neighbor_range: tuple[PositiveInt, PositiveInt] = (50, 500)  # first and last neighbor; 1 is the nearest other item
    count: PositiveInt  # draws per row
    shared: bool = True  # the drawn items are negatives of the other rows, too

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.neighbor_range[0] > self.neighbor_range[1]:
            raise ConfigError(
                f"loss.negatives.refresh.neighbor_range is {list(self.neighbor_range)}: name the nearest first, such "
                "as [50, 500]."
            )
        return self


class TopKConfig(Settings):
    """More weight for the negatives of a row with the highest logits; a number alone is the count."""

    count: PositiveInt  # negatives of a row with weight 1
    others: float = Field(default=0.1, ge=0, le=1)  # weight of each of the other negatives

    @model_validator(mode="after")
    def _check_others(self) -> Self:
        if self.others == 0:
            raise ConfigError(
                "loss.negatives.top_k.others is 0: items that are not among the hardest would only be pulled toward "
                "users, and all vectors would collapse to one direction. Set it above 0, such as 0.1, the default."
            )
        return self


def _count_as_group(value: Any) -> Any:
    """Return 32 as {"count": 32}; raises ConfigError for what is neither a number nor a group of settings."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return {"count": value}
    if not isinstance(value, dict | TopKConfig):
        raise ConfigError(
            f"loss.negatives.top_k is {value!r}: set it to a number of negatives, such as 32, or to {{count: 32, "
            "others: 0.1}."
        )
    return value


class NegativesConfig(Settings):
    """Sources of negatives; the items of all sources form one set of candidates."""

    in_batch: bool = True  # the other rows' positives, over all ranks
    sampled: NonNegativeInt | Literal["all"] = 0  # draws per step from the catalogue, over all ranks; all: every item
    power: NonNegativeFloat = 0.0  # an item with n interactions is drawn in proportion to n ** power; 0: uniformly
    popular: PopularConfig | None = None
    same_category: SameCategoryConfig | None = None
    mined: MinedConfig | None = None
    refresh: RefreshConfig | None = None
    cross_batch_memory: NonNegativeInt = 0  # number of earlier candidates that are stored with their vectors
    # The negatives of a row with the highest logits have more weight than the others.
    top_k: Annotated[TopKConfig, BeforeValidator(_count_as_group)] | None = None

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        others = [
            name
            for name in ("popular", "same_category", "mined", "refresh", "cross_batch_memory", "power")
            if getattr(self, name)
        ]
        if self.sampled == "all" and others:
            raise ConfigError(
                "loss.negatives.sampled is all, so every item is a candidate already: remove "
                f"{', '.join(others)}, or set sampled to a count."
            )
        if self.power and not self.sampled:
            raise ConfigError(
                f"loss.negatives.power is {self.power:g}, but nothing is sampled by it: set loss.negatives.sampled."
            )
        return self


class ImpressionsConfig(Settings):
    """Items that a training row lists: impressions, hard negatives, graded lists."""

    column: str  # column of train/ with lists of item ids, empty or null where there are none
    labels: str | None = None  # column of labels, one per item; 0: negative, above 0: positive or grade; default: all 0
    weights: str | None = None  # column of weights, one per item, for bce and listwise; default: all 1
    shared: bool = True  # a row's negatives are negatives of the other rows, too
    unknown: Unknown = "error"  # skip: items that are not in the catalogue are left out


class LearnedTemperature(Settings):
    """A temperature that is trained with the towers, between two bounds."""

    learned: Literal[True]  # selects this group in place of a number
    start: PositiveFloat = 0.1  # initial temperature
    low: PositiveFloat = 0.01  # lower bound
    high: PositiveFloat = 1.0  # upper bound

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not self.low < self.start < self.high:
            raise ConfigError(
                f"loss.temperature starts at {self.start:g}, which is not between low = {self.low:g} and high = "
                f"{self.high:g}."
            )
        return self


Temperature = Annotated[  # divisor of the scores
    Annotated[PositiveFloat, Tag("|number")] | Annotated[LearnedTemperature, Tag("|learned")],
    Discriminator(lambda value: "|learned" if isinstance(value, dict | LearnedTemperature) else "|number"),
]
# Type of the gradients' matrix multiplications. Logits are fp32, except those of negatives with bf16_logits.
LossPrecision = Literal["auto", "fp32", "bf16", "bf16_logits"]


class RegularizationConfig(Settings):
    """Weights of the regularization terms, per row; 0: none."""

    norm: NonNegativeFloat = 0.0  # mean squared length of the users' vectors and of the candidates'
    alignment: NonNegativeFloat = 0.0  # squared distance of positives
    uniformity: NonNegativeFloat = 0.0  # log of the mean of exp(-2 squared distance), over users and over candidates


class InterestsConfig(Settings):
    """Training of several vectors per user; see model/multi_interest.py."""

    # max: an item's score is the maximum over the user's vectors, as in search. attention: all items are scored with
    # one mean of the vectors, weighted by the row's positive, which divides the cost by the number of vectors.
    score: Literal["max", "attention"] = "max"
    sharpness: PositiveFloat = 10.0  # attention: weights are softmax(sharpness * score of the positive)
    diversity: NonNegativeFloat = 0.1  # weight of the loss term for similar vectors of one user


class LossConfig(KindSettings):
    """The loss of a row's positives against the candidates; model/losses has the formulas."""

    learns_graded_labels: ClassVar[bool] = False  # learns the labels of impressions as probabilities, from 0 to 1
    supports_top_k: ClassVar[bool] = False  # can give a row's hardest negatives more weight
    needs_unit_length: ClassVar[bool] = False  # is defined only for vectors of length 1

    positive_power: NonNegativeFloat = 1.0  # each of a row's n positives has the weight n ** -positive_power
    mask_history: bool = True  # items of the row's history are not its negatives
    known: Path | None = None  # Parquet with user_id and item_ids: further items that are not negatives of the user
    negatives: NegativesConfig = NegativesConfig()
    impressions: ImpressionsConfig | None = None
    regularization: RegularizationConfig = RegularizationConfig()
    interests: InterestsConfig | None = None  # for a sequence encoder with several vectors per user

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the keyword arguments of the loss function."""
        names = type(self).model_fields.keys() - CorrectedLoss.model_fields.keys()
        return {name: getattr(self, name) for name in names}

    @property
    def log_q_strength(self) -> float:
        """Return the factor of the logQ correction; 0: none."""
        return 0.0

    @property
    def streams_log_q(self) -> bool:
        """Return whether sampling probabilities are estimated during training."""
        return False

    @property
    def has_other_negatives(self) -> bool:
        """Return whether there are negatives besides the other rows' positives."""
        negatives = self.negatives
        return any((negatives.sampled, negatives.popular, negatives.same_category, negatives.mined, self.impressions))

    @model_validator(mode="after")
    def _check_negatives(self) -> Self:
        if self.negatives.top_k is not None and not self.supports_top_k:
            raise ConfigError(
                f"loss.negatives.top_k is set, but loss.kind {self.kind} uses all negatives of a row: remove "
                "it, or choose another kind."
            )
        self._check_sources()
        return self

    def _check_sources(self) -> None:
        if not self.negatives.in_batch and not self.has_other_negatives:
            raise ConfigError(
                "loss.negatives has in_batch: false and sampled: 0, so there are no negatives: set in_batch: true, or "
                "sampled to a count or all (or popular, same_category, mined, or loss.impressions)."
            )


class CorrectedLoss(LossConfig):
    """A loss with logQ correction, which prevents lower scores for items that are often candidates."""

    log_q: float = Field(default=1.0, ge=0, le=1)  # strength of the correction
    # exact: from the counts of the training data; streaming: from the steps so far.
    log_q_estimate: Literal["exact", "streaming"] = "exact"

    @property
    def log_q_strength(self) -> float:
        return self.log_q

    @property
    def streams_log_q(self) -> bool:
        return self.log_q_estimate == "streaming"

    @model_validator(mode="after")
    def _check_estimate(self) -> Self:
        if self.streams_log_q and not self.log_q:
            raise ConfigError(
                "loss.log_q_estimate is streaming, but loss.log_q is 0, so there is no correction: remove one of them."
            )
        return self


class SoftmaxLoss(CorrectedLoss):
    supports_top_k = True
    kind: Literal["softmax"] = "softmax"  # each positive against all negatives (InfoNCE, sampled softmax)
    temperature: Temperature = 0.1  # divisor of the scores: a number, or a group if it is learned
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster


class BceLoss(CorrectedLoss):
    learns_graded_labels = True
    kind: Literal["bce"] = "bce"  # binary cross-entropy of each pair
    temperature: Temperature = 0.1  # divisor of the scores: a number, or a group if it is learned
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster
    negative_weight: PositiveFloat = 1.0  # weight of all negatives of a row together


class SoftmaxBceLoss(CorrectedLoss):
    learns_graded_labels = True
    kind: Literal["softmax_bce"] = "softmax_bce"  # weighted sum of softmax and bce
    temperature: Temperature = 0.1  # divisor of the scores: a number, or a group if it is learned
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster
    softmax_share: float = Field(default=0.5, ge=0, le=1)  # weight of the softmax loss; bce has the rest
    negative_weight: PositiveFloat = 1.0  # weight of all negatives of a row together, in bce


class BslLoss(CorrectedLoss):
    supports_top_k = True
    kind: Literal["bsl"] = "bsl"  # softmax over the positives as well, for noisy positives
    temperature: Temperature = 0.1  # divisor of the scores: a number, or a group if it is learned
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster
    temperature_ratio: PositiveFloat = 1.0  # the positives' temperature divided by the negatives'


class CclLoss(LossConfig):
    supports_top_k = True
    needs_unit_length = True
    kind: Literal["ccl"] = "ccl"  # positives to cosine 1, negatives below a margin
    margin: float = Field(default=0.5, ge=-1, lt=1)  # cosine above which a negative has a loss
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster
    negative_weight: PositiveFloat = 150.0  # weight of all negatives of a row together


class BprLoss(CorrectedLoss):
    supports_top_k = True
    kind: Literal["bpr"] = "bpr"  # each positive above each negative, logistic
    temperature: Temperature = 0.1  # divisor of the scores: a number, or a group if it is learned
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster


class MarginLoss(CorrectedLoss):
    supports_top_k = True
    kind: Literal["margin"] = "margin"  # each positive above each negative by a margin
    margin: PositiveFloat = 0.2  # target difference between the scores of a positive and a negative
    precision: LossPrecision = "auto"  # type of the gradients' matrix multiplications; auto: bf16 where it is faster


class ListwiseLoss(LossConfig):
    kind: Literal["listwise"] = "listwise"  # cross-entropy between a graded list and the softmax over it
    temperature: Temperature = 0.1  # divisor of the scores: a number, or a group if it is learned
    grades: Literal["share", "softmax"] = "share"  # conversion of a list's labels to a distribution

    def _check_sources(self) -> None:
        if self.impressions is None or self.impressions.labels is None:
            raise ConfigError(
                "loss.kind is listwise, which ranks a row's graded list: set loss.impressions.column and "
                "loss.impressions.labels, or choose another kind."
            )
        if unused := [
            name for name in ("popular", "same_category", "cross_batch_memory") if getattr(self.negatives, name)
        ]:
            raise ConfigError(
                f"loss.kind is listwise, which uses only a row's own list, but loss.negatives has "
                f"{', '.join(unused)}: remove it, or choose another kind."
            )


Loss = Annotated[LossConfig, ByKind("softmax")]
