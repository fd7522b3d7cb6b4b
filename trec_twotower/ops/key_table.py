"""Hash tables that look up a whole column at once: ids of the catalogue, candidates of a step."""

from __future__ import annotations

import numpy as np

from trec_twotower.ops.compilation import kernel
from trec_twotower.ops.hashing import mix_key
from trec_twotower.ops.ragged import Ragged


def pairs_by_fingerprint(lists: Ragged, fingerprint_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (row, candidate), both int64, of candidates whose fingerprint is in a row, ordered by row.

    Fingerprints (see hashing.fingerprints) are uint32. If two candidates share one, one of them is found. An item that
    is not a candidate matches one with probability 2^-32 per pair.
    """
    bits = max(4, (8 * len(fingerprint_C)).bit_length())
    row_M, column_M = (np.empty(len(lists.values) + 1, np.int64) for _ in range(2))  # the last element is scratch
    slots = np.empty(1 << bits, np.uint64)
    shift = np.uint64(32 - bits)
    count = find_fingerprints(lists.values, lists.offsets, fingerprint_C, slots, shift, row_M, column_M)
    return row_M[:count], column_M[:count]


class KeyTable:
    """Maps distinct 64-bit keys to their positions: an open-addressing hash table that looks up many keys at once.

    The table is at most half full, so a probe reads 1.5 slots on average. A slot holds a position + 1; 0 marks an empty
    slot, so an array of zeros is an empty table.
    """

    def __init__(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Wrap `keys` and `slots` (int32, `num_slots` of them), which may already contain some of the keys."""
        assert len(keys) < 1 << 31 and len(slots) == self.num_slots(len(keys))
        self._keys = keys
        self._slots = slots
        self._shift = np.uint64(65 - len(slots).bit_length())

    @staticmethod
    def num_slots(num_keys: int) -> int:
        """Return the size of the slot array for a number of keys, a power of two."""
        return 1 << max(4, (2 * num_keys).bit_length())

    def insert(self, start: int, stop: int) -> np.ndarray:
        """Insert the keys at positions start .. stop - 1 and return the duplicates, int64 (duplicates, 2).

        A duplicate is not inserted. Its row holds the position of the equal key in the table and its own position.
        """
        duplicates = np.empty((stop - start, 2), np.int64)
        return duplicates[: insert_keys(self._keys, start, stop, self._slots, self._shift, duplicates)]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each key (int64), -1 for a key that is not in the table."""
        position = np.empty(len(keys), np.int64)
        find_keys(keys, self._keys, self._slots, self._shift, position)
        return position


@kernel
def insert_keys(
    keys: np.ndarray, start: int, stop: int, slots: np.ndarray, shift: np.uint64, duplicates: np.ndarray
) -> int:
    """Insert keys[start:stop] into the slots of a KeyTable; returns the number of duplicates.

    The pair (position in the table, position of the duplicate) of each is written to `duplicates`.
    """
    num_duplicates = 0
    last = slots.size - 1
    for position in range(start, stop):
        slot = np.int64(mix_key(np.uint64(keys[position])) >> shift)
        while slots[slot] != 0 and keys[slots[slot] - 1] != keys[position]:
            slot = (slot + 1) & last
        if slots[slot] == 0:
            slots[slot] = position + 1
        else:
            duplicates[num_duplicates, 0] = slots[slot] - 1
            duplicates[num_duplicates, 1] = position
            num_duplicates += 1
    return num_duplicates


@kernel
def find_keys(wanted: np.ndarray, keys: np.ndarray, slots: np.ndarray, shift: np.uint64, out: np.ndarray) -> None:
    """Write the position of each wanted key in a KeyTable to `out`, -1 for a key that is not in it."""
    last = slots.size - 1
    for i in range(wanted.size):  # first probe of all keys, so that memory accesses overlap
        out[i] = slots[np.int64(mix_key(np.uint64(wanted[i])) >> shift)]
    for i in range(wanted.size):
        entry = out[i]
        if entry != 0 and keys[entry - 1] != wanted[i]:
            slot = np.int64(mix_key(np.uint64(wanted[i])) >> shift)
            while entry != 0 and keys[entry - 1] != wanted[i]:
                slot = (slot + 1) & last
                entry = np.int64(slots[slot])
        out[i] = entry - 1


@kernel
def find_fingerprints(
    values: np.ndarray, offsets: np.ndarray, fingerprint_C: np.ndarray, slots: np.ndarray, shift: np.uint64,
    row_M: np.ndarray, column_M: np.ndarray,
) -> int:  # fmt: skip
    """Write the pairs of a row and a candidate whose fingerprint is in the row, ordered by row; returns their number.

    A slot holds the fingerprint and the column + 1. A hit and a miss on an empty slot both need one read and no
    unpredictable branch, which matters because up to half of the values match.
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
    num_pairs = 0
    for row in range(offsets.size - 1):
        for i in range(offsets[row], offsets[row + 1]):
            fingerprint = np.uint64(values[i])
            slot = np.int64(fingerprint >> shift)
            entry = slots[slot]
            while entry != np.uint64(0) and (entry >> np.uint64(32)) != fingerprint:
                slot = (slot + 1) & last
                entry = slots[slot]
            row_M[num_pairs] = row
            column_M[num_pairs] = np.int64(entry & low) - 1
            num_pairs += int(entry != np.uint64(0))
    return num_pairs
