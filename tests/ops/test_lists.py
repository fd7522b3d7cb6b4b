"""Lists in two flat arrays do what plain Python lists do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trec_twotower.ops.ragged import Ragged, offsets_of, weights_of

ROWS = st.lists(st.lists(st.integers(-1, 12), max_size=6), max_size=8)
SOME_ROWS = ROWS.filter(bool)


def plain(lists: Ragged) -> list[list[int]]:
    ends = lists.offsets.tolist()
    return [lists.values[start:end].tolist() for start, end in pairwise(ends)]


def plain_weights(lists: Ragged) -> list[list[float]]:
    return plain(Ragged(lists.offsets, lists.weights))


def weighted(rows: list[list[int]]) -> Ragged:
    """Each value with a weight that tells its row and place: 10 r + j."""
    lists = Ragged.from_lists(rows)
    weights = [10.0 * r + j for r, row in enumerate(rows) for j in range(len(row))]
    return Ragged(lists.offsets, lists.values, np.array(weights, np.float32))


@given(ROWS)
def test_lists_come_back(rows):
    lists = Ragged.from_lists(rows)
    assert plain(lists) == rows
    assert len(lists) == len(rows)
    assert lists.lengths.tolist() == [len(row) for row in rows]
    assert lists.rows.tolist() == [r for r, row in enumerate(rows) for _ in row]
    assert lists.offsets.dtype == lists.values.dtype == np.int64


def test_singles_and_empty():
    assert plain(Ragged.singles(np.array([7, 8]))) == [[7], [8]]
    assert plain(Ragged.empty(3)) == [[], [], []]
    assert offsets_of([2, 0, 1]).tolist() == [0, 2, 2, 3]


@given(SOME_ROWS, st.data())
def test_take_picks_rows_in_any_order_with_their_weights(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10))
    taken = weighted(rows).take(np.array(chosen, np.int64))
    assert plain(taken) == [rows[r] for r in chosen]
    assert plain_weights(taken) == [[10.0 * r + j for j in range(len(rows[r]))] for r in chosen]


@given(ROWS, st.data())
def test_where_keeps_the_marked_values_and_all_rows(rows, data):
    keep = [[data.draw(st.booleans()) for _ in row] for row in rows]
    kept = weighted(rows).where(np.array([is_kept for row in keep for is_kept in row], bool))
    assert plain(kept) == [[v for v, k in zip(row, ks, strict=True) if k] for row, ks in zip(rows, keep, strict=True)]
    assert plain_weights(kept) == [[10.0 * r + j for j, k in enumerate(ks) if k] for r, ks in enumerate(keep)]


@given(ROWS, st.integers(1, 7) | st.none())
def test_newest_keeps_the_last_values(rows, max_length):
    newest = weighted(rows).newest(max_length)
    first = [max(len(row) - max_length, 0) if max_length else 0 for row in rows]
    assert plain(newest) == [row[start:] for row, start in zip(rows, first, strict=True)]
    assert plain_weights(newest) == [
        [10.0 * r + j for j in range(start, len(rows[r]))] for r, start in enumerate(first)
    ]


@given(ROWS)
def test_distinct_is_the_sorted_set(rows):
    assert plain(Ragged.from_lists(rows).distinct()) == [sorted(set(row)) for row in rows]


@given(SOME_ROWS, st.integers(0, 4), st.data())
def test_contain_is_membership_but_for_no_item(rows, width, data):
    asked = [[data.draw(st.integers(-1, 14)) for _ in range(width)] for _ in rows]
    found = Ragged.from_lists(rows).contain(np.array(asked, np.int64).reshape(len(rows), width))
    assert found.tolist() == [[v >= 0 and v in row for v in asks] for asks, row in zip(asked, rows, strict=True)]


@given(st.lists(st.tuples(ROWS, st.booleans()), min_size=1, max_size=4))
def test_concat_lays_rows_below_each_other_and_gives_weight_one_where_there_is_none(parts):
    whole = Ragged.concat([weighted(rows) if has_weights else Ragged.from_lists(rows) for rows, has_weights in parts])
    assert plain(whole) == [row for rows, _ in parts for row in rows]
    if any(has_weights for _, has_weights in parts):
        assert plain_weights(whole) == [
            [10.0 * r + j if has_weights else 1.0 for j in range(len(row))]
            for rows, has_weights in parts
            for r, row in enumerate(rows)
        ]
    else:
        assert whole.weights is None
        assert weights_of(whole).tolist() == [1.0] * len(whole.values)
