"""Kernels that distribute rows over step buckets and collect the rows of a bucket (loading/step_buckets.py).

A buffer is one array of 32-bit values. The columns of an Examples are passed by memory address, because a kernel is
compiled for a fixed number of arrays and a schema has any number of columns.
"""

from __future__ import annotations

import numpy as np

from trec_twotower.ops.compilation import LINE_BYTES, copy_from, copy_run, int32_at, int64_at, kernel, line_from


@kernel
def mark_buckets(order: np.ndarray, cuts: np.ndarray, bucket_of: np.ndarray) -> None:
    """Write the bucket of each row to `bucket_of`; bucket h holds the rows order[cuts[h]:cuts[h + 1]]."""
    for bucket in range(cuts.size - 1):
        for i in range(cuts[bucket], cuts[bucket + 1]):
            bucket_of[order[i]] = bucket


@kernel
def place_rows(bucket_of: np.ndarray, ends: np.ndarray, places: np.ndarray) -> None:
    """Write each row's target position to `places`; ends[h], the next free position of bucket h, is advanced."""
    for row in range(bucket_of.size):
        bucket = bucket_of[row]
        places[row] = ends[bucket]
        ends[bucket] += 1


@kernel
def put_columns(columns: np.ndarray, places: np.ndarray, buffer: np.ndarray) -> None:
    """Write the columns of fixed width to their rows' positions.

    A row of `columns` holds a column's address, its width in 32-bit values, and the index of its start in `buffer`.
    """
    for field in range(columns.shape[0]):
        address, width, begin = columns[field, 0], columns[field, 1], columns[field, 2]
        if width == 1:
            for row in range(places.size):
                buffer[begin + places[row]] = int32_at(address + 4 * row)
            continue
        for row in range(places.size):
            for k in range(width):
                buffer[begin + places[row] * width + k] = int32_at(address + 4 * (row * width + k))


@kernel
def put_lists(
    lists: np.ndarray, bucket_of: np.ndarray, places: np.ndarray, buffer: np.ndarray, at: int, bounds: np.ndarray
) -> int:
    """Write ragged columns: lengths to the rows' positions, then values, then weights, bucket by bucket from `at`.

    A row of `lists` holds the address of a column's int64 offsets, the index of its lengths' start in `buffer`, and the
    address and the width in 32-bit values of its values and of its weights (width 0: no weights). `bounds` receives the
    start and the end of every bucket, for values and for weights. One cache line after each bucket stays free: lists
    are copied by whole lines, and the next list of the bucket overwrites the surplus. Returns the end.
    """
    array, line = 0, LINE_BYTES // 4
    counts, ends = np.empty(bounds.shape[1], np.int64), np.empty(bounds.shape[1], np.int64)
    for field in range(lists.shape[0]):
        offsets, begin = lists[field, 0], lists[field, 1]
        counts[:] = 0
        for row in range(places.size):
            length = int64_at(offsets + 8 * row + 8) - int64_at(offsets + 8 * row)
            buffer[begin + places[row]] = length
            counts[bucket_of[row]] += length
        for part in range(2, 6, 2):
            address, width = lists[field, part], lists[field, part + 1]
            if width == 0:
                continue
            for bucket in range(counts.size):
                bounds[array, bucket, 0] = ends[bucket] = at
                at += counts[bucket] * width
                bounds[array, bucket, 1] = at
                at += line
            last = int64_at(offsets + 8 * places.size) * width
            for row in range(places.size):
                low = int64_at(offsets + 8 * row) * width
                count = int64_at(offsets + 8 * row + 8) * width - low
                to = ends[bucket_of[row]]
                ends[bucket_of[row]] = to + count
                if low + count + line <= last:  # no read past the last value
                    for k in range(0, count, line):
                        line_from(buffer, to + k, address + 4 * (low + k))
                else:
                    copy_from(buffer, to, address + 4 * low, count)
            array += 1
    return at


@kernel
def copy_bucket(
    buffer: np.ndarray, starts: np.ndarray, bounds: np.ndarray, bucket: int, at: int, offsets: np.ndarray, place: int,
    fixed: np.ndarray, lists: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    """Copy the rows of one bucket to each field's array in `out`, starting at row `at`; returns the row after the last.

    A row of `fixed` describes a field of fixed width: the 32-bit values of one row before the field, its width, and the
    start of its array in `out`. A row of `lists` describes the values or weights of a ragged field: the number of its
    lengths, which follow after `place` values per row, the width of one value, and the start of its array in `out`.
    `offsets` of each ragged field are continued from `at`.
    """
    num_rows, first = starts[starts.size - 1], starts[bucket]
    count = starts[bucket + 1] - first
    for field in range(fixed.shape[0]):
        width = fixed[field, 1]
        copy_run(out, fixed[field, 2] + at * width, buffer, num_rows * fixed[field, 0] + first * width, count * width)
    for number in range(offsets.shape[0]):
        begin, low = num_rows * (place + number) + first, offsets[number, at]
        for row in range(count):
            low += buffer[begin + row]
            offsets[number, at + row + 1] = low
    for array in range(lists.shape[0]):
        to = lists[array, 2] + offsets[lists[array, 0], at] * lists[array, 1]
        for part in range(bounds.shape[0]):
            begin = bounds[part, array, bucket, 0]
            size = bounds[part, array, bucket, 1] - begin
            copy_run(out, to, buffer, begin, size)
            to += size
    return at + count
