"""Conversion of Arrow values to Python, including text that is not UTF-8 and times outside Python's range."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

READABLE = "replace"  # for display: bytes that are not UTF-8 become U+FFFD
EXACT = "surrogateescape"  # reversible: every byte is kept


def python_values(array: pa.Array | pa.ChunkedArray, errors: str = READABLE) -> list[Any]:
    """Return `to_pylist` for all bytes and times that a column may hold; `errors` is that of bytes.decode.

    Times are truncated to microseconds, and become text if Python cannot represent the date.
    """
    try:
        return array.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError among them
        pass
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in python_values(chunk, errors)]
    kind = array.type
    if pa.types.is_dictionary(kind):
        return python_values(array.dictionary_decode(), errors)
    if pa.types.is_struct(kind):
        fields = [python_values(part, errors) for part in array.flatten()]
        names = [field.name for field in kind]
        rows = zip(array.is_valid().to_pylist(), *fields, strict=True)
        return [dict(zip(names, values, strict=True)) if is_valid else None for is_valid, *values in rows]
    if pa.types.is_nested(kind):  # lists; of other kinds no column is read
        return [None if not each.is_valid else python_values(each.values, errors) for each in array]
    if pa.types.is_temporal(kind):
        return _times(array)
    text = array.cast(pa.large_binary()).to_pylist()
    return [None if each is None else each.decode(errors=errors) for each in text]


def _times(array: pa.Array) -> list[Any]:
    """Return times, dates or durations that `to_pylist` refuses."""
    kind = array.type
    of_nanoseconds: tuple[tuple[bool, pa.DataType], ...] = (
        (pa.types.is_timestamp(kind), pa.timestamp("us", getattr(kind, "tz", None))),
        (pa.types.is_duration(kind), pa.duration("us")),
        (pa.types.is_time64(kind), pa.time64("us")),
    )
    coarser = [other for fits, other in of_nanoseconds if fits and kind.unit == "ns"]
    for other in (*coarser, pa.string()):
        try:
            return array.cast(other, safe=False).to_pylist()
        except (pa.ArrowException, ValueError, OverflowError):
            continue
    return array.cast(pa.int64()).to_pylist()


def python_value(array: pa.Array | pa.ChunkedArray, row: int) -> Any:
    """Return one value for display."""
    [value] = python_values(array.slice(row, 1))
    return value


def python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table as dicts, with `python_values`."""
    columns = [python_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def exact_array(values: Iterable[int | str]) -> pa.Array:
    """Return the array of strings that were read with EXACT, or of integers."""
    values = list(values)
    if not values or not isinstance(values[0], str):
        return pa.array(values, None if values else pa.string())
    encoded = pa.array([str(value).encode(errors=EXACT) for value in values], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(encoded), encoded.buffers())
