"""The loops over single rows and ids, compiled by numba: several times faster than numpy's passes over whole arrays,
and without the interpreter's lock, so that reader threads do not wait for each other.

The first call of a kernel compiles it (under a second) and keeps the result on disk beside this file, or in the user's
cache where that cannot be written. Without numba they run as plain Python: right, and far too slow to train from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

LINE_BYTES = 64  # of the processor's caches

njit: Any
try:
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np.arrayobj import make_array
except ImportError:  # pragma: no cover - doctor says so
    njit = None

Kernel = Callable[..., Any]
IS_COMPILED = njit is not None


def kernel(function: Kernel | None = None, **options: Any) -> Any:
    """The function compiled, with what else numba is to be told."""
    if function is None:
        return partial(kernel, **options)
    if not IS_COMPILED:
        return np.errstate(over="ignore")(function)  # 64-bit products are meant to overflow
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in
        return njit(nogil=True, **options)(function)


if not IS_COMPILED:

    def copy_run(out: np.ndarray, at: int, values: np.ndarray, low: int, count: int) -> None:
        out[at : at + count] = values[low : low + count]

    def copy_from(out: np.ndarray, at: int, address: int, count: int) -> None:
        ctypes.memmove(out[at:].ctypes.data, int(address), int(count) * out.itemsize)

    def line_from(out: np.ndarray, at: int, address: int) -> None:
        ctypes.memmove(out[at:].ctypes.data, int(address), LINE_BYTES)

    def word_at(address: int) -> int:
        return ctypes.c_int32.from_address(int(address)).value

    def long_at(address: int) -> int:
        return ctypes.c_int64.from_address(int(address)).value

    def lowest_bit(word: np.uint64) -> int:
        return (int(word) & -int(word)).bit_length() - 1

else:

    @intrinsic
    def copy_run(context: Any, out: Any, at: Any, values: Any, low: Any, count: Any) -> Any:
        """out[at : at + count] = values[low : low + count] by the C library's memcpy: a loop takes twice the time."""
        assert out.dtype == values.dtype and out.layout == values.layout == "C"

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers = [
                builder.gep(make_array(kind)(context, builder, array).data, [place])
                for kind, array, place in zip(signature.args[:4:2], arguments[:4:2], arguments[1:4:2], strict=True)
            ]
            item_bytes = make_array(signature.args[0])(context, builder, arguments[0]).itemsize
            cgutils.raw_memcpy(builder, pointers[0], pointers[1], arguments[4], item_bytes)
            return context.get_dummy_value()

        return types.void(out, types.int64, values, types.int64, types.int64), generate

    @intrinsic
    def copy_from(context: Any, out: Any, at: Any, address: Any, count: Any) -> Any:
        """The same from memory at an address: of arrays that are as many, and of the types, as a schema has them."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = make_array(signature.args[0])(context, builder, arguments[0])
            to = builder.gep(array.data, [arguments[1]])
            cgutils.raw_memcpy(builder, to, builder.inttoptr(arguments[2], to.type), arguments[3], array.itemsize)
            return context.get_dummy_value()

        return types.void(out, types.int64, types.int64, types.int64), generate

    @intrinsic
    def line_from(context: Any, out: Any, at: Any, address: Any) -> Any:
        """out[at:], LINE_BYTES of it, from memory at an address: a call of memcpy takes as long as several of these."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            line = ir.VectorType(ir.IntType(8), LINE_BYTES).as_pointer()
            data = make_array(signature.args[0])(context, builder, arguments[0]).data
            loaded = builder.load(builder.inttoptr(arguments[2], line), align=1)
            builder.store(loaded, builder.bitcast(builder.gep(data, [arguments[1]]), line), align=1)
            return context.get_dummy_value()

        return types.void(out, types.int64, types.int64), generate

    def _loader(kind: Any) -> Any:
        def load(context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.load(builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer()))

            return kind(types.int64), generate

        return intrinsic(load)

    word_at, long_at = _loader(types.int32), _loader(types.int64)

    @intrinsic
    def lowest_bit(context: Any, word: Any) -> Any:
        """The place of the lowest bit that is set in a uint64, which must have one."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.cttz(arguments[0], cgutils.true_bit)

        return types.int64(types.uint64), generate


@kernel
def mixed(key: np.uint64) -> np.uint64:
    """The finaliser of splitmix64, see data/hashing.py."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


@kernel
def hash_keys(keys: np.ndarray, salt: np.uint64, num_buckets: np.uint64, out: np.ndarray) -> None:
    """The bucket of each uint64 key, see data/hashing.py."""
    for i in range(keys.size):
        out[i] = ((mixed(keys[i] ^ salt) >> np.uint64(32)) * num_buckets) >> np.uint64(32)


