"""The kinds of input features, one class per kind with its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trec_twotower.config.base import ByKind, refusal, validate
from trec_twotower.config.feature_spec import (
    Buckets,
    ColumnFeature,
    FeatureSpec,
    ItemListFeature,
    PooledFeature,
    TimeUnit,
)
from trec_twotower.config.model import Encoder, MeanEncoderSpec, Pooling, TableSpec, resolve_auto_dim
from trec_twotower.errors import ConfigError, nearest

LEARNED = "learned"  # `vocabulary: learned` means the values of the training data
MAX_WORDS = 500_000  # entries of a vocabulary, which the run keeps in memory
RESERVED_ROWS = 2  # table rows of a vocabulary that belong to null and to unknown values
TIME_PARTS = {"hour": 24, "weekday": 7, "hour_of_week": 168, "month": 12}  # number of values of each part

# Assumed where the text itself is not counted: words per text, and character n-grams per word.
ASSUMED_WORDS, ASSUMED_NGRAMS = 8, 12

NonFinite = Literal["error", "missing"]


class IdFeature(ColumnFeature, PooledFeature):
    """One integer or string per row, never null."""

    has_row_per_value = True
    kind: Literal["id"] = "id"


class CategoryFeature(ColumnFeature, PooledFeature):
    """One integer or string per row, hashed; null has a table row of its own."""

    has_row_per_value = True
    kind: Literal["category"] = "category"

    @property
    def row_meaning(self) -> str:
        return "category (row 0 is null's)"


def read_words(path: str) -> list[str]:
    """Return the lines of a vocabulary file; only line feeds end them, since a word may hold U+2028."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The vocabulary {path} cannot be read ({error}): name a UTF-8 file.") from None
    return text.removesuffix("\n").split("\n") if text else []


class VocabularyFeature(ColumnFeature):
    """A category with one table row per known value, one for null, and one for all unknown values."""

    variant = "vocabulary"
    learns_from_data = True
    has_row_per_value = True
    kind: Literal["category"] = "category"
    vocabulary: str  # a file with one value per line, or `learned` from the data
    min_count: PositiveInt = 1  # learned: values in fewer rows are unknown
    buckets: Annotated[int, Field(gt=RESERVED_ROWS, le=MAX_WORDS)]  # number of table rows; a file implies it
    dim: PositiveInt  # columns of its table, a multiple of 4; auto: about 6 * buckets ** 1/4
    scale: PositiveFloat = 1.0  # factor of the vector

    @model_validator(mode="before")
    @classmethod
    def _count_words(cls, values: Any) -> Any:
        path = values.get("vocabulary") if isinstance(values, dict) else None
        if isinstance(path, str) and path != LEARNED and values.get("buckets") is None:
            values = {**values, "buckets": len(read_words(path)) + RESERVED_ROWS}
        return resolve_auto_dim(values)

    @model_validator(mode="after")
    def _check_min_count(self) -> Self:
        if self.vocabulary != LEARNED and self.min_count != 1:
            raise refusal(f"has min_count, which is for vocabulary: {LEARNED}: remove it")
        return self

    @property
    def own_table(self) -> TableSpec | None:
        return TableSpec(buckets=self.buckets, dim=self.dim)

    @property
    def external_files(self) -> list[Path]:
        return [] if self.vocabulary == LEARNED else [Path(self.vocabulary)]


class BagFeature(ItemListFeature, PooledFeature):
    """A list of ids per row whose vectors are pooled."""

    kind: Literal["bag"] = "bag"
    pooling: Pooling = "mean"  # sqrtn: the sum divided by the root of the number of elements
    weights: str | None = None  # column of lists with a weight per element
    half_life_days: PositiveFloat | None = None  # age at which an element has half its weight; needs `times`
    until: str | None = None  # column of the time at which ages are measured; default: that of the newest element

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if (self.half_life_days is None) != (self.times is None) or (self.until is not None and self.times is None):
            raise refusal(
                f"has times: {self.times}, half_life_days: {self.half_life_days} and until: {self.until}: weights that "
                "decay with age need times and half_life_days"
            )
        return self

    @property
    def is_weighted(self) -> bool:
        return self.weights is not None or self.half_life_days is not None

    @property
    def reads_samples(self) -> bool:
        return not self.side_columns


class SequenceFeature(ItemListFeature):
    """An ordered list of ids per row, from which an encoder computes the vector. For users only.

    A step's vector is the sum of the item's table row and, if set, embeddings of the time since the step before
    (`times`) and of its action, the item's own features, and a row of a second table (`delta`).
    """

    kind: Literal["sequence"] = "sequence"
    max_length: PositiveInt
    encoder: Encoder = MeanEncoderSpec()  # what computes one vector, or several, from the steps
    actions: str | None = None  # column of lists with an action per step: integers or strings
    action_buckets: Buckets = 64  # number of embeddings that actions are hashed into
    attributes: tuple[str, ...] = ()  # item features whose vectors are added to a step's vector
    delta: bool = False  # a second table, which starts at zero, is added to the first

    @property
    def delta_table(self) -> str | None:
        return f"{self.name}_delta" if self.delta else None

    @property
    def layer_settings(self) -> dict[str, Any]:
        return {f"encoder.{name}": value for name, value in self.encoder.model_dump().items()}


