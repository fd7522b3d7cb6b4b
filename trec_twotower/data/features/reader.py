"""Base classes of the feature readers: one reader for each kind of feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.model import TableSpec
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.ops.ragged import Ragged

Spec = TypeVar("Spec", bound=FeatureSpec)
Values = dict[str, Ragged | np.ndarray]  # table rows (Ragged) or numbers (float32), by name in Columns


@dataclass(frozen=True)
class FeatureRows(Generic[Spec]):
    """Some rows of the columns that a feature reads, and everything else that its values depend on."""

    feature: Spec
    table: pa.Table
    where: str  # file and row group, for messages
    settings: TableSpec | None = None  # of the table that the feature looks up
    statistics: Statistics | None = None  # of a feature that learns from the data
    item_rows: Callable[[np.ndarray], np.ndarray] | None = None  # catalogue rows of keys, for attributes of steps

    @property
    def array(self) -> pa.Array:
        """Return the column that the feature reads first; strings may be dictionary-encoded."""
        return self.column(self.feature.source_column)

    @property
    def place(self) -> str:
        """Return the place of that column, for messages."""
        return f"{self.where}, column {self.feature.source_column!r}"

    @property
    def learned(self) -> Statistics:
        assert self.statistics is not None
        return self.statistics

    @property
    def table_settings(self) -> TableSpec:
        assert self.settings is not None
        return self.settings

    def column(self, name: str) -> pa.Array:
        return one_chunk(self.table[name])


class FeatureReader(Generic[Spec]):
    """Turns the columns of one kind of feature into table rows or numbers.

    A kind of feature is a class of settings in config/features.py, a subclass of this class, and their line in READERS
    of transform.py. A feature with layers of its own also has a module in model/feature_encoders.py.
    """

    needs: ClassVar[str]  # the Arrow types that it reads, for messages
    null_is_value: ClassVar[bool] = False
    has_keys: ClassVar[bool] = False  # its values are identified by 64-bit keys

    def fits(self, kind: pa.DataType) -> bool:
        """Return whether the kind reads columns of this type."""
        raise NotImplementedError

    def read(self, rows: FeatureRows[Spec]) -> Values:
        """Return the table rows or numbers of each row, by name. Raises DataError for invalid values."""
        raise NotImplementedError

    def keys(self, rows: FeatureRows[Spec]) -> np.ndarray:
        """Return the 64-bit keys (int64) of all values of the rows; only with `has_keys`."""
        raise NotImplementedError

    def key_settings(self, settings: TableSpec) -> TableSpec | None:
        """Return the table settings by which a key becomes a table row; None: each value has a row of its own."""
        return settings

    def num_unknown(self, rows: FeatureRows[Spec]) -> int | None:
        """Return the number of values outside the vocabulary; None for a kind without one."""
        return None

    def learn(self, feature: Spec, kind: pa.DataType, groups: Iterable[FeatureRows[Spec]]) -> Statistics:
        """Return the statistics of a column of type `kind`; only for features that learn from the data."""
        raise NotImplementedError

    def check_files(self, feature: Spec) -> None:
        """Raise ConfigError if a file outside the dataset that the feature reads cannot be used."""