@kernel
def mix_keys(keys: np.ndarray, out: np.ndarray) -> None:
    """The mix of each uint64 key, or its lower bits, as wide as `out` is."""
    for i in range(keys.size):
        out[i] = mixed(keys[i])


@kernel
def mark_distinct(values: np.ndarray, bits: np.ndarray, out: np.ndarray, place_of: np.ndarray) -> int:
    """The distinct values in rising order, and in `place_of` each one's place among them; returns how many.

    `bits` has one, not set, for each value that may be, and is left so.
    """
    for i in range(values.size):
        value = np.uint64(values[i])
        bits[value >> np.uint64(6)] |= np.uint64(1) << (value & np.uint64(63))
    count = 0
    for number in range(bits.size):
        word = bits[number]
        if word != np.uint64(0):
            bits[number] = np.uint64(0)
            while word != np.uint64(0):
                found = 64 * number + lowest_bit(word)
                out[count] = found
                place_of[found] = count
                count += 1
                word &= word - np.uint64(1)
    return count


@kernel
def find_lists(offsets: np.ndarray, rows: np.ndarray, starts: np.ndarray, out_offsets: np.ndarray) -> int:
    """Where each list to be taken starts, and where its copy will, with the end of all at last; returns that end."""
    end = 0
    out_offsets[0] = 0
    for i in range(rows.size):
        row = rows[i]
        starts[i] = offsets[row]
        end += offsets[row + 1] - offsets[row]
        out_offsets[i + 1] = end
    return end


@kernel
def copy_lists(values: np.ndarray, starts: np.ndarray, out_offsets: np.ndarray, out: np.ndarray) -> None:
    """Copies what find_lists found, by whole lines: what comes with a list is overwritten by the next.

    Apart from it, because a length that is still under way from memory would hold up all that comes behind it.
    """
    line, address = LINE_BYTES // values.itemsize, values.ctypes.data
    for i in range(starts.size):
        at, low = out_offsets[i], starts[i]
        count = out_offsets[i + 1] - at
        if low + count + line <= values.size and at + count + line <= out.size:
            for k in range(0, count, line):
                line_from(out, at + k, address + (low + k) * values.itemsize)
        else:
            copy_run(out, at, values, low, count)


@kernel
def mark_heaps(order: np.ndarray, cuts: np.ndarray, heap_of: np.ndarray) -> None:
    """The heap of each row, where heap h takes the rows order[cuts[h]:cuts[h + 1]]."""
    for heap in range(cuts.size - 1):
        for i in range(cuts[heap], cuts[heap + 1]):
            heap_of[order[i]] = heap


@kernel
def place_rows(heap_of: np.ndarray, ends: np.ndarray, places: np.ndarray) -> None:
    """Where each row goes, when those of a heap stand behind each other: ends[h], the next of heap h, moves on."""
    for row in range(heap_of.size):
        heap = heap_of[row]
        places[row] = ends[heap]
        ends[heap] += 1


@kernel
def put_columns(columns: np.ndarray, places: np.ndarray, words: np.ndarray) -> None:
    """Write rows of fields of one length to their places.

    `columns` has the address of each field, its words a row, and the word where its column begins.
    """
    for field in range(columns.shape[0]):
        address, width, begin = columns[field, 0], columns[field, 1], columns[field, 2]
        if width == 1:
            for row in range(places.size):
                words[begin + places[row]] = word_at(address + 4 * row)
            continue
        for row in range(places.size):
            for k in range(width):
                words[begin + places[row] * width + k] = word_at(address + 4 * (row * width + k))


