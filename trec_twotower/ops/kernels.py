"""Compiled loops over rows and ids, shared by several modules."""

from __future__ import annotations

import numpy as np

from trec_twotower.ops.compilation import kernel, lowest_bit
from trec_twotower.ops.hashing import SPLITMIX_STEP, mix_key


@kernel
def mark_distinct(values: np.ndarray, bits: np.ndarray, out: np.ndarray, place_of: np.ndarray) -> int:
    """Write the distinct values to `out`, ascending, and their indices there to `place_of`; returns their number.

    `bits` is a bitmap over all possible values. It is zero before and after the call.
    """
    for i in range(values.size):
        value = np.uint64(values[i])
        bits[value >> np.uint64(6)] |= np.uint64(1) << (value & np.uint64(63))
    count = 0
    for number in range(bits.size):
        block = bits[number]
        if block != np.uint64(0):
            bits[number] = np.uint64(0)
            while block != np.uint64(0):
                lowest = 64 * number + lowest_bit(block)
                out[count] = lowest
                place_of[lowest] = count
                count += 1
                block &= block - np.uint64(1)
    return count


@kernel
def put_lengths(offsets: np.ndarray, out: np.ndarray) -> None:
    """Write the length of each row of a ragged array to `out`."""
    for row in range(offsets.size - 1):
        out[row] = offsets[row + 1] - offsets[row]


@kernel
def put_divisors(offsets: np.ndarray, is_root: bool, scale: np.float32, out: np.ndarray) -> None:
    """Write max(length, 1) of each row, or its square root, divided by `scale`, to `out`."""
    for row in range(offsets.size - 1):
        total = np.float32(max(offsets[row + 1] - offsets[row], 1))
        out[row] = (np.sqrt(total) if is_root else total) / scale


@kernel
def count_before(kinds: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    """Write to out[p, kind] the number of elements of that kind before index places[p].

    `places` is ascending, and `out` is zero before the call.
    """
    at = 0
    for number in range(places.size):
        if number > 0:
            out[number] = out[number - 1]
        while at < places[number]:
            out[number, kinds[at]] += 1
            at += 1


@kernel
def shuffle(values: np.ndarray, seed: np.uint64) -> None:
    """Permute `values` in place, uniformly (Durstenfeld 1964), with the random numbers of splitmix64 from `seed`.

    Bounded random numbers are unbiased and need no division (Lemire 2019).
    """
    state = seed
    for i in range(values.size - 1, 0, -1):
        bound = np.uint64(i + 1)
        while True:
            product = (mix_key(state) >> np.uint64(32)) * bound
            state += SPLITMIX_STEP
            low = product & np.uint64(0xFFFFFFFF)
            if low >= bound or low >= (np.uint64(0x100000000) - bound) % bound:
                break
        j = product >> np.uint64(32)
        values[i], values[j] = values[j], values[i]


@kernel
def draw_from_lists(
    list_offsets: np.ndarray, list_rows: np.ndarray, offsets: np.ndarray, values: np.ndarray,
    count: int, seed: np.uint64, out_offsets: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    """Sample for each row one of its lists (-1: none) uniformly, and `count` values of that list uniformly.

    The lists of row r are list_rows[list_offsets[r]:list_offsets[r + 1]]. Returns the number of sampled values.
    """
    at = 0
    out_offsets[0] = 0
    for row in range(list_offsets.size - 1):
        low = list_offsets[row]
        choices = np.uint64(list_offsets[row + 1] - low)
        state = mix_key(seed ^ np.uint64(row))
        chosen = np.int64(-1)
        if choices > np.uint64(0):
            chosen = np.int64(list_rows[low + np.int64(((state >> np.uint64(32)) * choices) >> np.uint64(32))])
        if chosen >= 0:
            first = offsets[chosen]
            length = np.uint64(offsets[chosen + 1] - first)
            if length > np.uint64(0):
                for _ in range(count):
                    state = mix_key(state)
                    out[at] = values[first + np.int64(((state >> np.uint64(32)) * length) >> np.uint64(32))]
                    at += 1
        out_offsets[row + 1] = at
    return at


@kernel
def find_columns(
    offsets: np.ndarray, values: np.ndarray, list_of_row: np.ndarray, column_I: np.ndarray,
    row_M: np.ndarray, column_M: np.ndarray,
) -> int:  # fmt: skip
    """Write the pairs of a row and a candidate in its list (-1: no list), ordered by row; returns their number."""
    num_pairs = 0
    for row in range(list_of_row.size):
        number = list_of_row[row]
        if number < 0:
            continue
        for i in range(offsets[number], offsets[number + 1]):
            column = column_I[values[i]]
            row_M[num_pairs] = row
            column_M[num_pairs] = column
            num_pairs += 1 if column >= 0 else 0
    return num_pairs
