"""Vocabularies of category features, which are fixed at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.features import LEARNED, RESERVED_ROWS, VocabularyFeature, read_words
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Values
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.errors import ConfigError
from trec_twotower.ops.hashing import id_keys, is_id
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.arrow_values import EXACT, python_values

NULL_ROW, UNKNOWN_ROW = 0, 1  # first rows of the table, for null and unknown values; the vocabulary follows


class VocabularyReader(FeatureReader[VocabularyFeature]):
    needs = "integers or strings"
    has_keys = True

    def fits(self, kind: pa.DataType) -> bool:
        return is_id(kind)

    def read(self, rows: FeatureRows[VocabularyFeature]) -> Values:
        return {rows.feature.name: Ragged.singles(in_vocabulary(rows.array, rows.learned, rows.place))}

    def keys(self, rows: FeatureRows[VocabularyFeature]) -> np.ndarray:
        return id_keys(rows.array.drop_null(), rows.place)

    def key_settings(self, settings: TableSpec) -> None:
        return None

    def num_unknown(self, rows: FeatureRows[VocabularyFeature]) -> int:
        return int((in_vocabulary(rows.array, rows.learned, rows.place) == UNKNOWN_ROW).sum())

    def learn(
        self, feature: VocabularyFeature, kind: pa.DataType, groups: Iterable[FeatureRows[VocabularyFeature]]
    ) -> Statistics:
        return make_vocabulary(feature, kind, (rows.array for rows in groups))

    def check_files(self, feature: VocabularyFeature) -> None:
        if feature.vocabulary != LEARNED:
            words_of_file(feature)


def words_of_file(feature: VocabularyFeature) -> list[Any]:
    """Return the vocabulary in a feature's file. Raises ConfigError if it is invalid or larger than its buckets."""
    words, room = read_words(feature.vocabulary), feature.buckets - RESERVED_ROWS
    _check_words(words, feature.vocabulary)
    if len(words) > room:
        raise ConfigError(
            f"The vocabulary {feature.vocabulary} has {len(words):,} entries, but feature {feature.name!r} has rows "
            f"for {room:,}: remove buckets, or set it to {len(words) + RESERVED_ROWS:,}."
        )
    return words


def _check_words(words: Sequence[Any], path: str) -> None:
    if not words:
        raise ConfigError(f"The vocabulary {path} is empty: write one entry per line.")
    line_of: dict[Any, int] = {}
    for line, word in enumerate(words, 1):
        if word == "":
            raise ConfigError(f"The vocabulary {path} is empty in line {line:,}: write one entry per line.")
        if word in line_of:
            raise ConfigError(f"The vocabulary {path} has {word!r} in lines {line_of[word]:,} and {line:,}: keep one.")
        line_of[word] = line


def make_vocabulary(feature: VocabularyFeature, kind: pa.DataType, columns: Iterable[pa.Array]) -> Statistics:
    """Return the vocabulary of a feature in row order: that of its file, or of a column, most frequent first.

    Values of a column need `min_count` rows, and are cut to the number of buckets; ties are in ascending order. `kind`
    is the type of the column, to which the entries of a file are converted.
    """
    room = feature.buckets - RESERVED_ROWS
    if feature.vocabulary != LEARNED:
        words: list[Any] = words_of_file(feature)
        if pa.types.is_integer(kind):
            try:
                words = [int(word) for word in words]
            except ValueError as error:
                raise ConfigError(
                    f"The vocabulary {feature.vocabulary} is not of integers, but column {feature.source_column!r} is "
                    f"{kind} ({error}): correct one of them."
                ) from None
            _check_words(words, feature.vocabulary)
        return Statistics(words=tuple(words))
    counts: dict[Any, int] = {}
    for array in columns:
        found = pc.value_counts(array.drop_null())
        for word, count in zip(python_values(found.field(0), EXACT), found.field(1).to_pylist(), strict=True):
            counts[word] = counts.get(word, 0) + count
    kept = sorted((-count, word) for word, count in counts.items() if count >= feature.min_count)
    return Statistics(words=tuple(word for _, word in kept[:room]))


def in_vocabulary(array: pa.Array, statistics: Statistics, where: str) -> np.ndarray:
    """Return the table row of each value of a column: its own, or that of unknown values or of null."""
    out = np.full(len(array), NULL_ROW, np.int32)
    key = id_keys(array.drop_null(), where)
    known, number = statistics.rows_of_words
    row = np.full(len(key), UNKNOWN_ROW)
    if len(known):
        place = np.minimum(np.searchsorted(known, key), len(known) - 1)
        row = np.where(known[place] == key, number[place] + RESERVED_ROWS, UNKNOWN_ROW)
    out[array.is_valid().to_numpy(zero_copy_only=False)] = row
    return out
