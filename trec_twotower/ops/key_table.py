"""Hash tables that are probed for a whole column at once: ids of the catalogue, candidates of a step."""

from __future__ import annotations

import numpy as np

from trec_twotower.ops.kernels import find_fingerprints, find_keys, insert_keys
from trec_twotower.ops.ragged import Lists


def pairs_by_fingerprint(lists: Lists, fingerprint_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (row, candidate) pairs, both int64, of candidates whose fingerprint is on a row's list, in the rows' order.

    Fingerprints (see hashing.fingerprints) are uint32: of two candidates that share one, one is found, and an item
    outside the candidates is taken for one of them, with a chance of 2^-32 a pair.
    """
    bits = max(4, (8 * len(fingerprint_C)).bit_length())
    row_M, column_M = (np.empty(len(lists.values) + 1, np.int64) for _ in range(2))  # the last place is for no pair
    slots = np.empty(1 << bits, np.uint64)
    shift = np.uint64(32 - bits)
    count = find_fingerprints(lists.values, lists.offsets, fingerprint_C, slots, shift, row_M, column_M)
    return row_M[:count], column_M[:count]


class KeyTable:
    """Distinct 64-bit keys by position: an open-addressing hash table, probed for many keys at once.

    At most half full, a probe ends after 1.5 looks on average; binary search would take one for every doubling. A slot
    holds a position + 1; 0 marks an empty one, so that an array of zeros is an empty table.
    """

    def __init__(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Over `keys`, of which those in `slots` (int32, `num_slots` of them) are taken up already."""
        assert len(keys) < 1 << 31 and len(slots) == self.num_slots(len(keys))
        self._keys = keys
        self._slots = slots
        self._shift = np.uint64(65 - len(slots).bit_length())

    @staticmethod
    def num_slots(num_keys: int) -> int:
        return 1 << max(4, (2 * num_keys).bit_length())

    def insert(self, start: int, stop: int) -> np.ndarray:
        """Take up the keys at positions start .. stop - 1.

        Of a key that is there already, the new position is left out and returned with the one that is there: int64
        (doubles, 2).
        """
        doubles = np.empty((stop - start, 2), np.int64)
        return doubles[: insert_keys(self._keys, start, stop, self._slots, self._shift, doubles)]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each key (int64), -1 where there is none."""
        place = np.empty(len(keys), np.int64)
        find_keys(keys, self._keys, self._slots, self._shift, place)
        return place
