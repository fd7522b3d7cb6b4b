"""From outside ids to table rows: the same result in numpy, in torch, in training and at serving.

An id is a 64-bit key (an int64 itself; a string's XXH3-64). Its bucket is

    mix(key ^ mix(seed)) >> 32, times num_buckets, >> 32

where mix is the finaliser of splitmix64 (Steele, Lea and Flood 2014) and the last two steps are the multiply-shift
reduction to a range (Lemire 2019), which needs no division. Both are fixed for good: tests hold golden values.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from trec_twotower.errors import DataError
from trec_twotower.ops.kernels import IS_COMPILED, hash_keys, mix_keys

if TYPE_CHECKING:  # offline jobs hash without torch
    from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
BLOCK = 16_384  # ids at a time, where numpy hashes: stays in the second-level cache
MAX_BUCKETS = 1 << 32
RECENT_WORDS = 1 << 16  # dictionaries larger than this are not kept
_MASK = (1 << 64) - 1
_recent: deque[tuple[pa.Array, np.ndarray]] = deque(maxlen=16)  # the last small text columns and their keys


def mix(key: int) -> int:
    """The 64-bit finaliser for one Python integer: the definition the fast forms are tested against."""
    key = (key + GOLDEN) & _MASK
    key = ((key ^ (key >> SHIFTS[0])) * FACTORS[0]) & _MASK
    key = ((key ^ (key >> SHIFTS[1])) * FACTORS[1]) & _MASK
    return key ^ (key >> SHIFTS[2])


def mix_array(keys: np.ndarray) -> np.ndarray:
    """`mix` of every uint64 (or int64) key, as uint64."""
    out = np.empty(keys.size, np.uint64)
    flat = keys.reshape(-1).view(np.uint64)
    if IS_COMPILED:
        mix_keys(flat, out)
        return out.reshape(keys.shape)
    scratch = np.empty(min(BLOCK, keys.size), np.uint64)
    for start in range(0, keys.size, BLOCK):
        _mix_block(flat[start : start + BLOCK], out[start : start + BLOCK], scratch)
    return out.reshape(keys.shape)


def _mix_block(key: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    shifted = scratch[: key.size]
    np.add(key, np.uint64(GOLDEN), out=out)
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        np.right_shift(out, np.uint64(shift), out=shifted)
        np.bitwise_xor(out, shifted, out=out)
        if factor is not None:
            np.multiply(out, np.uint64(factor), out=out)


def hash_to_bucket(keys: np.ndarray, num_buckets: int, seed: int = 0) -> np.ndarray:
    """The bucket (0..num_buckets-1; int32 where that can hold it) of every int64 (or uint64) key."""
    _check_buckets(num_buckets)
    if keys.dtype not in (np.int64, np.uint64):
        raise ValueError(f"keys are {keys.dtype}, but a key has 64 bits: cast them, as in keys.astype(np.int64).")
    out = np.empty(keys.size, bucket_type(num_buckets))
    flat = np.ascontiguousarray(keys).reshape(-1).view(np.uint64)
    salt = np.uint64(mix(seed))
    if IS_COMPILED:
        hash_keys(flat, salt, np.uint64(num_buckets), out)
        return out
    mixed = np.empty(min(BLOCK, keys.size), np.uint64)
    scratch = np.empty_like(mixed)
    for start in range(0, keys.size, BLOCK):
        block = flat[start : start + BLOCK]
        part = mixed[: block.size]
        np.bitwise_xor(block, salt, out=part)
        _mix_block(part, part, scratch)
        part >>= np.uint64(32)
        part *= np.uint64(num_buckets)
        part >>= np.uint64(32)
        out[start : start + BLOCK] = part
    return out


def hash_to_bucket_torch(keys: Tensor, num_buckets: int, seed: int = 0) -> Tensor:
    """`hash_to_bucket` on a torch int64 tensor, on its device."""
    _check_buckets(num_buckets)
    mixed = mix_torch(keys ^ _signed(mix(seed)))
    return (((mixed >> 32) & 0xFFFFFFFF) * num_buckets >> 32) & 0xFFFFFFFF


def mix_torch(keys: Tensor) -> Tensor:
    """`mix` of int64 keys; the result's bits as int64. torch shifts carry the sign, hence the masks."""
    mixed = keys + _signed(GOLDEN)
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        mixed = mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            mixed = mixed * _signed(factor)
    return mixed


def modulo_bucket(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """key mod num_buckets, never negative: dense ids below num_buckets keep a row each."""
    return np.mod(keys, np.int64(num_buckets)).astype(bucket_type(num_buckets))


def bucket_type(num_buckets: int) -> type[np.signedinteger]:
    return np.int32 if num_buckets <= 1 << 31 else np.int64


def fingerprints(keys: np.ndarray) -> np.ndarray:
    """32 bits (uint32) of each key's mix, to tell items apart where 2^-32 is chance enough."""
    if not IS_COMPILED:
        return mix_array(keys).astype(np.uint32)
    out = np.empty(keys.size, np.uint32)
    mix_keys(keys.view(np.uint64), out)
    return out


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on all `parts` (integers or equally long int64 arrays) and on nothing else."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        keys = np.asarray(part, dtype=np.int64).reshape(-1).view(np.uint64)
        state = mix_array(state ^ keys)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def id_keys(ids: pa.Array, where: str) -> np.ndarray:
    """The 64-bit key of every id of an integer or string column without nulls; raises DataError naming `where`."""
    if ids.null_count:
        first = pc.index(ids.is_null(), pa.scalar(True)).as_py()
        raise DataError(
            f"{where}: {ids.null_count:,} of {len(ids):,} ids are null, the first in row {first:,}: remove these rows."
        )
    if pa.types.is_dictionary(ids.type):
        # Twice as fast as by brackets, where places have 32 bits.
        return id_keys(ids.dictionary, where).take(ids.indices.to_numpy(zero_copy_only=False))
    if pa.types.is_integer(ids.type):
        values = ids.to_numpy(zero_copy_only=False)
        return values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64, copy=False)
    if is_text(ids.type):
        return _text_keys(ids)
    raise DataError(f"{where}: ids are {ids.type}, but must be integers or strings: cast the column.")


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_id(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold ids."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or is_text(kind)


def _text_keys(ids: pa.Array) -> np.ndarray:
    """Each distinct string is hashed once, and a dictionary that comes again (a row group's) not at all."""
    for words, keys in list(_recent):
        if _are_same(words, ids):
            return keys
    encoded = ids.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.binary()).to_pylist()
    keys = np.fromiter(map(xxhash.xxh3_64_intdigest, distinct), np.uint64, len(distinct)).view(np.int64)
    keys = keys[encoded.indices.to_numpy(zero_copy_only=False)] if len(ids) else keys
    if len(ids) <= RECENT_WORDS:
        _recent.append((ids, keys))
    return keys


def _are_same(one: pa.Array, other: pa.Array) -> bool:
    """Whether two arrays of strings are equal; parts of one table have their words in the same memory."""
    if len(one) != len(other):
        return False
    places = ([None if each is None else each.address for each in array.buffers()] for array in (one, other))
    return (one.offset == other.offset and next(places) == next(places)) or one.equals(other)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _check_buckets(num_buckets: int) -> None:
    if not 0 < num_buckets <= MAX_BUCKETS:
        raise ValueError(f"num_buckets is {num_buckets:,}, but must lie in 1..{MAX_BUCKETS:,}.")
