"""Checks of the Arrow types that a feature can read."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.data.arrow_types import is_list
from trec_twotower.data.features.datetime_parts import is_time
from trec_twotower.data.features.embeddings import is_vector
from trec_twotower.data.features.numeric import is_number
from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import is_id, is_text


def is_id_list(kind: pa.DataType) -> bool:
    return is_list(kind) and is_id(kind.value_type)


def check_weights(column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid for weights of a bag."""
    if not (is_list(kind) and is_number(kind.value_type)):
        raise DataError(f"{where}: its weights, column {column!r}, are {kind}, not a list of numbers: cast them.")


def check_time(feature: FeatureSpec, column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid as the end of an age."""
    if not is_time(kind):
        raise DataError(
            f"{where}: column {column!r} is {kind}, but feature {feature.name!r} counts ages until it: "
            "timestamps, dates or numbers are needed."
        )


def check_times(column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid for times of steps."""
    if not (is_list(kind) and is_time(kind.value_type)):
        raise DataError(
            f"{where}: its times, column {column!r}, are {kind}, not a list of timestamps, dates or numbers."
        )


def check_actions(column: str, kind: pa.DataType, where: str) -> None:
    """Raise DataError if the type of a column is not valid for actions of steps."""
    if not is_id_list(kind):
        raise DataError(f"{where}: its actions, column {column!r}, are {kind}, not a list of integers or strings.")


NEEDED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "id": ("integers or strings", is_id),
    "category": ("integers or strings", is_id),
    "bag": ("lists of integers or strings", is_id_list),
    "sequence": ("lists of integers or strings", is_id_list),
    "number": ("numbers", is_number),
    "cross": ("integers or strings", is_id),
    "time": ("timestamps, dates or numbers", is_time),
    "text": ("strings", is_text),
    "vector": ("lists of floating-point numbers", is_vector),
}


def check_kind(feature: FeatureSpec, kind: pa.DataType, where: str, column: str | None = None) -> None:
    """Raise DataError if the type of a column is not valid for this kind of feature, before anything is read."""
    needed, fits = NEEDED[feature.kind]
    if not fits(kind):
        raise DataError(
            f"{where}: column {column or feature.source_column!r} is {kind}, but feature {feature.name!r} of kind "
            f"{feature.kind!r} needs {needed}: change the type of the column, or the kind."
        )
