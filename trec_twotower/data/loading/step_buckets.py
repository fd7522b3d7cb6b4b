"""Rows by heaps: each step finds the rows that it takes of a unit behind each other, column by column.

The rows of a batch lie anywhere in its window, more than the processor's caches hold, and reading memory at random
places takes most of the time. So the rows of a unit are dealt, as they are made, into as many heaps as steps will take
rows of it: writing to some hundred places in turn is nearly as fast as to one, and a batch copies a few runs of each
column. Of six rows in two heaps, with one id and a list of ids, added as three and three:

    heap of each row    0 1 0   1 1 0
    id                  5 7 9   4 8 6
    history             [17, 4] [] [3]   [21] [] [30, 31]

    words   id         5 9 6 | 7 4 8            columns of one length: heap 0, heap 1
            lengths    2 1 2 | 0 1 0
            history    17 4 3 |                 as it was added: first three rows, heap 0, heap 1
                       30 31 | 21               the others
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from trec_twotower.data.features.transform import Columns
from trec_twotower.data.loading.examples import Examples, RowItems
from trec_twotower.ops.bucket_kernels import copy_heap, place_rows, put_columns, put_lists
from trec_twotower.ops.compilation import LINE_BYTES
from trec_twotower.ops.ragged import Ragged

WORD_BYTES = 4
LINE_WORDS = LINE_BYTES // WORD_BYTES
BUFFER_WORDS = 1 << 18  # buffers have a multiple of so many: most units need the same then
SPARSE, NUMBER = "sparse:", "number:"  # what the fields of an Examples' columns are called
WEIGHTS = "\0weights"  # behind a list's name: what its weights are called
KINDS: dict[str, Any] = {"Examples": Examples, "RowItems": RowItems}


@dataclass(frozen=True)
class Field:
    """One field of all rows."""

    name: str
    dtype: str
    count: int = 0  # values a row; 0: a list
    is_single: bool = False  # is a Ragged all the same
    weight: str | None = None  # of a list: the type of its weights

    @property
    def width(self) -> int:
        """Words a row, or of a list's value."""
        return max(self.count, 1) * np.dtype(self.dtype).itemsize // WORD_BYTES


@dataclass(frozen=True)
class Layout:
    """What there is of a row of an Examples or RowItems."""

    kind: str
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, rows: Examples | RowItems) -> Layout:
        return _one(cls(type(rows).__name__, tuple(_field(name, value) for name, value in parts_of(rows))))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        about = json.loads(text)
        return _one(cls(about["kind"], tuple(Field(**field) for field in about["fields"])))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @cached_property
    def fixed(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.count)

    @cached_property
    def lists(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if not field.count)

    @cached_property
    def places(self) -> list[int]:
        """Words a row before each fixed field, and before the lists' lengths."""
        return np.cumsum([0, *(field.width for field in self.fixed)]).tolist()

    @property
    def header(self) -> int:
        """Words a row, the lists' values left out."""
        return self.places[-1] + len(self.lists)

    @cached_property
    def fixed_arrays(self) -> list[tuple[str, str, int, int]]:
        """Name, type, words before it and words of each fixed field."""
        places = zip(self.fixed, self.places, strict=False)
        return [(field.name, field.dtype, place, field.width) for field, place in places]

    @cached_property
    def homes(self) -> list[tuple[Field, str, str]]:
        """Each field, where it belongs in an Examples (SPARSE, NUMBER; "": it is a part itself), its name there."""
        found = []
        for field in self.fields:
            home = next((prefix for prefix in (SPARSE, NUMBER) if field.name.startswith(prefix)), "")
            found.append((field, home, field.name.removeprefix(home)))
        return found

    @cached_property
    def list_arrays(self) -> list[tuple[str, str, int, int]]:
        """Name, type, number of the list and words a value of all lists' values and weights, as they stand."""
        found = []
        for number, field in enumerate(self.lists):
            found.append((field.name, field.dtype, number, field.width))
            if field.weight is not None:
                found.append((field.name + WEIGHTS, field.weight, number, 1))
        return found


@lru_cache(maxsize=64)
def _one(layout: Layout) -> Layout:
    """The first that was equal to it: what is worked out of a layout is worked out once."""
    return layout


