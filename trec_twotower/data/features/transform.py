"""From Arrow columns to table rows and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import (
    AgeFeature,
    BagFeature,
    CategoryFeature,
    CrossFeature,
    IdFeature,
    LanguageModelFeature,
    NumberFeature,
    SequenceFeature,
    TextFeature,
    TimeFeature,
    VectorFeature,
    VocabularyFeature,
)
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.datetime_parts import AgeReader, TimeReader
from trec_twotower.data.features.embeddings import VectorReader
from trec_twotower.data.features.hashed import CategoryReader, CrossReader, IdReader, bucket, hashings
from trec_twotower.data.features.lists import BagReader, SequenceReader
from trec_twotower.data.features.numeric import NumberReader
from trec_twotower.data.features.reader import FeatureReader, FeatureRows
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.text import LanguageModelReader, TextReader
from trec_twotower.data.features.vocabulary import VocabularyReader
from trec_twotower.errors import DataError
from trec_twotower.ops.ragged import Ragged

READERS: dict[type[FeatureSpec], FeatureReader[Any]] = {
    IdFeature: IdReader(),
    CategoryFeature: CategoryReader(),
    VocabularyFeature: VocabularyReader(),
    CrossFeature: CrossReader(),
    BagFeature: BagReader(),
    SequenceFeature: SequenceReader(),
    TextFeature: TextReader(),
    LanguageModelFeature: LanguageModelReader(),
    VectorFeature: VectorReader(),
    NumberFeature: NumberReader(),
    TimeFeature: TimeReader(),
    AgeFeature: AgeReader(),
}


def reader_of(feature: FeatureSpec) -> FeatureReader[Any]:
    return READERS[type(feature)]


def transform(
    features: Iterable[FeatureSpec],
    tables: Mapping[str, TableSpec],
    statistics: Mapping[str, Statistics],
    table: pa.Table,
    where: str,
    given: Mapping[str, Ragged] | None = None,
    *,
    uncut: bool = False,
    item_rows: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Columns:
    """Return the features of every row of an Arrow table. DataError names `where`, the column and the row.

    `given` has lists of 64-bit keys for computed columns, such as a sampled half of a history; with `uncut` they
    are not cut to max_length. `item_rows` returns the catalogue rows of keys, for sequences with attributes.
    """
    sparse: dict[str, Ragged] = {}
    numbers: dict[str, np.ndarray] = {}
    for feature in features:
        settings = tables[feature.table_name] if feature.looks_up_table else None
        if given is not None and feature.source_column in given:
            assert settings is not None
            keys = given[feature.source_column]
            keys = keys if uncut else keys.newest(feature.length_limit)
            for part, spec in hashings(feature, settings):
                sparse[part] = Ragged(keys.offsets, bucket(spec, keys.values), keys.weights)
            continue
        rows = FeatureRows(feature, table, where, settings, statistics.get(feature.name), item_rows)
        for name, values in reader_of(feature).read(rows).items():
            if isinstance(values, Ragged):
                sparse[name] = values
            else:
                numbers[name] = values
    return Columns(table.num_rows, sparse, numbers)


def check_kind(feature: FeatureSpec, kind: pa.DataType, where: str, column: str | None = None) -> None:
    """Raise DataError if the type of a column is not valid for this kind of feature, before anything is read."""
    reader = reader_of(feature)
    if not reader.fits(kind):
        raise DataError(
            f"{where}: column {column or feature.source_column!r} is {kind}, but feature {feature.name!r} of kind "
            f"{feature.kind!r} needs {reader.needs}: change the type of the column, or the kind."
        )


def check_files(features: Iterable[FeatureSpec]) -> None:
    """Raise ConfigError if a vocabulary or a language model of a feature cannot be used.

    This is for the config of a new run. A saved run contains its vocabulary and does not need the file.
    """
    for feature in features:
        reader_of(feature).check_files(feature)