class CrossFeature(PooledFeature):
    """The combination of two or three columns of ids or categories; null is a value like any other."""

    has_row_per_value = True
    kind: Literal["cross"] = "cross"
    columns: Annotated[tuple[str, ...], Field(min_length=2, max_length=3)]  # the two or three columns

    @property
    def value_columns(self) -> tuple[str, ...]:
        return self.columns

    @property
    def row_meaning(self) -> str:
        return f"cross of {', '.join(self.columns)}"

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if len(set(self.columns)) < len(self.columns):
            raise refusal(f"crosses columns {list(self.columns)}: name different ones")
        return self


def _check_lengths(lengths: tuple[int, int] | None) -> tuple[int, int] | None:
    if lengths is not None and lengths[0] > lengths[1]:
        raise refusal("write the least length first")
    return lengths


class TextFeature(ColumnFeature, PooledFeature):
    """A string per row, whose words and character n-grams are hashed and pooled."""

    kind: Literal["text"] = "text"
    max_length: PositiveInt | None = None  # number of words that are used, the first ones
    pooling: Pooling = "mean"  # sqrtn: the sum divided by the root of the number of words
    words: NonNegativeInt = 1  # length of the longest word n-gram that is hashed; 0: no words
    # Shortest and longest character n-grams that are hashed.
    characters: Annotated[tuple[PositiveInt, PositiveInt] | None, AfterValidator(_check_lengths)] = None

    @model_validator(mode="after")
    def _check_words(self) -> Self:
        if not self.words and self.characters is None:
            raise refusal("has words: 0 and no characters: set one of them")
        return self

    @property
    def row_meaning(self) -> str:
        return f"words: {self.words}, characters: {self.characters}"

    @property
    def assumed_ids(self) -> float:
        ngrams = self.words + (0 if self.characters is None else ASSUMED_NGRAMS)
        return float(ngrams * min(self.max_length or ASSUMED_WORDS, ASSUMED_WORDS))

    @property
    def is_ragged(self) -> bool:
        return True


def _check_tune(tune: Any) -> Any:
    if tune not in ("frozen", "all") and (isinstance(tune, bool) or not isinstance(tune, int) or tune < 1):
        raise refusal("input should be frozen, all, or the number of the model's last layers to train")
    return tune


class LanguageModelFeature(ColumnFeature):
    """A string per row that a language model encodes; its vectors are projected. For items only."""

    variant = "folder"
    has_tokens = True
    kind: Literal["text"] = "text"
    folder: str  # directory of a Hugging Face model
    dim: PositiveInt  # width of the projection
    max_length: PositiveInt | None = None  # number of tokens that are used, the first ones
    # Layers of the model that are trained: none (frozen), all, or the number of the last layers.
    tune: Annotated[Literal["frozen", "all"] | int, BeforeValidator(_check_tune)] = "frozen"

    @property
    def layers_width(self) -> int | None:
        return self.dim

    @property
    def is_ragged(self) -> bool:
        return True

    @property
    def external_files(self) -> list[Path]:
        return sorted(path for path in Path(self.folder).glob("*.*") if path.is_file())


class VectorFeature(ColumnFeature):
    """A list of numbers per row, such as an embedding of an image; null has a learned vector of its own."""

    kind: Literal["vector"] = "vector"
    size: PositiveInt  # length of the lists
    dim: PositiveInt | None = None  # width of a projection; default: none
    unit_length: bool = False  # divide each vector by its length
    nan: NonFinite = "error"  # missing: NaN and infinity make a vector null

    @property
    def layers_width(self) -> int | None:
        return self.dim or self.size

    @property
    def layer_settings(self) -> dict[str, Any]:
        return {"unit_length": self.unit_length}

    @property
    def num_numbers(self) -> int:
        return self.size + 1


def _check_clip(clip: tuple[float | None, float | None] | None) -> tuple[float | None, float | None] | None:
    if clip is not None and None not in clip and clip[0] >= clip[1]:  # type: ignore[operator]
        raise refusal("write the least value first, then the greatest")
    return clip


def _check_bins(bins: int | tuple[float, ...] | None) -> int | tuple[float, ...] | None:
    if isinstance(bins, tuple) and (not bins or any(low >= high for low, high in pairwise(bins))):
        raise refusal("write ascending values, at least one")
    return bins