@dataclass(frozen=True, eq=False)
class BucketedRows:
    """Some rows by heaps."""

    layout: Layout
    starts: np.ndarray  # int64, one more than heaps: each one's first row
    words: np.ndarray  # int32
    bounds: np.ndarray  # int64 (additions, values and weights of lists, heaps, 2): where each heap's words are

    @cached_property
    def heap_values(self) -> list[list[int]]:
        """For each heap, how many values each list has there."""
        words = np.diff(self.bounds, axis=3)[..., 0].sum(axis=0)  # (values and weights, heaps)
        arrays = enumerate(self.layout.list_arrays)
        values = [words[at] // width for at, (name, _, _, width) in arrays if not name.endswith(WEIGHTS)]
        return np.stack(values, axis=1).tolist() if values else [[]] * (len(self.starts) - 1)

    @cached_property
    def heap_rows(self) -> list[int]:
        """How many rows each heap has."""
        return np.diff(self.starts).tolist()


class Buffers:
    """Memory that units of rows take turns in: fresh pages cost as much as what is written to them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, num_words: int) -> np.ndarray:
        """At least so many words, of any content."""
        num_words = -(-num_words // BUFFER_WORDS) * BUFFER_WORDS
        with self._lock:
            fitting = [number for number, buffer in enumerate(self._free) if len(buffer) >= num_words]
            if fitting:
                return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))
            if self._free:  # of a smaller kind of unit: let it go
                self._free.pop(0)
        return np.empty(num_words, np.int32)

    def give(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)

    def lend(self, packed: BucketedRows, buffer: np.ndarray) -> BucketedRows:
        """`packed`, with whose end its buffer is free again."""
        weakref.finalize(packed, self.give, buffer).atexit = False
        return packed


class RowBucketer:
    """Deals rows into the heaps of one Packed."""

    def __init__(self, heap_of: np.ndarray, num_heaps: int, buffers: Buffers) -> None:
        """`heap_of` is the heap of each row that will be added, in their order (int32)."""
        self._heap_of = heap_of
        self._buffers = buffers
        self._starts = np.zeros(num_heaps + 1, np.int64)
        np.cumsum(np.bincount(heap_of, minlength=num_heaps), out=self._starts[1:])
        self._ends = self._starts[:-1].copy()  # where each heap's next row goes
        self._words = np.empty(0, np.int32)
        self._rows = self._used = 0
        self._bounds: list[np.ndarray] = []
        self._layout: Layout | None = None

    def add(self, rows: Examples | RowItems) -> None:
        """The next rows."""
        layout = self._check(Layout.of(rows))
        parts = dict(parts_of(rows))
        num_rows, memory = len(rows.positives), _Memory()
        columns, lists, num_words = [], [], 0
        for field, place in zip(layout.fixed, layout.places, strict=False):
            values = parts[field.name].values if field.is_single else parts[field.name]
            columns.append((memory.of(values, num_rows), field.width, place * len(self._heap_of)))
        for number, field in enumerate(layout.lists):
            each = parts[field.name]
            assert each.offsets.dtype == np.int64, f"{field.name}: offsets of {each.offsets.dtype}"
            of_weights = (0, 0) if each.weights is None else (memory.of(each.weights, len(each.values)), 1)
            of_values = memory.of(each.values, each.offsets[-1])
            lengths = (layout.places[-1] + number) * len(self._heap_of)
            lists.append((memory.of(each.offsets, num_rows + 1), lengths, of_values, field.width, *of_weights))
            num_words += len(each.values) * (field.width + of_weights[1])
        heap_of = self._heap_of[self._rows : self._rows + num_rows]
        self._rows += num_rows
        self._make_room(num_words + LINE_WORDS * len(layout.list_arrays) * (len(self._starts) - 1))
        places = np.empty(num_rows, np.int64)
        place_rows(heap_of, self._ends, places)
        put_columns(np.array(columns, np.int64).reshape(-1, 3), places, self._words)
        bounds = np.empty((len(layout.list_arrays), len(self._starts) - 1, 2), np.int64)
        table = np.array(lists, np.int64).reshape(-1, 6)
        self._used = put_lists(table, heap_of, places, self._words, self._used, bounds)
        self._bounds.append(bounds)

    def finish(self) -> BucketedRows:
        assert self._layout is not None and self._rows == len(self._heap_of)
        packed = BucketedRows(self._layout, self._starts, self._words[: self._used], np.stack(self._bounds))
        return self._buffers.lend(packed, self._words)

    def _check(self, layout: Layout) -> Layout:
        if self._layout is None:
            self._layout = layout
            self._used = layout.header * len(self._heap_of)
        assert layout == self._layout, f"{layout} below {self._layout}"
        return self._layout

    def _make_room(self, num_words: int) -> None:
        """For so many words of lists, and all columns of one length."""
        assert self._layout is not None
        end = self._used + num_words
        if end <= len(self._words):
            return
        # As much as all rows need if the others are like these, and some more.
        columns = self._layout.header * len(self._heap_of)
        expected = columns + int((end - columns) / max(self._rows, 1) * len(self._heap_of) * 1.05) + 4096
        larger = self._buffers.take(max(end, expected))
        if len(self._words):
            larger[: self._used] = self._words[: self._used]
            self._buffers.give(self._words)
        self._words = larger


def take(parts: Sequence[tuple[BucketedRows, int]]) -> Any:
    """Return a heap of each part in turn, as the Examples or RowItems that they were made of."""
    layout = parts[0][0].layout
    assert all(packed.layout is layout or packed.layout == layout for packed, _ in parts), "rows of different kinds"
    num_rows = sum(packed.heap_rows[heap] for packed, heap in parts)
    offsets = np.empty((len(layout.lists), num_rows + 1), np.int64)
    offsets[:, 0] = 0
    totals = [sum(counts) for counts in zip(*(packed.heap_values[heap] for packed, heap in parts), strict=True)]
    sizes = {name: num_rows * width for name, _, _, width in layout.fixed_arrays}
    sizes |= {name: totals[number] * width for name, _, number, width in layout.list_arrays}
    begins, num_words = {}, 0  # where in `out` each array begins, at a cache line
    for name, size in sizes.items():
        begins[name] = -(-num_words // LINE_WORDS) * LINE_WORDS
        num_words = begins[name] + size
    out = np.empty(num_words, np.int32)
    of_fixed = [(place, width, begins[name]) for name, _, place, width in layout.fixed_arrays]
    of_lists = [(number, width, begins[name]) for name, _, number, width in layout.list_arrays]
    kinds = np.array(of_fixed, np.int64).reshape(-1, 3), np.array(of_lists, np.int64).reshape(-1, 3)
    at = 0
    for packed, heap in parts:
        at = copy_heap(packed.words, packed.starts, packed.bounds, heap, at, offsets, layout.places[-1], *kinds, out)
    values = {
        name: out[begins[name] : begins[name] + sizes[name]].view(dtype)
        for name, dtype, _, _ in (*layout.fixed_arrays, *layout.list_arrays)
    }
    return assembled(layout, num_rows, values, list(offsets))


def assembled(layout: Layout, num_rows: int, values: Mapping[str, np.ndarray], offsets: Sequence[np.ndarray]) -> Any:
    """What a layout is of, from the arrays of its fields, flat, and the offsets of its lists."""
    found: dict[str, dict[str, Any]] = {SPARSE: {}, NUMBER: {}, "": {}}
    of_lists = iter(offsets)
    for field, home, name in layout.homes:
        array = values[field.name]
        if not field.count:
            found[home][name] = Ragged(next(of_lists), array, values.get(field.name + WEIGHTS))
        elif field.is_single:
            found[home][name] = Ragged.singles(array)
        else:
            found[home][name] = array.reshape(num_rows, field.count) if home == NUMBER else array
    if layout.kind == Examples.__name__:
        found[""]["user"] = Columns(num_rows, found[SPARSE], found[NUMBER])
    return KINDS[layout.kind](**found[""])


def parts_of(rows: Examples | RowItems) -> Iterable[tuple[str, Any]]:
    """All Ragged and arrays of some rows, by name."""
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, Columns):
            yield from ((SPARSE + name, lists) for name, lists in value.sparse.items())
            yield from ((NUMBER + name, number) for name, number in value.numbers.items())
        elif value is not None:
            yield field.name, value


def _field(name: str, value: Ragged | np.ndarray) -> Field:
    array = value if isinstance(value, np.ndarray) else value.values
    assert array.itemsize % WORD_BYTES == 0, f"{name}: {array.dtype} is no number of words"
    if isinstance(value, np.ndarray):
        return Field(name, value.dtype.str, value.shape[1] if value.ndim > 1 else 1)
    if value.is_single:
        return Field(name, value.values.dtype.str, 1, True)
    return Field(name, value.values.dtype.str, weight=None if value.weights is None else value.weights.dtype.str)


class _Memory:
    """Addresses of arrays, which live as long as this does."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []

    def of(self, values: np.ndarray, count: int) -> int:
        """Of an array that must have so many entries: nothing checks what is read through an address."""
        assert len(values) == count, f"{len(values)} entries in place of {count}"
        self._held.append(np.ascontiguousarray(values))
        return self._held[-1].ctypes.data
