"""The compiled loops against plain Python, and the permutation against chance."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from itertools import permutations
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trec_twotower.ops import bucket_kernels, hashing, kernels, key_table, ragged
from trec_twotower.ops.compilation import LINE_BYTES
from trec_twotower.ops.hashing import fingerprints, hash_to_bucket, mix, mix_array
from trec_twotower.ops.key_table import KeyTable, pairs_by_fingerprint
from trec_twotower.ops.ragged import Ragged

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60)


@pytest.mark.parametrize("num_buckets", [1, 7, 1 << 31, (1 << 31) + 1, 1 << 32])
def test_buckets_and_fingerprints_are_computed_from_the_mix(rng, num_buckets):
    keys = np.concatenate([rng.integers(-(2**63), 2**63 - 1, 40_000), [0, -1, 2**63 - 1, -(2**63)]])
    sample = np.r_[:50, len(keys) - 4 : len(keys)]
    mixed = [mix(int(key) % 2**64) for key in keys[sample]]
    assert mix_array(keys)[sample].tolist() == mixed
    assert fingerprints(keys)[sample].tolist() == [value % 2**32 for value in mixed]
    salted = [mix(int(key) % 2**64 ^ mix(9)) for key in keys[sample]]
    found = hash_to_bucket(keys, num_buckets, seed=9)
    assert found[sample].tolist() == [(value >> 32) * num_buckets >> 32 for value in salted]
    assert found.dtype == (np.int32 if num_buckets <= 1 << 31 else np.int64)


@given(st.lists(st.lists(st.integers(-9, 9), max_size=40), min_size=1, max_size=20), st.data())
def test_taken_lists_are_those_of_plain_python(rows, data):
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30))
    for dtype in (np.int32, np.int64, np.uint32):
        lists = Ragged.from_lists(rows)
        weights = np.arange(len(lists.values), dtype=np.float32)
        taken = Ragged(lists.offsets, lists.values.astype(dtype), weights).take(np.array(wanted, np.int64))
        flat = np.array([value for row in wanted for value in rows[row]], np.int64).astype(dtype)
        assert taken.values.dtype == dtype and taken.values.tolist() == flat.tolist()
        assert taken.lengths.tolist() == [len(rows[row]) for row in wanted]
        assert taken.weights is not None
        assert taken.weights.tolist() == [
            place for row in wanted for place in range(lists.offsets[row], lists.offsets[row + 1])
        ]


@given(st.lists(st.integers(0, 199), min_size=1, max_size=300))
def test_marked_values_are_the_sorted_set_and_leave_the_bits_as_they_were(values):
    bits, place_of = np.zeros(4, np.uint64), np.full(200, -1)
    for dtype in (np.int32, np.int64):
        out = np.zeros(len(values), np.int64)
        count = kernels.mark_distinct(np.array(values, dtype), bits, out, place_of)
        assert out[:count].tolist() == sorted(set(values)) and not bits.any()
        assert place_of[out[:count]].tolist() == list(range(count)) and (place_of >= 0).sum() == count
        place_of[:] = -1


def test_a_read_only_or_strided_column_is_taken_as_any_other():
    """As memory-mapped files and slices of wider arrays are."""
    values = np.arange(20, dtype=np.int32)
    values.flags.writeable = False
    lists = Ragged(np.array([0, 2, 5, 10]), values[::2])
    assert lists.take(np.array([2, 0])).values.tolist() == [10, 12, 14, 16, 18, 0, 2]


@given(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60), KEYS)
def test_a_key_table_finds_what_a_dict_finds(held, others):
    keys = np.array(sorted(held), np.int64)
    place = {int(key): position for position, key in enumerate(keys)}
    asked = [*others, *held, *(key ^ 1 for key in held)]
    table = KeyTable(keys, np.zeros(KeyTable.num_slots(len(keys)), np.int32))
    assert not len(table.insert(0, len(keys)))
    found = table.find(np.array(asked, np.int64))
    assert found.tolist() == [place.get(key, -1) for key in asked]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_a_key_table_tells_each_key_that_is_there_already(ids):
    keys = np.array(ids, np.int64)
    table = KeyTable(keys, np.zeros(KeyTable.num_slots(len(keys)), np.int32))
    half = len(keys) // 2
    doubles = [*table.insert(0, half).tolist(), *table.insert(half, len(keys)).tolist()]
    assert doubles == [[ids.index(key), place] for place, key in enumerate(ids) if ids.index(key) < place]


# The intrinsics and the mixer in plain Python: what the compiled ones must do.


def slow_mix(key: np.uint64) -> np.uint64:
    z = (int(key) + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return np.uint64(z ^ (z >> 31))


def copy_run(out: np.ndarray, at: int, values: np.ndarray, low: int, count: int) -> None:
    out[at : at + count] = values[low : low + count]


def copy_from(out: np.ndarray, at: int, address: int, count: int) -> None:
    ctypes.memmove(out[at:].ctypes.data, int(address), int(count) * out.itemsize)


def line_from(out: np.ndarray, at: int, address: int) -> None:
    ctypes.memmove(out[at:].ctypes.data, int(address), LINE_BYTES)


SLOW = {
    "mix_key": slow_mix,
    "copy_run": copy_run,
    "copy_from": copy_from,
    "line_from": line_from,
    "int32_at": lambda address: ctypes.c_int32.from_address(int(address)).value,
    "int64_at": lambda address: ctypes.c_int64.from_address(int(address)).value,
    "lowest_bit": lambda bits: (int(bits) & -int(bits)).bit_length() - 1,
}


def in_plain_python(compiled: Any) -> Callable[..., Any]:
    """Return the source of a compiled function as a Python function that calls the slow intrinsics."""
    source = compiled.py_func
    plain = FunctionType(source.__code__, {**source.__globals__, **SLOW})
    return np.errstate(over="ignore")(plain)


def kernels_of(module: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if hasattr(value, "py_func") and value.py_func.__module__ == module.__name__
    }


def test_every_kernel_does_what_its_source_does_in_plain_python(rng):
    """Each on its own copy of the same arrays, what it returns and all that it writes."""
    keys = rng.integers(0, 2**64, 90, dtype=np.uint64)
    offsets = np.array([0, 3, 3, 40, 90])
    rows = np.array([3, 0, 2, 2])
    shift = np.uint64(64 - 8)
    calls = {
        "_hash_keys": (keys, np.uint64(7), np.uint64(1000), np.zeros(90, np.int32)),
        "_mix_keys": (keys, np.zeros(90, np.uint32)),
        "find_lists": (offsets, rows, np.zeros(4, np.int64), np.zeros(5, np.int64)),
        "copy_lists": (keys, np.array([5, 70, 0]), np.array([0, 4, 4, 24]), np.zeros(24, np.uint64)),
        "insert_keys": (keys.view(np.int64) % 50, 0, 90, np.zeros(256, np.int32), shift, np.zeros((90, 2), np.int64)),
        "shuffle": (np.arange(50, dtype=np.uint16), np.uint64(3)),
    }
    slots = np.zeros(256, np.int32)
    key_table.insert_keys(keys.view(np.int64), 0, 60, slots, shift, np.zeros((90, 2), np.int64))
    calls["find_keys"] = (keys.view(np.int64), keys.view(np.int64)[:60], slots, shift, np.zeros(90, np.int64))
    marks = keys.astype(np.uint32)
    pairs = (np.zeros(91, np.int64), np.zeros(91, np.int64))
    calls["find_fingerprints"] = (marks, offsets, marks[20:40], np.zeros(256, np.uint64), np.uint64(24), *pairs)
    lists = (offsets, rng.integers(0, 90, 90))
    some = (np.zeros(301, np.int64), np.zeros(301, np.int64))
    seeded = (7, np.uint64(keys[3]), np.zeros(5, np.int64), np.zeros(28, np.int64))
    calls["draw_from_lists"] = (np.array([0, 2, 2, 3, 5]), np.array([0, 2, -1, 3, 1]), *lists, *seeded)
    calls["find_columns"] = (*lists, np.array([3, -1, 1, 2, 0, 3, 3]), np.arange(-45, 45), *some)
    words = np.arange(900, dtype=np.int32) % 5
    at = words.ctypes.data
    heaps, places = np.arange(4, dtype=np.int32) % 3, np.array([20, 3, 0, 21])
    calls["place_rows"] = (heaps, np.array([20, 3, 0]), np.zeros(4, np.int64))
    columns = np.array([[at, 1, 100], [at + 8, 2, 200]])
    calls["put_columns"] = (columns, places, np.zeros(300, np.int32))
    of_lists = np.array([[offsets.ctypes.data, 0, at, 2, at + 4, 1], [offsets.ctypes.data, 30, at, 1, 0, 0]])
    bounds = np.zeros((3, 3, 2), np.int64)
    calls["put_lists"] = (of_lists, heaps, places, np.zeros(950, np.int32), 60, bounds)
    dealt = np.zeros(950, np.int32)
    bucket_kernels.put_lists(of_lists, heaps, np.array([0, 2, 3, 1]), dealt, 60, bounds)
    parts = np.array([[0, 1, 0], [2, 2, 30]]), np.array([[0, 2, 100], [0, 1, 400], [1, 1, 600]])
    some = (dealt, np.array([0, 2, 3, 4]), np.stack([bounds, bounds]))
    calls["copy_bucket"] = (*some, 0, 1, np.zeros((2, 4), np.int64), 4, *parts, np.zeros(900, np.int32))
    calls["put_lengths"] = (offsets, np.full(6, 9, np.int32))
    calls["put_divisors"] = (offsets, True, np.float32(2), np.full(6, 9, np.float32))
    calls["mark_distinct"] = (words, np.zeros(2, np.uint64), np.zeros(900, np.int64), np.full(70, -1))
    calls["mark_buckets"] = (np.arange(90)[::-1].copy(), np.array([0, 0, 30, 90]), np.full(90, 9, np.int32))
    calls["count_before"] = (words.astype(np.uint16), np.array([0, 7, 7, 900]), np.zeros((4, 5), np.int64))
    calls["mix_key"] = (np.uint64(keys[5]),)
    calls["multiplicative_hash"] = (np.uint64(keys[5]),)
    found = {}
    for module in (bucket_kernels, hashing, kernels, key_table, ragged):
        found |= kernels_of(module)
    assert set(found) == set(calls)
    for name, arguments in calls.items():
        ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
        assert in_plain_python(found[name])(*ours) == found[name](*theirs), name
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


@given(st.sets(st.integers(0, 400), max_size=50), st.lists(st.lists(st.integers(0, 400), max_size=9), max_size=9))
def test_pairs_by_fingerprint_are_those_of_a_loop(candidates, rows):
    """Every item of a row that is a candidate, each time it stands there, in the rows' order."""
    item_C = np.array(sorted(candidates), np.int64)
    lists = Ragged.from_lists(rows)
    hashed = Ragged(lists.offsets, fingerprints(lists.values))
    row, column = pairs_by_fingerprint(hashed, fingerprints(item_C))
    place = {int(item): number for number, item in enumerate(item_C)}
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
        (number, place[item]) for number, items in enumerate(rows) for item in items if item in place
    ]


def test_every_permutation_is_as_likely_as_any_other():
    """Of 4 things, over 24,000 seeds (chi-square, 23 degrees of freedom, p = 0.001)."""
    count = dict.fromkeys(permutations(range(4)), 0)
    for seed in range(24_000):
        values = np.arange(4, dtype=np.int32)
        kernels.shuffle(values, np.uint64(mix(seed)))
        count[tuple(values.tolist())] += 1
    assert sum((found - 1_000) ** 2 / 1_000 for found in count.values()) < 49.7


def test_a_long_permutation_leaves_no_trace_of_the_order_before():
    """Of 100,000 places the correlation with the old ones is within five standard errors of none."""
    values = np.arange(100_000, dtype=np.int32)
    kernels.shuffle(values, np.uint64(5))
    assert sorted(values.tolist()) == list(range(100_000))
    assert abs(np.corrcoef(values, np.arange(100_000))[0, 1]) < 5 / np.sqrt(100_000)
    again = np.arange(100_000, dtype=np.int32)
    kernels.shuffle(again, np.uint64(6))
    assert (values != again).mean() > 0.99