@kernel
def put_lists(
    lists: np.ndarray, heap_of: np.ndarray, places: np.ndarray, words: np.ndarray, at: int, bounds: np.ndarray
) -> int:
    """Write rows of lists: their lengths to their places, their values, and then their weights, by heaps from `at` on.

    `lists` has the address of each one's offsets (int64), the word where the column of its lengths begins, and the
    address and the words a value of the values and of the weights (0: it has none). Of each of these `bounds` gets the
    first word of every heap and its end, behind which a line is left: lists are copied by whole lines, and what comes
    with them is overwritten by the next list of the heap. Returns the end of all.
    """
    array, line = 0, LINE_BYTES // 4
    counts, ends = np.empty(bounds.shape[1], np.int64), np.empty(bounds.shape[1], np.int64)
    for field in range(lists.shape[0]):
        offsets, begin = lists[field, 0], lists[field, 1]
        counts[:] = 0
        for row in range(places.size):
            length = long_at(offsets + 8 * row + 8) - long_at(offsets + 8 * row)
            words[begin + places[row]] = length
            counts[heap_of[row]] += length
        for part in range(2, 6, 2):
            address, width = lists[field, part], lists[field, part + 1]
            if width == 0:
                continue
            for heap in range(counts.size):
                bounds[array, heap, 0] = ends[heap] = at
                at += counts[heap] * width
                bounds[array, heap, 1] = at
                at += line
            last = long_at(offsets + 8 * places.size) * width
            for row in range(places.size):
                low = long_at(offsets + 8 * row) * width
                count = long_at(offsets + 8 * row + 8) * width - low
                to = ends[heap_of[row]]
                ends[heap_of[row]] = to + count
                if low + count + line <= last:  # nothing is read behind the last value
                    for k in range(0, count, line):
                        line_from(words, to + k, address + 4 * (low + k))
                else:
                    copy_from(words, to, address + 4 * low, count)
            array += 1
    return at


