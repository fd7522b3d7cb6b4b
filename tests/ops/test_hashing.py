"""Ids hash to the same bucket everywhere and for ever, evenly, and apart from each other's seeds."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trec_twotower.errors import DataError
from trec_twotower.ops.hashing import (
    MAX_BUCKETS,
    hash_to_bucket,
    hash_to_bucket_torch,
    id_keys,
    is_id,
    mix,
    mix_array,
    mix_torch,
    modulo_bucket,
    uniform,
)

EXTREMES = [-(2**63), 2**63 - 1, -1, 0, 1, -(2**32), 2**32, 2**62]
INT64 = st.integers(-(2**63), 2**63 - 1)
BUCKETS = st.integers(1, MAX_BUCKETS) | st.sampled_from([1, 2, 3, 1000, 2**31, MAX_BUCKETS])


# The definition, written again from the papers in unbounded integers.


def slow_mix(key: int) -> int:
    z = (key + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z // 2**27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z // 2**31)


def slow_bucket(key: int, num_buckets: int, seed: int) -> int:
    high = slow_mix((key % 2**64) ^ slow_mix(seed)) // 2**32
    return high * num_buckets // 2**32


def slow_short_xxh3(text: bytes) -> int:
    """XXH3-64 of one to three bytes, by its specification."""
    secret = bytes.fromhex("b8fe6c3923a44bbe")
    flip = int.from_bytes(secret[:4], "little") ^ int.from_bytes(secret[4:], "little")
    combined = text[0] << 16 | text[len(text) >> 1] << 24 | text[-1] | len(text) << 8
    h = combined ^ flip
    h = (h ^ h >> 33) * 0xC2B2AE3D27D4EB4F % 2**64
    h = (h ^ h >> 29) * 0x165667B19E3779F9 % 2**64
    return h ^ h >> 32


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def sigmas(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square of these counts lies from that of an even draw."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_mix_is_splitmix64():
    """The published first outputs of the generator seeded with 0 and with 1234567."""
    golden = 0x9E3779B97F4A7C15
    assert [mix(i * golden) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix(1234567 + i * golden) for i in range(2)] == [6457827717110365317, 3203168211198807973]


@given(st.lists(INT64, min_size=1, max_size=20), BUCKETS, st.integers(0, 2**63 - 1))
def test_numpy_torch_and_plain_python_agree(ids, num_buckets, seed):
    keys = np.array(ids + EXTREMES)
    expected = [slow_bucket(key, num_buckets, seed) for key in keys.tolist()]
    assert hash_to_bucket(keys, num_buckets, seed).tolist() == expected
    assert hash_to_bucket_torch(torch.from_numpy(keys), num_buckets, seed).tolist() == expected
    assert all(0 <= bucket < num_buckets for bucket in expected)
    mixed = [slow_mix(key % 2**64) for key in keys.tolist()]
    assert mix_array(keys).tolist() == [mix(key % 2**64) for key in keys.tolist()] == mixed
    assert mix_torch(torch.from_numpy(keys)).tolist() == [signed(value) for value in mixed]


@pytest.mark.parametrize("count", [0, 1, 16_384, 40_007])
def test_strided_keys_hash_like_contiguous_ones(rng, count):
    keys = rng.integers(-(2**63), 2**63 - 1, count)
    whole = hash_to_bucket(keys, 1 << 20)
    assert len(whole) == count
    assert np.array_equal(whole, hash_to_bucket_torch(torch.from_numpy(keys), 1 << 20).numpy())
    assert np.array_equal(hash_to_bucket(keys[::-3], 1 << 20), whole[::-3])


# Written down once: every trained model depends on these.
GOLDEN_INTEGERS = {
    (0, 1_000, 0): 652,
    (1, 1_000, 0): 34,
    (-1, 1_000, 0): 179,
    (123_456_789, 1_000_003, 0): 510_407,
    (123_456_789, 1_000_003, 7): 330_436,
    (2**63 - 1, 4_294_967_296, 0): 3_350_324_857,
    (-(2**63), 4_294_967_296, 1): 3_084_506_189,
}
GOLDEN_STRINGS = {
    "": 0x2D06800538D394C2,  # published with XXH3
    "a": 0xE6C632B61E964E1F,
    "abc": 0x78AF5F94892F3950,
    "ü€": 0x8A490AB827A7DEBC,
    "B000052YAN": 0x0AF3FC8EA4E623B9,
    "a text that is longer than sixteen bytes, and than 128: " * 5: 0xB8D071C571E13C1C,
}


@pytest.mark.parametrize(("case", "expected"), GOLDEN_INTEGERS.items())
def test_buckets_of_integers_stay_what_they_are(case, expected):
    key, num_buckets, seed = case
    assert hash_to_bucket(np.array([key]), num_buckets, seed).tolist() == [expected]


@pytest.mark.parametrize(("text", "expected"), GOLDEN_STRINGS.items())
def test_keys_of_strings_stay_what_they_are(text, expected):
    assert id_keys(pa.array([text]), "here").tolist() == [signed(expected)]


@given(st.lists(st.text(max_size=12), max_size=20))
def test_a_string_has_one_key_however_arrow_holds_it(words):
    expected = [signed(xxhash.xxh3_64_intdigest(word.encode())) for word in words]
    short = [key for key, word in zip(expected, words, strict=True) if 1 <= len(word.encode()) <= 3]
    assert short == [signed(slow_short_xxh3(word.encode())) for word in words if 1 <= len(word.encode()) <= 3]
    plain = pa.array(words, pa.string())
    around = pa.array(["x", *words, "y"], pa.string()).slice(1, len(words))
    for array in (
        plain,
        around,
        plain.cast(pa.large_string()),
        pa.array(words, pa.string_view()),
        plain.dictionary_encode(),
        around.dictionary_encode(),
        pa.array(["x", *words, "y"], pa.string()).dictionary_encode().slice(1, len(words)),
    ):
        assert id_keys(array, "here").tolist() == expected
        assert is_id(array.type)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()])
def test_an_integer_is_its_own_key_whatever_its_width(kind):
    array = pa.array([9, 0, 5, 100, 5], kind)
    for held in (array, array.slice(1, 3), array.dictionary_encode(), array.dictionary_encode().slice(1, 3)):
        assert id_keys(held, "here").tolist() == held.to_pylist()
        assert id_keys(held, "here").dtype == np.int64


def test_unsigned_ids_above_the_middle_keep_their_bits():
    assert id_keys(pa.array([2**64 - 1, 2**63], pa.uint64()), "here").tolist() == [-1, -(2**63)]


@pytest.mark.parametrize("array", [pa.array([1, None, 3, None]), pa.array(["a", None, "b", None])])
def test_a_null_id_is_named_by_its_row(array):
    for held in (array, array.dictionary_encode()):
        with pytest.raises(DataError, match=r"here: 2 of 4 ids are null, the first in row 1: remove"):
            id_keys(held, "here")


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1.0]),
        pa.array([True]),
        pa.array([b"a"]),
        pa.array([[1]]),
        pa.array([None]),
        pa.array([1.0]).cast("f4"),
    ],
)
def test_what_is_no_id_is_refused_by_its_type(array):
    assert not is_id(array.type)
    if not array.null_count:
        with pytest.raises(DataError, match=rf"here: ids are {re.escape(str(array.type))}, but must be integers"):
            id_keys(array, "here")


@pytest.mark.parametrize("num_buckets", [0, -1, MAX_BUCKETS + 1])
def test_a_table_has_between_one_and_two_to_the_32_buckets(num_buckets):
    with pytest.raises(ValueError, match="must be in 1"):
        hash_to_bucket(np.array([1]), num_buckets)
    with pytest.raises(ValueError, match="must be in 1"):
        hash_to_bucket_torch(torch.tensor([1]), num_buckets)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.float64])
def test_keys_of_other_widths_are_refused(kind):
    """Of two narrow keys the bits would be one key's, and half of the buckets whatever was in memory."""
    with pytest.raises(ValueError, match=rf"keys are {np.dtype(kind)}, but a key has 64 bits: cast"):
        hash_to_bucket(np.array([1, 2, 3, 4], kind), 100)


