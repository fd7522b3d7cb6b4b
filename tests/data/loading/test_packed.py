"""Heaps give back the rows that were dealt to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trec_twotower.data.features.columns import Columns
from trec_twotower.data.loading.examples import Examples, RowItems
from trec_twotower.data.loading.step_buckets import BucketedRows, Buffers, Layout, RowBucketer, take
from trec_twotower.ops.ragged import Ragged

# A row: id, list of ids, weighted words, two numbers, positives, history, weight, user's key.
ROWS = st.lists(
    st.tuples(
        st.integers(-(2**31), 2**31 - 1),
        st.lists(st.integers(0, 2**40), max_size=5),
        st.lists(st.tuples(st.integers(0, 99), st.floats(-9, 9, width=32)), max_size=4),
        st.tuples(st.floats(-9, 9, width=32), st.floats(-9, 9, width=32)),
        st.lists(st.integers(0, 2**62), max_size=3),
        st.lists(st.integers(0, 2**32 - 1), max_size=3),
        st.floats(0, 9, width=32),
        st.integers(-(2**63), 2**63 - 1),
    ),
    max_size=25,
)


def lists_of(rows: list[list[Any]], dtype: type, weights: list[list[float]] | None = None) -> Ragged:
    offsets = np.cumsum([0, *map(len, rows)])
    flat = None if weights is None else np.array([value for row in weights for value in row], np.float32)
    return Ragged(offsets, np.array([value for row in rows for value in row], dtype), flat)


def examples_of(rows: list[tuple]) -> Examples:
    country, wide, words, age, positives, history, weight, key = (
        map(list, zip(*rows, strict=True)) if rows else [[]] * 8
    )
    sparse = {
        "country": Ragged.singles(np.array(country, np.int32)),
        "wide": lists_of(wide, np.int64),
        "words": lists_of(
            [[word for word, _ in row] for row in words], np.int32, [[share for _, share in row] for row in words]
        ),
    }
    return Examples(
        Columns(len(rows), sparse, {"age": np.array(age, np.float32).reshape(-1, 2)}),
        lists_of(positives, np.int64),
        None,
        lists_of(history, np.uint32),
        np.array(weight, np.float32),
        user_key=np.array(key, np.int64),
    )


def rows_of(found: Examples) -> list[tuple]:
    """The rows again, as plain Python."""

    def split(lists: Ragged, values: np.ndarray) -> list[list]:
        return [part.tolist() for part in np.split(values, lists.offsets[1:-1])] if len(lists) else []

    words = found.user.sparse["words"]
    assert words.weights is not None and found.history is not None
    pairs = zip(split(words, words.values), split(words, words.weights), strict=True)
    return list(
        zip(
            found.user.sparse["country"].values.tolist(),
            split(found.user.sparse["wide"], found.user.sparse["wide"].values),
            [list(zip(*pair, strict=True)) for pair in pairs],
            map(tuple, found.user.numbers["age"].tolist()),
            split(found.positives, found.positives.values),
            split(found.history, found.history.values),
            found.weight.tolist(),
            found.user_key.tolist(),
            strict=True,
        )
    )


def packed_of(rows: list[tuple], heap_of: list[int], num_heaps: int, cuts: list[int], buffers: Buffers) -> BucketedRows:
    """The rows, added in parts, every second as a part of more rows."""
    packer = RowBucketer(np.array(heap_of, np.int32), num_heaps, buffers)
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        packer.add(examples_of(rows[start:stop]) if number % 2 == 0 else examples_of(rows).slice(start, stop))
    return packer.finish()


@settings(max_examples=40)
@given(ROWS, ROWS, st.data())
def test_a_heap_holds_its_rows_in_their_order(first, second, data):
    """Whatever the parts that were added, and over several units."""
    buffers, num_heaps = Buffers(), data.draw(st.integers(1, 4))
    units, heaps = [], []
    for rows in (first, second):
        heaps.append(data.draw(st.lists(st.integers(0, num_heaps - 1), min_size=len(rows), max_size=len(rows))))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
        units.append(packed_of(rows, heaps[-1], num_heaps, cuts, buffers))
    for heap in range(num_heaps):
        found = take([(unit, heap) for unit in units])
        wanted = [
            row for rows, of in zip((first, second), heaps, strict=True) for row, at in zip(rows, of, strict=True)
            if at == heap
        ]  # fmt: skip
        assert rows_of(found) == wanted


def test_a_layout_says_itself():
    layout = Layout.of(examples_of([]))
    assert Layout.from_json(layout.to_json()) == layout


@given(ROWS, st.data())
def test_items_alone_are_dealt_likewise(rows, data):
    heap_of = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    packer = RowBucketer(np.array(heap_of, np.int32), 3, Buffers())
    packer.add(examples_of(rows).items)
    packed = packer.finish()
    for heap in range(3):
        items = take([(packed, heap)])
        assert isinstance(items, RowItems) and items.given is None
        wanted = examples_of([row for row, at in zip(rows, heap_of, strict=True) if at == heap]).items
        assert items.positives.values.tolist() == wanted.positives.values.tolist()
        assert items.positives.offsets.tolist() == wanted.positives.offsets.tolist()
        assert items.user_key.tolist() == wanted.user_key.tolist()


def test_memory_is_used_again_when_its_rows_are_gone():
    rows = [(number, [], [], (0.0, 0.0), [number], [], 1.0, 0) for number in range(9)]
    buffers = Buffers()
    one, other = (packed_of(each, [0] * 9, 1, [], buffers) for each in (rows, rows[::-1]))
    assert rows_of(take([(one, 0)])) == rows and not np.shares_memory(one.buffer, other.buffer)
    memory = one.buffer
    del one
    again = packed_of(rows, [0] * 9, 1, [], buffers)
    assert np.shares_memory(again.buffer, memory)
    assert rows_of(take([(other, 0)])) == rows[::-1] and rows_of(take([(again, 0)])) == rows


def test_memory_grows_with_rows_that_are_longer_than_the_first():
    buffers = Buffers()
    rows = [(n, list(range(n * n)), [(1, 0.5)] * n, (1.0, 2.0), [n], [7] * n, 1.0, n) for n in range(120)]
    packer = RowBucketer(np.arange(120, dtype=np.int32) % 7, 7, buffers)
    packer.add(examples_of(rows[:10]))
    first = len(packer._buffer)
    packer.add(examples_of(rows[10:]))
    packed = packer.finish()
    assert len(packed.buffer) > first
    for heap in range(7):
        assert rows_of(take([(packed, heap)])) == rows[heap::7]


def test_rows_of_different_kinds_are_refused():
    packer = RowBucketer(np.zeros(2, np.int32), 1, Buffers())
    rows = [(1, [], [], (0.0, 0.0), [1], [], 1.0, 0)]
    packer.add(examples_of(rows))
    with pytest.raises(AssertionError, match="cannot append"):
        packer.add(examples_of(rows).items)
