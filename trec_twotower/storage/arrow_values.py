"""Conversion of Arrow values to Python, including text that is not UTF-8 and times outside Python's range."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

READABLE = "replace"  # for display: bytes that are not UTF-8 become U+FFFD
EXACT = "surrogateescape"  # reversible: every byte is kept
_CONTROLS: dict[int, str | None] = {
    **dict.fromkeys((*range(0x20), *range(0x7F, 0xA0))),  # C0 and C1, including the escape
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A))),  # characters that reorder the rest of the line
    **dict.fromkeys(map(ord, "\t\n\v\f\r\x85\u2028\u2029"), " "),
}


def python_values(array: pa.Array | pa.ChunkedArray, errors: str = READABLE) -> list[Any]:
    """Return `to_pylist`, extended to all bytes and times that a column may hold; `errors` is that of bytes.decode.

    Times are truncated to microseconds, and become text if Python cannot represent the date.
    """
    try:
        return array.to_pylist()
    except (ValueError, OverflowError):  # including UnicodeDecodeError
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
    if pa.types.is_nested(kind):  # lists; columns of other nested types are not read
        return [None if not each.is_valid else python_values(each.values, errors) for each in array]
    if pa.types.is_temporal(kind):
        return _times(array)
    text = array.cast(pa.large_binary()).to_pylist()
    return [None if each is None else each.decode(errors=errors) for each in text]


def _times(array: pa.Array) -> list[Any]:
    """Return times, dates or durations that `to_pylist` refuses."""
    kind = array.type
    microseconds: tuple[tuple[bool, pa.DataType], ...] = (
        (pa.types.is_timestamp(kind), pa.timestamp("us", getattr(kind, "tz", None))),
        (pa.types.is_duration(kind), pa.duration("us")),
        (pa.types.is_time64(kind), pa.time64("us")),
    )
    coarser = [other for fits, other in microseconds if fits and kind.unit == "ns"]
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
    """Return the array of integers, or of strings that were decoded with EXACT."""
    values = list(values)
    if not values or not isinstance(values[0], str):
        return pa.array(values, None if values else pa.string())
    encoded = pa.array([str(value).encode(errors=EXACT) for value in values], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(encoded), encoded.buffers())


def format_item(row: dict[str, Any]) -> str:
    """Return an item's row of the catalogue as one line: the title, then the other columns without the id."""
    details = [
        f"{name} {_short_text(value)}"
        for name, value in row.items()
        if name not in ("item_id", "title") and _is_readable(value)
    ]
    title = row.get("title") or f"item {row['item_id']}"
    return printable(f"{title}" + (f" ({', '.join(details)})" if details else ""))


def printable(text: object) -> str:
    """Return text as one line without characters that control a terminal: escapes, line breaks, reversed writing."""
    return str(text).translate(_CONTROLS)


def _is_readable(value: Any) -> bool:
    """Return whether a value is shown to people: not a vector or a struct, and not empty."""
    if isinstance(value, list):
        return any(each is not None for each in value) and not isinstance(value[0], float | dict | list)
    return value is not None and not isinstance(value, dict)


def _short_text(value: Any) -> str:
    """Return a value as text: floats with two decimals, lists cut after six elements."""
    if isinstance(value, list):
        value = [each for each in value if each is not None]
        return " ".join(map(str, value[:6])) + (" ..." if len(value) > 6 else "")
    return f"{value:.2f}" if isinstance(value, float | np.floating) else str(value)