class NumericFeature(ColumnFeature):
    """A number per row: normalized with an indicator of null, binned into table rows, or encoded as waves."""

    learns_from_data = True

    clip: Annotated[tuple[float | None, float | None] | None, AfterValidator(_check_clip)] = None  # minimum and maximum
    # zscore: by mean and deviation; minmax: to 0..1; log1p: sign(x) log(1 + |x|); quantile: share of values below it.
    normalize: Literal["zscore", "minmax", "log1p", "quantile", "none"] = Field(
        "zscore", validation_alias=AliasChoices("normalize", "normalise")
    )
    # Number of bins of equal frequency, or the values where bins begin. Each bin and null have a table row.
    bins: Annotated[Annotated[int, Field(ge=2, le=10_000)] | tuple[float, ...] | None, AfterValidator(_check_bins)] = (
        None
    )
    soft: bool = False  # a value between two bins' values is a weighted sum of both rows
    frequencies: PositiveInt | None = None  # number of learned frequencies, whose waves a layer of width `dim` reads
    dim: PositiveInt | None = None  # width of the bins' table, or of the layer after the waves

    @property
    def fill_value(self) -> float | None:
        """Return the number that replaces null before normalization; None: null is 0 after it."""
        return getattr(self, "default", None)

    @model_validator(mode="after")
    def _check_numeric(self) -> Self:
        is_binned, has_waves = self.bins is not None, self.frequencies is not None
        wrong = {
            "bins and frequencies: keep one of them": is_binned and has_waves,
            "bins or frequencies, but no dim: give the width": (is_binned or has_waves) and self.dim is None,
            "dim, but no bins or frequencies, which it belongs to": self.dim is not None and not is_binned | has_waves,
            "soft, but no bins": self.soft and not is_binned,
            "soft bins: give two values or more": self.soft and isinstance(self.bins, tuple) and len(self.bins) < 2,
            "bins, of which null has one: remove default": is_binned and self.fill_value is not None,
            f"bins, to which normalize: {self.normalize} makes no difference: remove it": is_binned
            and self.normalize != "zscore",
        }
        for finding, is_true in wrong.items():
            if is_true:
                raise refusal(f"has {finding}")
        return self

    @property
    def own_table(self) -> TableSpec | None:
        if self.bins is None or self.dim is None:
            return None
        num_bins = self.bins if isinstance(self.bins, int) else len(self.bins) + (not self.soft)
        return TableSpec(buckets=num_bins + 1, dim=self.dim)  # the first row is null's

    @property
    def layers_width(self) -> int | None:
        return None if self.frequencies is None else self.dim

    @property
    def layer_settings(self) -> dict[str, Any]:
        return {"normalize": self.normalize}

    @property
    def num_numbers(self) -> int:
        return 0 if self.bins is not None else 2

    @property
    def is_ragged(self) -> bool:
        return self.soft

    @property
    def is_weighted(self) -> bool:
        return self.soft


class NumberFeature(NumericFeature):
    """A number per row."""

    kind: Literal["number"] = "number"
    default: float | None = None  # number that replaces null before normalization; default: null is 0 after it
    nan: NonFinite = "error"  # missing: NaN and infinity are null


def _check_zone(zone: str) -> str:
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise refusal(f"this is not a time zone known here{nearest(zone, available_timezones())}") from None
    return zone


class TimeFeature(ColumnFeature):
    """A part of the time in a row, such as the hour; each value and null have a table row."""

    kind: Literal["time"] = "time"
    part: Literal["hour", "weekday", "hour_of_week", "month"]  # the part that is looked up
    zone: Annotated[str, AfterValidator(_check_zone)] = "UTC"  # time zone of the part, such as Europe/Oslo
    unit: TimeUnit = "s"  # unit of plain numbers, which count from 1970
    dim: PositiveInt  # width of the table

    @property
    def own_table(self) -> TableSpec | None:
        return TableSpec(buckets=TIME_PARTS[self.part] + 1, dim=self.dim)

    @property
    def row_meaning(self) -> str:
        return f"{self.part} in {self.zone}"


def _check_date(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise refusal("write a date such as 2023-06-30") from None
    return text


class AgeFeature(NumericFeature):
    """The days between the time in a row and another time."""

    variant = "part: age"
    kind: Literal["time"] = "time"
    part: Literal["age"]  # selects this kind: days up to `until` or `at`
    unit: TimeUnit = "s"  # unit of plain numbers, which count from 1970
    until: str | None = None  # column of the time at which the age is measured
    at: Annotated[str, BeforeValidator(str), AfterValidator(_check_date)] | None = None  # or one date for all rows

    @classmethod
    def is_chosen_by(cls, values: Mapping[str, Any]) -> bool:
        return values.get("part") == "age"

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if (self.until is None) == (self.at is None):
            raise refusal(
                "is an age: name the column of the time at which it is measured (`until`), or one date for all rows "
                "(`at`)"
            )
        return self


Feature = Annotated[FeatureSpec, ByKind()]


def build_feature(**settings: Any) -> FeatureSpec:
    """Return the feature that settings, written as in a config, describe; raises ConfigError."""
    return validate(Feature, settings, f"feature {settings.get('name')!r}")
