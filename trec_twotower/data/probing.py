"""Hash tables that are probed for a whole column at once: ids of the catalogue, candidates of a step."""

from __future__ import annotations

import numpy as np

from trec_twotower.data.hashing import mix_array

SLOT_BITS = 16


class FingerprintTable:
    """Candidates by fingerprint (uint32, see hashing.fingerprints).

    Two of the candidates share a fingerprint, or an item outside them has one of theirs, with a chance of 2^-32 a pair.
    """

    def __init__(self, fingerprint_C: np.ndarray) -> None:
        num_columns = len(fingerprint_C)
        self._fingerprint = np.append(fingerprint_C, np.uint32(0))  # the last one stands for an empty slot
        slot_C = fingerprint_C >> np.uint32(32 - SLOT_BITS)
        self._column = np.full(1 << SLOT_BITS, num_columns, np.int32)
        self._column[slot_C] = np.arange(num_columns, dtype=np.int32)
        # Candidates whose slot went to another one are kept in order, and asked where a slot has such.
        self._rest = np.flatnonzero(self._column[slot_C] != np.arange(num_columns))
        self._rest = self._rest[np.argsort(fingerprint_C[self._rest], kind="stable")]
        self._has_rest = np.zeros(1 << SLOT_BITS, bool)
        self._has_rest[slot_C[self._rest]] = True

    def find(self, fingerprints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of those that are candidates, and which: (place, column), both int64."""
        slot = fingerprints >> np.uint32(32 - SLOT_BITS)
        column = self._column[slot]
        is_found = self._fingerprint[column] == fingerprints
        place = np.flatnonzero(is_found)
        found = column[place].astype(np.int64)
        inside = found < len(self._fingerprint) - 1
        place, found = place[inside], found[inside]
        if not len(self._rest):
            return place, found
        asked = np.flatnonzero(self._has_rest[slot] & ~is_found)
        ordered = self._fingerprint[self._rest]
        at = np.minimum(np.searchsorted(ordered, fingerprints[asked]), len(ordered) - 1)
        is_rest = ordered[at] == fingerprints[asked]
        return np.concatenate([place, asked[is_rest]]), np.concatenate([found, self._rest[at[is_rest]]])


class KeyTable:
    """Distinct 64-bit keys by position: an open-addressing hash table, probed for many keys at once.

    At most half full, a probe ends after 1.5 looks on average; binary search would take one for every doubling.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        self._bits = max(4, (2 * len(keys)).bit_length())
        self._place = np.full(1 << self._bits, -1, np.int32)
        rest = np.arange(len(keys), dtype=np.int32)
        slot = self._slot(keys)
        while len(rest):  # each round, of those that want a free slot the last one gets it
            is_free = self._place[slot] < 0
            self._place[slot[is_free]] = rest[is_free]
            waits = self._place[slot] != rest
            rest, slot = rest[waits], (slot[waits] + 1) & (len(self._place) - 1)

    def _slot(self, keys: np.ndarray) -> np.ndarray:
        return (mix_array(keys) >> np.uint64(64 - self._bits)).astype(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each key (int64), -1 where there is none."""
        slot = self._slot(keys)
        place = self._place[slot]
        # An empty slot ends a search; another key's slot sends it on.
        rest = np.flatnonzero((place >= 0) & (self._keys[place] != keys))
        while len(rest):
            slot[rest] = (slot[rest] + 1) & (len(self._place) - 1)
            place[rest] = self._place[slot[rest]]
            rest = rest[(place[rest] >= 0) & (self._keys[place[rest]] != keys[rest])]
        return place.astype(np.int64)