@given(st.lists(INT64, max_size=20), st.integers(1, 2**40))
def test_modulo_is_pythons(ids, num_buckets):
    assert modulo_bucket(np.array(ids, np.int64), num_buckets).tolist() == [key % num_buckets for key in ids]


KEY_SETS = {
    "rising": np.arange(200_000),
    "negative": -np.arange(200_000),
    "multiples of 2^20": np.arange(200_000) << 20,
    "multiples of the golden ratio": np.arange(200_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
    "times of day": 1_700_000_000_000 + 1000 * np.arange(200_000),
}


@pytest.mark.parametrize("keys", KEY_SETS.values(), ids=KEY_SETS)
@pytest.mark.parametrize("num_buckets", [1000, 1024])
def test_buckets_are_even(keys, num_buckets):
    counts = np.bincount(hash_to_bucket(keys.view(np.int64), num_buckets), minlength=num_buckets)
    assert abs(sigmas(counts)) < 5


def test_buckets_of_strings_are_even():
    keys = id_keys(pa.array([f"user-{number}" for number in range(50_000)]), "here")
    assert abs(sigmas(np.bincount(hash_to_bucket(keys, 500), minlength=500))) < 5


@pytest.mark.parametrize("load", [0.1, 1.0, 4.0])
def test_ids_collide_as_often_as_chance_has_it(load):
    """n ids thrown into m buckets fill m (1 - (1 - 1/m)^n) of them, give or take (Johnson and Kotz 1977)."""
    m = 1 << 16
    n = int(load * m)
    filled = len(np.unique(hash_to_bucket(np.arange(n), m)))
    expected = m * (1 - (1 - 1 / m) ** n)
    spread = math.sqrt(m * math.exp(-load) * (1 - (1 + load) * math.exp(-load)))
    assert abs(filled - expected) < 5 * spread


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, 2**40)])
def test_seeds_hash_independently(seeds):
    """The pairs of buckets under two seeds fill their square evenly."""
    first, second = (hash_to_bucket(np.arange(100_000), 20, seed) for seed in seeds)
    assert abs(sigmas(np.bincount(first * 20 + second, minlength=400))) < 5


