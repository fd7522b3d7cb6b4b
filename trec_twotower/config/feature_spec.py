"""Base classes of input features, and the properties that data, model and training read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trec_twotower.config.base import KindSettings, refusal
from trec_twotower.config.model import Pooling, TableSpec, resolve_auto_dim

HISTORY = "history"  # the column of a user's earlier items
Buckets = Annotated[int, Field(ge=1, le=1 << 32)]
TimeUnit = Literal["s", "ms", "us", "ns"]


class FeatureSpec(KindSettings):
    """One input of a tower: the columns it reads, and how it enters the tower."""

    learns_from_data: ClassVar[bool] = False  # the run learns statistics or a vocabulary before the first step
    has_tokens: ClassVar[bool] = False  # a batch holds the tokens of a language model
    # Each value has its own table row, which keeps its initial weights if no training row has the value.
    has_row_per_value: ClassVar[bool] = False

    name: str = Field(min_length=1)  # name in messages, overrides and weights; no dots

    @property
    def source_column(self) -> str:
        """Return the column that the feature reads first."""
        return self.value_columns[0]

    @property
    def value_columns(self) -> tuple[str, ...]:
        """Return the columns whose types the kind prescribes."""
        return (getattr(self, "column", None) or self.name,)

    @property
    def side_columns(self) -> dict[str, str]:
        """Return the further columns by role: weights, times and actions of list elements, and `until`."""
        columns = {role: getattr(self, role, None) for role in ("weights", "times", "actions", "until")}
        return {role: column for role, column in columns.items() if column is not None}

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Return every column that the feature reads, `source_column` first."""
        return tuple(dict.fromkeys((*self.value_columns, *self.side_columns.values())))

    @property
    def shared_table(self) -> str | None:
        """Return the name of the declared table that the feature looks up; None if it has none."""
        return getattr(self, "table", None)

    @property
    def own_table(self) -> TableSpec | None:
        """Return the feature's own table; None if it has none."""
        return None

    @property
    def looks_up_table(self) -> bool:
        return self.shared_table is not None or self.own_table is not None

    @property
    def table_name(self) -> str:
        """Return the name of the table that the feature looks up; its own table has the feature's name."""
        return self.shared_table or self.name

    @property
    def layers_width(self) -> int | None:
        """Return the output width of the feature's own layers; None if it has none."""
        return None

    @property
    def has_layers(self) -> bool:
        return self.layers_width is not None

    @property
    def num_numbers(self) -> int:
        """Return the number of float columns of the feature in a batch."""
        return 0

    @property
    def is_ragged(self) -> bool:
        """Return whether a row may have any number of table rows."""
        return False

    @property
    def is_weighted(self) -> bool:
        """Return whether the table rows have weights."""
        return False

    @property
    def length_limit(self) -> int | None:
        """Return the number of newest list elements that are used; None: all."""
        return getattr(self, "max_length", None)

    @property
    def pooling_mode(self) -> Pooling:
        """Return how the vectors of a row are pooled."""
        return getattr(self, "pooling", "sum")

    @property
    def row_meaning(self) -> str:
        """Return what a hashed row of its table represents. A warm start copies rows between equal meanings only."""
        return "ids"

    @property
    def layer_settings(self) -> dict[str, Any]:
        """Return the settings that determine what the input of the feature's own layers means."""
        return {}

    @property
    def delta_table(self) -> str | None:
        """Return the name of a second table, which is added to the first; None: the feature has none."""
        return None

    @property
    def external_files(self) -> list[Path]:
        """Return the files outside the dataset that the feature reads."""
        return []

    @property
    def assumed_ids(self) -> float | None:
        """Return the assumed number of table rows per data row; None: the length of the column's lists."""
        return 2.0 if self.is_ragged else 1.0

    @property
    def reads_samples(self) -> bool:
        """Return whether the feature can read a sampled part of the user's positives as history."""
        return False

    @property
    def output_scale(self) -> float:
        """Return the factor of the pooled vector."""
        return getattr(self, "scale", 1.0)

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if "." in self.name:
            raise refusal(
                f"has a dot in its name, which separates the parts of settings and weights: name it "
                f"{self.name.replace('.', '_')!r}, and set column: {self.source_column}"
            )
        return self


class ColumnFeature(FeatureSpec):
    column: str | None = None  # column that the feature reads; default: its name


class TableFeature(FeatureSpec):
    """A feature that looks up an embedding table: a shared one (`table`), or its own (`buckets` and `dim`)."""

    table: str | None = None  # name of a table under `tables`
    buckets: Buckets | None = None  # number of rows of its own table
    dim: PositiveInt | None = None  # columns of its own table, a multiple of 4; auto: about 6 * buckets ** 1/4

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto_dim(cls, values: Any) -> Any:
        return resolve_auto_dim(values)

    @model_validator(mode="after")
    def _check_table(self) -> Self:
        sizes = (self.buckets, self.dim)
        if self.table is None and None in sizes:
            raise refusal("needs `table` (one declared under tables), or both `buckets` and `dim`")
        if self.table is not None and sizes != (None, None):
            raise refusal(
                f"names table {self.table!r} and also gives buckets or dim: keep `table` and set the size under "
                f"tables.{self.table}, or remove `table`"
            )
        return self

    @property
    def own_table(self) -> TableSpec | None:
        if self.buckets is None or self.dim is None:
            return None
        return TableSpec(buckets=self.buckets, dim=self.dim, hashes=getattr(self, "hashes", 1))


class PooledFeature(TableFeature):
    hashes: Literal[1, 2] = 1  # rows per id of its own table; 2: an id is the sum of two rows
    scale: PositiveFloat = 1.0  # factor of the pooled vector

    @model_validator(mode="after")
    def _check_hashes(self) -> Self:
        if self.table is not None and self.hashes == 2:
            raise refusal(f"has hashes: 2, a setting of its table: set it under tables.{self.table}")
        return self


class ItemListFeature(ColumnFeature, TableFeature):
    """A list of ids per row, newest last; null and empty lists are the zero vector, null elements are ignored."""

    max_length: PositiveInt | None = None  # number of elements that are used, the newest ones
    times: str | None = None  # column of lists with a time per element, ascending: numbers or timestamps
    unit: TimeUnit = "s"  # unit of `times` that are plain numbers, which count from 1970

    @model_validator(mode="after")
    def _check_unit(self) -> Self:
        if self.unit != "s" and self.times is None:
            raise refusal(f"has unit: {self.unit}, but no `times`: remove it, or name them")
        return self

    @property
    def is_ragged(self) -> bool:
        return True

    @property
    def assumed_ids(self) -> float | None:
        return None
