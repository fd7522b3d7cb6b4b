"""Hashing of external ids to table rows, with equal results in numpy and torch, in training and serving.

An id is a 64-bit key (an int64 itself; the XXH3-64 of a string). Its bucket is

    mix(key ^ mix(seed)) >> 32, times num_buckets, >> 32

where `mix` computes the first output of splitmix64 (Steele, Lea and Flood 2014) seeded with the key, and the last two
steps are the multiply-shift reduction to a range (Lemire 2019), which needs no division. Neither ever changes: tests
compare them with golden values.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from trec_twotower.errors import DataError
from trec_twotower.ops.compilation import kernel

if TYPE_CHECKING:  # offline jobs hash without torch
    from torch import Tensor

SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
SPLITMIX_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
MAX_BUCKETS = 1 << 32
RECENT_STRINGS = 1 << 16  # rows; keys of longer text columns are not cached
_MASK = (1 << 64) - 1
_FACTOR_1, _FACTOR_2 = SPLITMIX_FACTORS
_SHIFT_1, _SHIFT_2, _SHIFT_3 = (np.uint64(bits) for bits in (30, 27, 31))
_recent: deque[tuple[pa.Array, np.ndarray]] = deque(maxlen=16)  # recent short text columns and their keys


@kernel
def mix_key(key: np.uint64) -> np.uint64:
    """Return the first output of splitmix64 seeded with `key`; for other compiled loops."""
    key = key + SPLITMIX_STEP
    key = (key ^ (key >> _SHIFT_1)) * _FACTOR_1
    key = (key ^ (key >> _SHIFT_2)) * _FACTOR_2
    return key ^ (key >> _SHIFT_3)


def mix(key: int) -> int:
    """Return `mix_key` of the low 64 bits of a Python integer."""
    return int(mix_key(np.uint64(key & _MASK)))


def mix_array(keys: np.ndarray) -> np.ndarray:
    """Return `mix_key` of every uint64 (or int64) key, as uint64, in the shape of `keys`."""
    out = np.empty(keys.size, np.uint64)
    _mix_keys(keys.reshape(-1).view(np.uint64), out)
    return out.reshape(keys.shape)


def mix_torch(keys: Tensor) -> Tensor:
    """Return the bits of `mix_key` of int64 keys as int64. torch's right shifts copy the sign, hence the masks."""
    mixed = keys + signed(int(SPLITMIX_STEP))
    for shift, factor in ((_SHIFT_1, _FACTOR_1), (_SHIFT_2, _FACTOR_2), (_SHIFT_3, None)):
        mixed = mixed ^ ((mixed >> int(shift)) & ((1 << (64 - int(shift))) - 1))
        if factor is not None:
            mixed = mixed * signed(int(factor))
    return mixed


def signed(value: int) -> int:
    """Return the int64 that has the bits of a uint64."""
    return value - (1 << 64) if value >> 63 else value


@kernel
def _mix_keys(keys: np.ndarray, out: np.ndarray) -> None:
    """Write the mix of each uint64 key to `out`, cut to the width of `out`."""
    for i in range(keys.size):
        out[i] = mix_key(keys[i])


@kernel
def _hash_keys(keys: np.ndarray, salt: np.uint64, num_buckets: np.uint64, out: np.ndarray) -> None:
    """Write the bucket of each uint64 key to `out`."""
    for i in range(keys.size):
        out[i] = ((mix_key(keys[i] ^ salt) >> np.uint64(32)) * num_buckets) >> np.uint64(32)


@kernel
def multiplicative_hash(key: np.uint64) -> np.uint64:
    """Return the high 32 bits of key * 2^64 / golden ratio (Knuth): cheaper than `mix_key`, and weaker."""
    return (key * SPLITMIX_STEP) >> np.uint64(32)


