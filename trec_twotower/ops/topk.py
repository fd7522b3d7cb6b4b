"""Operations on ranked rows of items: the first allowed entries, repeats, and blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_CELLS = 1 << 22  # entries of one block's user x item matrix, which bounds the memory of blockwise work


def first_allowed(is_allowed_BC: np.ndarray, k: int, *columns: tuple[np.ndarray, float]) -> tuple[np.ndarray, ...]:
    """Return the first `k` allowed entries of each row, in order, for each (matrix (B, C), fill value) pair."""
    place_BC = np.cumsum(is_allowed_BC, axis=1) - 1
    row, column = np.nonzero(is_allowed_BC & (place_BC < k))
    place = place_BC[row, column]
    results = []
    for matrix_BC, fill_value in columns:
        result_BK = np.full((len(matrix_BC), k), fill_value, dtype=matrix_BC.dtype)
        result_BK[row, place] = matrix_BC[row, column]
        results.append(result_BK)
    return tuple(results)


def blocks_by_length(lengths: np.ndarray, extra: int) -> Iterator[np.ndarray]:
    """Yield rows in groups of similar length; a group's rows x (longest + `extra`) is within MAX_CELLS.

    A user with a long list therefore widens only a small group. The longest list of a group (plus `extra`) is at most
    twice the shortest.
    """
    order = np.argsort(lengths, kind="stable")
    width = lengths[order] + extra
    start = 0
    while start < len(order):
        stop = int(np.searchsorted(width, 2 * max(int(width[start]), 1), side="right"))
        stop = min(stop, start + max(1, MAX_CELLS // max(int(width[stop - 1]), 1)))
        yield order[start:stop]
        start = stop


def find_repeats(item_row_BK: np.ndarray) -> np.ndarray:
    """Return whether (bool, B x K) an entry repeats an earlier item of its row; -1 (no item) never does."""
    order_BK = np.argsort(item_row_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(item_row_BK, order_BK, axis=1)
    is_repeat_BK = np.zeros(item_row_BK.shape, dtype=bool)
    is_repeat_BK[:, 1:] = (sorted_BK[:, 1:] == sorted_BK[:, :-1]) & (sorted_BK[:, 1:] >= 0)
    repeats_BK = np.zeros(item_row_BK.shape, dtype=bool)
    np.put_along_axis(repeats_BK, order_BK, is_repeat_BK, axis=1)
    return repeats_BK