def test_uniform_numbers_have_the_mean_spread_and_evenness_of_chance():
    n = 200_000
    numbers = uniform(3, np.arange(n))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(numbers.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert abs(sigmas(np.bincount((numbers * 100).astype(int), minlength=100))) < 5


def test_uniform_numbers_of_neighbours_are_independent():
    """Streams of seeds, epochs and rows beside each other: their pairs fill the square evenly."""
    n = np.arange(100_000)
    base = uniform(1, 0, n)
    for other in (uniform(2, 0, n), uniform(1, 1, n), uniform(1, 0, n + 1), uniform(0, 1, n), uniform(1, 0, n, 0)):
        pairs = (base * 20).astype(int) * 20 + (other * 20).astype(int)
        assert abs(sigmas(np.bincount(pairs, minlength=400))) < 5


@given(st.lists(INT64, min_size=1, max_size=10), INT64, st.integers(0, 2**63 - 1))
def test_a_uniform_number_depends_on_its_parts_alone(row, position, seed):
    """Arrays and integers alike: each number is the chain of mixes, cut to 53 bits."""

    def slow(*parts: int) -> float:
        state = 0
        for part in parts:
            state = slow_mix(state ^ part % 2**64)
        return (state >> 11) / 2**53

    rows = np.array(row)
    positions = np.full(len(rows), position)
    assert uniform(seed, rows, position).tolist() == [slow(seed, r, position) for r in row]
    assert uniform(seed, rows, positions).tolist() == [slow(seed, r, position) for r in row]
    assert uniform(rows, seed).tolist() == [slow(r, seed) for r in row]
    assert uniform(seed, row[0]).tolist() == [slow(seed, row[0])]


def test_hashing_needs_no_torch():
    code = "import sys, trec_twotower.ops.hashing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_parts_of_one_array_of_words_are_told_apart():
    """They lie in the same memory, and what was hashed before is looked up by where it lies."""
    words = ["ant", "bee", "cow", "dog"]
    array = pa.array(words)
    for start, length in ((0, 3), (1, 3), (0, 3), (2, 2), (0, 2), (1, 3)):
        wanted = [xxhash.xxh3_64_intdigest(word.encode()) for word in words[start : start + length]]
        assert id_keys(array.slice(start, length), "here").view(np.uint64).tolist() == wanted
        by_word = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int32()), array.slice(start, length))
        assert id_keys(by_word, "here").view(np.uint64).tolist() == [wanted[1], wanted[0], wanted[1]]


@pytest.mark.parametrize("dictionaries", [[], ["word"]], ids=["plain", "by dictionary"])
def test_text_that_is_not_utf_8_is_hashed_by_its_bytes(tmp_path, dictionaries):
    """Parquet lets it through; nothing here decodes it."""
    raw = [b"\xff\xfe", b"plain"]
    offsets = np.cumsum([0, *map(len, raw)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(raw))]
    pq.write_table(pa.table({"word": pa.Array.from_buffers(pa.string(), 2, buffers)}), tmp_path / "words.parquet")
    column = pq.ParquetFile(tmp_path / "words.parquet", read_dictionary=dictionaries).read()["word"].chunk(0)
    expected = [xxhash.xxh3_64_intdigest(word) for word in raw]
    assert id_keys(column, "words").view(np.uint64).tolist() == expected
