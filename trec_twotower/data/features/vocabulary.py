"""Vocabularies: which words of a category have a table row each, fixed when a run begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.schema import LEARNED, FeatureSpec
from trec_twotower.data.features.numeric import Statistics
from trec_twotower.errors import ConfigError
from trec_twotower.ops.hashing import id_keys
from trec_twotower.storage.arrow_values import EXACT, python_values

NULL_ROW, UNKNOWN_ROW, FIRST_WORD = 0, 1, 2  # of the feature's table


def read_words(path: str) -> list[str]:
    """The words of a file, one a line; raises ConfigError where there is no such file, or no words, or one twice."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # less the mark that some editors begin a file with
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The vocabulary {path} cannot be read ({error}): name a UTF-8 file of a word a line."
        ) from None
    words = text.removesuffix("\n").split("\n") if text else []  # at line ends alone: a word may hold U+2028
    _check(words, path)
    return words


def words_of_file(feature: FeatureSpec) -> list[Any]:
    """The words of a feature's file; raises ConfigError as `read_words`, or where they are more than its buckets."""
    assert feature.vocabulary is not None and feature.buckets is not None
    words, room = read_words(feature.vocabulary), feature.buckets - FIRST_WORD
    if len(words) > room:
        raise ConfigError(
            f"The vocabulary {feature.vocabulary} has {len(words):,} words, but feature {feature.name!r} has rows for "
            f"{room:,}: leave buckets out, or set them to {len(words) + FIRST_WORD:,}."
        )
    return words


def _check(words: Sequence[Any], path: str) -> None:
    if not words:
        raise ConfigError(f"The vocabulary {path} is empty: write a word a line.")
    seen: dict[Any, int] = {}
    for line, word in enumerate(words, 1):
        if word == "":
            raise ConfigError(f"The vocabulary {path} has nothing in line {line:,}: write a word a line.")
        if word in seen:
            raise ConfigError(f"The vocabulary {path} has {word!r} in lines {seen[word]:,} and {line:,}: keep one.")
        seen[word] = line


def make_vocabulary(feature: FeatureSpec, kind: pa.DataType, columns: Iterable[pa.Array]) -> Statistics:
    """The words of a feature in the order of their rows: its file's, or those of a column, the most frequent first.

    Of the column those count that stand in `min_count` rows or more, as many as there are buckets for; of equally
    frequent ones the lesser come first. `kind` is the column's type, in which a file's words are read.
    """
    assert feature.vocabulary is not None and feature.buckets is not None
    room = feature.buckets - FIRST_WORD
    if feature.vocabulary != LEARNED:
        words: list[Any] = words_of_file(feature)
        if pa.types.is_integer(kind):
            try:
                words = [int(word) for word in words]
            except ValueError as error:
                raise ConfigError(
                    f"The vocabulary {feature.vocabulary} is not of integers, but column {feature.reads!r} is {kind} "
                    f"({error}): correct one of them."
                ) from None
            _check(words, feature.vocabulary)
        return Statistics(words=tuple(words))
    counts: dict[Any, int] = {}
    for array in columns:
        found = pc.value_counts(array.drop_null())
        for word, count in zip(python_values(found.field(0), EXACT), found.field(1).to_pylist(), strict=True):
            counts[word] = counts.get(word, 0) + count
    kept = sorted((-count, word) for word, count in counts.items() if count >= feature.min_count)
    return Statistics(words=tuple(word for _, word in kept[:room]))


def in_vocabulary(array: pa.Array, statistics: Statistics, where: str) -> np.ndarray:
    """The table row of each word of a column: its own, or those of the unknown and of null."""
    out = np.full(len(array), NULL_ROW, np.int32)
    key = id_keys(array.drop_null(), where)
    known, number = statistics.rows_of_words
    row = np.full(len(key), UNKNOWN_ROW)
    if len(known):
        place = np.minimum(np.searchsorted(known, key), len(known) - 1)
        row = np.where(known[place] == key, number[place] + FIRST_WORD, UNKNOWN_ROW)
    out[array.is_valid().to_numpy(zero_copy_only=False)] = row
    return out