@kernel
def copy_heap(
    words: np.ndarray, starts: np.ndarray, bounds: np.ndarray, heap: int, at: int, offsets: np.ndarray, place: int,
    fixed: np.ndarray, lists: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    """Copy a heap's rows, `at` and following, to the array of each field.

    Fields of one length are rows of `fixed`: the words a row before theirs, their words, and where in `out` their array
    begins. Those of `lists`: the number of the lengths, which stand behind `place` words a row, the words of a value,
    and the array. `offsets` of each list go on from `at`. Returns the place behind the last row.
    """
    num_rows, first = starts[starts.size - 1], starts[heap]
    count = starts[heap + 1] - first
    for field in range(fixed.shape[0]):
        width = fixed[field, 1]
        copy_run(out, fixed[field, 2] + at * width, words, num_rows * fixed[field, 0] + first * width, count * width)
    for number in range(offsets.shape[0]):
        begin, low = num_rows * (place + number) + first, offsets[number, at]
        for row in range(count):
            low += words[begin + row]
            offsets[number, at + row + 1] = low
    for array in range(lists.shape[0]):
        to = lists[array, 2] + offsets[lists[array, 0], at] * lists[array, 1]
        for part in range(bounds.shape[0]):
            begin = bounds[part, array, heap, 0]
            count_words = bounds[part, array, heap, 1] - begin
            copy_run(out, to, words, begin, count_words)
            to += count_words
    return at + count


@kernel
def put_lengths(offsets: np.ndarray, out: np.ndarray) -> None:
    """The length of each list."""
    for row in range(offsets.size - 1):
        out[row] = offsets[row + 1] - offsets[row]


@kernel
def put_divisors(offsets: np.ndarray, is_root: bool, scale: np.float32, out: np.ndarray) -> None:
    """The length of each list, or its root, at least 1, over `scale`."""
    for row in range(offsets.size - 1):
        total = np.float32(max(offsets[row + 1] - offsets[row], 1))
        out[row] = (np.sqrt(total) if is_root else total) / scale


@kernel
def count_before(kinds: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    """How many of each kind stand before each of the rising places: out[place, kind], which begins as zeros."""
    at = 0
    for number in range(places.size):
        if number > 0:
            out[number] = out[number - 1]
        while at < places[number]:
            out[number, kinds[at]] += 1
            at += 1


@kernel
def shuffle(values: np.ndarray, seed: np.uint64) -> None:
    """A uniform permutation in place (Durstenfeld 1964), by splitmix64's numbers from `seed` on.

    A number below the bound comes without division and without bias (Lemire 2019).
    """
    state = seed
    for i in range(values.size - 1, 0, -1):
        bound = np.uint64(i + 1)
        while True:
            product = (mixed(state) >> np.uint64(32)) * bound
            state += np.uint64(0x9E3779B97F4A7C15)
            low = product & np.uint64(0xFFFFFFFF)
            if low >= bound or low >= (np.uint64(0x100000000) - bound) % bound:
                break
        j = product >> np.uint64(32)
        values[i], values[j] = values[j], values[i]


@kernel
def insert_keys(
    keys: np.ndarray, start: int, stop: int, slots: np.ndarray, shift: np.uint64, doubles: np.ndarray
) -> int:
    """Take up keys[start:stop] in a KeyTable's slots (see data/probing.py).

    Of a key that is there already, (position there, position here) goes into `doubles`; returns how many there are.
    """
    num_doubles = 0
    last = slots.size - 1
    for position in range(start, stop):
        slot = np.int64(mixed(np.uint64(keys[position])) >> shift)
        while slots[slot] != 0 and keys[slots[slot] - 1] != keys[position]:
            slot = (slot + 1) & last
        if slots[slot] == 0:
            slots[slot] = position + 1
        else:
            doubles[num_doubles, 0] = slots[slot] - 1
            doubles[num_doubles, 1] = position
            num_doubles += 1
    return num_doubles


@kernel
def find_keys(wanted: np.ndarray, keys: np.ndarray, slots: np.ndarray, shift: np.uint64, out: np.ndarray) -> None:
    """The position of each wanted key in a KeyTable, -1 where there is none."""
    last = slots.size - 1
    for i in range(wanted.size):  # the first looks of all: none waits for what another one finds
        out[i] = slots[np.int64(mixed(np.uint64(wanted[i])) >> shift)]
    for i in range(wanted.size):
        found = out[i]
        if found != 0 and keys[found - 1] != wanted[i]:
            slot = np.int64(mixed(np.uint64(wanted[i])) >> shift)
            while found != 0 and keys[found - 1] != wanted[i]:
                slot = (slot + 1) & last
                found = np.int64(slots[slot])
        out[i] = found - 1


@kernel
def find_fingerprints(
    values: np.ndarray, offsets: np.ndarray, fingerprint_C: np.ndarray, slots: np.ndarray, shift: np.uint64,
    row_M: np.ndarray, column_M: np.ndarray,
) -> int:  # fmt: skip
    """The pairs of a row and a candidate whose fingerprint is on the row's list, by row; returns how many.

    A slot holds the fingerprint and the column + 1, so that finding none or the right one takes one look, and no
    branch that the processor cannot foresee: half of all values may be found.
    """
    last = slots.size - 1
    low = np.uint64(0xFFFFFFFF)
    slots[:] = np.uint64(0)
    for column in range(fingerprint_C.size):
        fingerprint = np.uint64(fingerprint_C[column])
        slot = np.int64(fingerprint >> shift)
        while slots[slot] != np.uint64(0):
            slot = (slot + 1) & last
        slots[slot] = (fingerprint << np.uint64(32)) | np.uint64(column + 1)
    found = 0
    for row in range(offsets.size - 1):
        for i in range(offsets[row], offsets[row + 1]):
            fingerprint = np.uint64(values[i])
            slot = np.int64(fingerprint >> shift)
            entry = slots[slot]
            while entry != np.uint64(0) and (entry >> np.uint64(32)) != fingerprint:
                slot = (slot + 1) & last
                entry = slots[slot]
            row_M[found] = row
            column_M[found] = np.int64(entry & low) - 1
            found += int(entry != np.uint64(0))
    return found


@kernel
def draw_from_lists(
    list_offsets: np.ndarray, list_rows: np.ndarray, offsets: np.ndarray, values: np.ndarray,
    count: int, seed: np.uint64, out_offsets: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    """For each row one of its lists, drawn evenly (-1: none), and of that `count` values, each drawn evenly.

    The lists of row r are list_rows[list_offsets[r]:list_offsets[r + 1]]. Returns how many values were drawn.
    """
    at = 0
    out_offsets[0] = 0
    for row in range(list_offsets.size - 1):
        low = list_offsets[row]
        choices = np.uint64(list_offsets[row + 1] - low)
        state = mixed(seed ^ np.uint64(row))
        chosen = np.int64(-1)
        if choices > np.uint64(0):
            chosen = np.int64(list_rows[low + np.int64(((state >> np.uint64(32)) * choices) >> np.uint64(32))])
        if chosen >= 0:
            first = offsets[chosen]
            length = np.uint64(offsets[chosen + 1] - first)
            if length > np.uint64(0):
                for _ in range(count):
                    state = mixed(state)
                    out[at] = values[first + np.int64(((state >> np.uint64(32)) * length) >> np.uint64(32))]
                    at += 1
        out_offsets[row + 1] = at
    return at


@kernel
def find_columns(
    offsets: np.ndarray, values: np.ndarray, list_of_row: np.ndarray, column_I: np.ndarray,
    row_M: np.ndarray, column_M: np.ndarray,
) -> int:  # fmt: skip
    """The pairs of a row and a candidate that is on the row's list (-1: it has none), by row; returns how many."""
    found = 0
    for row in range(list_of_row.size):
        chosen = list_of_row[row]
        if chosen < 0:
            continue
        for i in range(offsets[chosen], offsets[chosen + 1]):
            column = column_I[values[i]]
            row_M[found] = row
            column_M[found] = column
            found += 1 if column >= 0 else 0
    return found