def hash_to_bucket(keys: np.ndarray, num_buckets: int, seed: int = 0) -> np.ndarray:
    """Return the bucket of every int64 (or uint64) key: 0 .. num_buckets - 1, int32 if wide enough, else int64."""
    _check_buckets(num_buckets)
    if keys.dtype not in (np.int64, np.uint64):
        raise ValueError(f"keys are {keys.dtype}, but a key has 64 bits: cast them, as in keys.astype(np.int64).")
    out = np.empty(keys.size, bucket_type(num_buckets))
    flat = np.ascontiguousarray(keys).reshape(-1).view(np.uint64)
    _hash_keys(flat, np.uint64(mix(seed)), np.uint64(num_buckets), out)
    return out


def hash_to_bucket_torch(keys: Tensor, num_buckets: int, seed: int = 0) -> Tensor:
    """Return `hash_to_bucket` of a torch int64 tensor, on its device, as int64."""
    _check_buckets(num_buckets)
    mixed = mix_torch(keys ^ signed(mix(seed)))
    return (((mixed >> 32) & 0xFFFFFFFF) * num_buckets >> 32) & 0xFFFFFFFF


def modulo_bucket(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """Return key mod num_buckets, never negative: dense ids below num_buckets get one row each."""
    return np.mod(keys, np.int64(num_buckets)).astype(bucket_type(num_buckets))


def bucket_type(num_buckets: int) -> type[np.signedinteger]:
    """Return the narrower of int32 and int64 that holds every bucket."""
    return np.int32 if num_buckets <= 1 << 31 else np.int64


def fingerprints(keys: np.ndarray) -> np.ndarray:
    """Return the low 32 bits (uint32) of each key's mix: two items collide with probability 2^-32."""
    out = np.empty(keys.size, np.uint32)
    _mix_keys(keys.view(np.uint64), out)
    return out


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1) that are a function of all `parts` (integers or int64 arrays of one length)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        keys = np.asarray(part, dtype=np.int64).reshape(-1).view(np.uint64)
        state = mix_array(state ^ keys)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def id_keys(ids: pa.Array, where: str) -> np.ndarray:
    """Return the int64 key of every id of an integer or string column; a null raises a DataError that names `where`."""
    if ids.null_count:
        first = pc.index(ids.is_null(), pa.scalar(True)).as_py()
        raise DataError(
            f"{where}: {ids.null_count:,} of {len(ids):,} ids are null, the first in row {first:,}: remove these rows."
        )
    if pa.types.is_dictionary(ids.type):
        # With 32-bit indices `take` is twice as fast as indexing by brackets.
        return id_keys(ids.dictionary, where).take(ids.indices.to_numpy(zero_copy_only=False))
    if pa.types.is_integer(ids.type):
        values = ids.to_numpy(zero_copy_only=False)
        return values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64, copy=False)
    if is_text(ids.type):
        return _text_keys(ids)
    raise DataError(f"{where}: ids are {ids.type}, but must be integers or strings: cast the column.")


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_id(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold ids."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or is_text(kind)


def _text_keys(ids: pa.Array) -> np.ndarray:
    """Return the keys of strings; distinct strings are hashed once, and recent arrays are cached."""
    for strings, keys in list(_recent):
        if _are_same(strings, ids):
            return keys
    encoded = ids.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.binary()).to_pylist()
    keys = np.fromiter(map(xxhash.xxh3_64_intdigest, distinct), np.uint64, len(distinct)).view(np.int64)
    keys = keys[encoded.indices.to_numpy(zero_copy_only=False)] if len(ids) else keys
    if len(ids) <= RECENT_STRINGS:
        _recent.append((ids, keys))
    return keys


def _are_same(one: pa.Array, other: pa.Array) -> bool:
    """Return whether two arrays of strings are equal; arrays that share their memory need no comparison."""
    if len(one) != len(other):
        return False
    addresses = ([None if each is None else each.address for each in array.buffers()] for array in (one, other))
    return (one.offset == other.offset and next(addresses) == next(addresses)) or one.equals(other)


def _check_buckets(num_buckets: int) -> None:
    if not 0 < num_buckets <= MAX_BUCKETS:
        raise ValueError(f"num_buckets is {num_buckets:,}, but must be in 1..{MAX_BUCKETS:,}.")
