"""Random numbers that are functions of the seed, of a purpose and of what they are drawn for."""

from __future__ import annotations

import hashlib

import numpy as np

from trec_twotower.ops.hashing import SPLITMIX_FACTORS, SPLITMIX_STEP, mix_array

_MASK_63 = np.uint64(2**63 - 1)


class Chance:
    """Draws by splitmix64, seeded by the dataset's seed and the purpose."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._salts: dict[str, np.uint64] = {}

    def __call__(self, what: str, number: np.ndarray, draw: np.ndarray | int | None = None) -> np.ndarray:
        """Return a value in [0, 1) per number (and draw): a function of these, the seed and the purpose `what`."""
        bits = _output(self._salt(what), number)
        if draw is not None:
            bits = _output(bits, np.atleast_1d(draw))
        return (bits >> np.uint64(11)) * 2.0**-53

    def normal(self, what: str, number: np.ndarray) -> np.ndarray:
        """Return standard normal numbers (Box and Muller 1958)."""
        radius = np.sqrt(-2 * np.log1p(-self(f"{what}, radius", number)))
        return radius * np.cos(2 * np.pi * self(f"{what}, angle", number))

    def sparse_id(self, what: str, number: np.ndarray) -> np.ndarray:
        """Return sparse 63-bit ids, a different one for every number: each step is invertible."""
        bits = (number.astype(np.uint64) ^ self._salt(what)) & _MASK_63
        for factor in SPLITMIX_FACTORS:
            bits = ((bits ^ (bits >> np.uint64(32))) * factor) & _MASK_63
        return (bits ^ (bits >> np.uint64(32))).astype(np.int64)

    def _salt(self, what: str) -> np.uint64:
        if what not in self._salts:
            digest = hashlib.blake2b(f"{self.seed}/{what}".encode(), digest_size=8)
            self._salts[what] = np.uint64(int.from_bytes(digest.digest(), "little"))
        return self._salts[what]


def _output(seed: np.ndarray | np.uint64, number: np.ndarray) -> np.ndarray:
    """Return the outputs of splitmix64 with these seeds; output 1 is the first."""
    return mix_array(seed + (number.astype(np.uint64) - np.uint64(1)) * SPLITMIX_STEP)
