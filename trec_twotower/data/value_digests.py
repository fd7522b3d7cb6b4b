"""64-bit digests of the values of a column: equal for equal values, whatever the type, file or row group they are in.

A run keeps them of the columns that its features read, to notice when an item is not what it was.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trec_twotower.data.arrow_types import as_list, is_list
from trec_twotower.data.hashing import id_keys, is_text, mix_array
from trec_twotower.data.times import counted

NOTHING = np.uint64(0x6E6F7468696E67)  # the digest of null, and of a list without elements
LARGEST_INTEGER = 2.0**53  # below it a floating-point number without fraction is digested as an integer
BLOCK = 1 << 20  # list elements at a time
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
    """Return a digest of each list: the mix of its length and of the sum of its elements' mixes with their places."""
    digests = np.empty(len(array), np.uint64)
    offsets = array.offsets.to_numpy(zero_copy_only=False)
    start = 0
    while start < len(array):
        stop = max(int(np.searchsorted(offsets, offsets[start] + BLOCK, side="right")) - 1, start + 1)
        digests[start:stop] = _block_digests(array.slice(start, stop - start), where)
        start = stop
    return digests


def _block_digests(array: pa.Array, where: str) -> np.ndarray:
    array = array.fill_null(pa.scalar([], type=array.type)) if array.null_count else array
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    offsets, lengths = offsets - offsets[0], np.diff(offsets)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    elements = mix_array(value_digests(array.flatten(), where) ^ mix_array(place))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(elements, dtype=np.uint64)])
    found = mix_array((sums[offsets[1:]] - sums[offsets[:-1]]) ^ lengths.view(np.uint64))
    return np.where(lengths > 0, found, NOTHING)


def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a digest of both digests of each row, in this order."""
    return mix_array(mix_array(first.view(np.uint64)) ^ second.view(np.uint64))
