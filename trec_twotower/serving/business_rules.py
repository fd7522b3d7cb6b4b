"""Business rules on retrieved items: pure functions on (scores, item rows)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trec_twotower.errors import ConfigError
from trec_twotower.ops.ragged import Ragged
from trec_twotower.ops.topk import find_repeats, first_allowed


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules on what may be shown. Per-item arrays are indexed by item row; a rule of None is off."""

    exclude: Ragged | None = None  # item rows never shown to each user, a list per row of scores
    hidden_I: np.ndarray | None = None  # bool: never shown to anyone (sold out, withdrawn)
    boost_I: np.ndarray | None = None  # added to the item's score
    group_I: np.ndarray | None = None  # code of the item's group (category, seller); -1 = in none
    max_per_group: int | None = None  # items of one group shown to one user

    def __post_init__(self) -> None:
        if (self.group_I is None) != (self.max_per_group is None):
            missing = "group_I" if self.group_I is None else "max_per_group"
            raise ConfigError(f"The rules limit groups but lack {missing}: give group_I and max_per_group both.")
        if self.max_per_group is not None and self.max_per_group < 1:
            raise ConfigError(
                f"max_per_group is {self.max_per_group}, which would show nothing: give 1 or more, or None."
            )
        sizes = {
            name: len(array)
            for name in ("hidden_I", "boost_I", "group_I")
            if (array := getattr(self, name)) is not None
        }
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"The rules' arrays must all have one entry per item, but have {sizes}.")


def apply_rules(score_BK: np.ndarray, item_row_BK: np.ndarray, k: int, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Return the best `k` of each row that the rules allow, by boosted score: (scores, item rows), both B x k.

    Equal scores are ordered by item row. Boosts are added first, then hidden and excluded items are removed, then
    groups are limited, so that hidden items do not count in their group. A repeated item is returned once, with its
    higher score. Rows that run short end in -inf and -1: fetch more than `k` if so.
    """
    if score_BK.shape != item_row_BK.shape:
        raise ConfigError(f"Scores of shape {score_BK.shape} against item rows of shape {item_row_BK.shape}.")
    is_item_BK = item_row_BK >= 0
    safe_row_BK = np.where(is_item_BK, item_row_BK, 0)
    if rules.boost_I is not None and is_item_BK.any():
        boost_BK = rules.boost_I[safe_row_BK].astype(score_BK.dtype)
        score_BK = np.where(is_item_BK, score_BK + boost_BK, score_BK)
    order_BK = np.lexsort((safe_row_BK, -score_BK))
    score_BK, item_row_BK, safe_row_BK, keep_BK = (
        np.take_along_axis(matrix_BK, order_BK, axis=1)
        for matrix_BK in (score_BK, item_row_BK, safe_row_BK, is_item_BK)
    )
    if rules.exclude is not None:
        keep_BK &= ~rules.exclude.contain(item_row_BK)
    if rules.hidden_I is not None and keep_BK.any():
        keep_BK &= ~rules.hidden_I[safe_row_BK]
    keep_BK &= ~find_repeats(item_row_BK)
    if rules.group_I is not None and keep_BK.any():
        group_BK = np.where(keep_BK, rules.group_I[safe_row_BK], -1)
        keep_BK &= (group_BK < 0) | (_place_in_group(group_BK) < rules.max_per_group)
    score_BK, item_row_BK = first_allowed(keep_BK, k, (score_BK, -np.inf), (item_row_BK, -1))
    return score_BK, item_row_BK


def _place_in_group(group_BK: np.ndarray) -> np.ndarray:
    """Return the number of entries further left in the row that have the same group."""
    order_BK = np.argsort(group_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(group_BK, order_BK, axis=1)
    column_BK = np.broadcast_to(np.arange(group_BK.shape[1]), group_BK.shape)
    is_first_BK = np.ones(group_BK.shape, dtype=bool)
    is_first_BK[:, 1:] = sorted_BK[:, 1:] != sorted_BK[:, :-1]
    run_start_BK = np.maximum.accumulate(np.where(is_first_BK, column_BK, 0), axis=1)
    place_BK = np.empty(group_BK.shape, dtype=np.int64)
    np.put_along_axis(place_BK, order_BK, column_BK - run_start_BK, axis=1)
    return place_BK
