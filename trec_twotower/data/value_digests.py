"""64-bit digests of the values of a column: equal for equal values, whatever the type, file or row group they are in.

A run stores them for the columns that its features read, to detect items with changed values.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from trec_twotower.data.arrow_types import as_list, is_list
from trec_twotower.data.features.datetime_parts import counted
from trec_twotower.ops.hashing import id_keys, is_text, mix_array

NOTHING = np.uint64(0x6E6F7468696E67)  # the digest of null, and of a list without elements
LARGEST_INTEGER = 2.0**53  # below it a floating-point number without fraction is digested as an integer
BLOCK = 1 << 17  # list elements at a time: their arrays stay in a processor's cache
_US = {"s": 1_000_000, "ms": 1_000, "us": 1}


def value_digests(array: pa.Array, where: str) -> np.ndarray:
    """Return the digest (uint64) of every value of a column of a plain type, or of text in a dictionary.

    Numbers are equal by value, so that a column of integers that became one of floating-point numbers has the same
    digests; timestamps and dates are equal as instants.
    """
    if pa.types.is_dictionary(array.type):
        of_words = np.append(value_digests(array.dictionary, where), NOTHING)
        return of_words[array.indices.fill_null(len(array.dictionary)).to_numpy(zero_copy_only=False)]
    if is_list(array.type):
        return _list_digests(as_list(array), where)
    digests = np.full(len(array), NOTHING)
    is_value = array.is_valid().to_numpy(zero_copy_only=False)
    digests[is_value] = mix_array(_bits(array.drop_null() if array.null_count else array, where))
    return digests


def _bits(array: pa.Array, where: str) -> np.ndarray:
    """Return 64 bits (int64) of each value of a column without nulls."""
    kind = array.type
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(array.type):
        array, unit = counted(array)
        return array.to_numpy(zero_copy_only=False) * _US[unit]
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    if pa.types.is_integer(array.type) or is_text(kind):
        return id_keys(array, where)
    value = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        is_integer = (np.abs(value) < LARGEST_INTEGER) & (np.floor(value) == value)
        value = np.where(np.isnan(value), np.nan, value)  # one of the many NaNs
        return np.where(is_integer, value.astype(np.int64), value.view(np.int64))


def _list_digests(array: pa.Array, where: str) -> np.ndarray:
    """Return a digest of each list: of its length and the sum of its elements, weighted by position."""
    digests = np.empty(len(array), np.uint64)
    array = array.fill_null(pa.scalar([], type=array.type)) if array.null_count else array
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    start = 0
    while start < len(array):
        stop = max(int(np.searchsorted(offsets, offsets[start] + BLOCK, side="right")) - 1, start + 1)
        part = array.values.slice(offsets[start], offsets[stop] - offsets[start])
        digests[start:stop] = _block_digests(_elements(part, where), np.diff(offsets[start : stop + 1]))
        start = stop
    return digests


def _elements(array: pa.Array, where: str) -> np.ndarray:
    """Return 64 bits (uint64) of each element of lists; those of floating-point numbers are not mixed."""
    if not pa.types.is_floating(array.type) or array.null_count:
        return value_digests(array, where)
    value = array.to_numpy(zero_copy_only=False)
    if not math.isfinite(np.vdot(value, value)):  # one of the many NaNs
        value = np.where(np.isnan(value), np.nan, value)
    single = value.astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
    bits = single.view(np.uint32).astype(np.uint64)
    if value.dtype != np.float64:
        return bits
    return np.where((single == value) | np.isnan(value), bits, value.view(np.uint64))


def _block_digests(elements: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    longest = int(lengths.max())
    factor = mix_array(np.arange(longest)) | np.uint64(1)
    if len(elements) == longest * len(lengths) and longest:  # all lists have one length
        sums = (elements.reshape(-1, longest) * factor).sum(axis=1, dtype=np.uint64)
    else:
        ends = np.cumsum(lengths)
        place = np.arange(len(elements)) - np.repeat(ends - lengths, lengths)
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(elements * factor[place], dtype=np.uint64)])
        sums = total[ends] - total[ends - lengths]
    return np.where(lengths > 0, mix_array(sums ^ lengths.view(np.uint64)), NOTHING)


def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a digest of both digests of each row, in this order."""
    return mix_array(mix_array(first.view(np.uint64)) ^ second.view(np.uint64))
