"""Rows as records: all that is known of a row stands in one run of memory, so that a batch takes it from there at once.

A record is words of four bytes: its fields of one length, then how long its lists are, then the lists' values. With
one id, a list of ids and one of weighted words:

    id  2 1   17 4   9 .5                   country 5, history [17, 4], words [9] with the weight .5

The rows of a batch lie anywhere in its window, more than the processor's caches hold, and reading memory at random
places takes most of the time. So the records of a unit are put, as they are made, into as many heaps as steps will take
rows of it: writing to some hundred places in turn is nearly as fast as to one, and a batch reads its heaps through.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from trec_twotower.data.examples import Examples, RowItems
from trec_twotower.data.kernels import copy_rows, count_values, deal, measure_rows, put_records, put_rows
from trec_twotower.data.lists import Lists
from trec_twotower.data.transforms import Columns

WORD_BYTES = 4
LINE_WORDS = 16  # in a line of the processor's caches
BUFFER_WORDS = 1 << 18  # buffers have a multiple of so many: most units need the same then
INT32 = np.dtype(np.int32).str
SPARSE, NUMBER = "sparse:", "number:"  # what the fields of an Examples' columns are called
WEIGHTS = "\0weights"  # behind a list's name: what its weights are called
KINDS: dict[str, Any] = {"Examples": Examples, "RowItems": RowItems}


@dataclass(frozen=True)
class Field:
    """One field of all records."""

    name: str
    dtype: str
    count: int = 0  # values a row; 0: a list
    is_single: bool = False  # is a Lists all the same
    weight: str | None = None  # of a list: the type of its weights

    @property
    def width(self) -> int:
        """Words a row, or of a list's value."""
        return max(self.count, 1) * np.dtype(self.dtype).itemsize // WORD_BYTES


@dataclass(frozen=True)
class Layout:
    """What stands in a record of an Examples or RowItems; fields of one length come first, then lists."""

    kind: str
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, rows: Examples | RowItems) -> Layout:
        return _one(cls(type(rows).__name__, tuple(_field(name, value) for name, value in _parts(rows))))

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
        """The first word of each fixed field in a record, and that of the lists' lengths."""
        return np.cumsum([0, *(field.width for field in self.fixed)]).tolist()

    @property
    def header(self) -> int:
        """Words before the lists' values."""
        return self.places[-1] + len(self.lists)

    @cached_property
    def fixed_arrays(self) -> list[tuple[str, str, int, int]]:
        """Name, type, first word and words of each fixed field."""
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
    def types(self) -> dict[str, str]:
        return {field.name: field.dtype for field in self.fields}

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
class Packed:
    """Records of some rows: row r is words[starts[r]:starts[r + 1]]."""

    layout: Layout
    starts: np.ndarray  # int64, one more than rows
    words: np.ndarray  # int32
    heaps: np.ndarray  # int64 (heaps, runs, 2): the runs of rows of each heap
    counted: np.ndarray | None = None  # totals, where they are known; else all rows are in one heap
    whole: Packed | None = None  # whose memory this is a part of

    @classmethod
    def in_order(cls, layout: Layout, starts: np.ndarray, words: np.ndarray, whole: Packed | None = None) -> Packed:
        """With all rows in one heap."""
        return cls(layout, starts, words, np.array([[[0, len(starts) - 1]]]), whole=whole)

    @cached_property
    def totals(self) -> np.ndarray:
        """int64 (heaps, lists): how many values their lists have."""
        if self.counted is not None:
            return self.counted
        totals = np.zeros((1, len(self.layout.lists)), np.int64)
        count_values(self.words, self.starts, self.layout.places[-1], np.zeros(len(self), np.int32), totals)
        return totals

    @cached_property
    def heap_values(self) -> list[list[int]]:
        """For each heap, how many values each list has there."""
        return self.totals.tolist()

    @cached_property
    def heap_rows(self) -> list[int]:
        """How many rows each heap has."""
        return (self.heaps[:, :, 1] - self.heaps[:, :, 0]).sum(axis=1).tolist()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def slice(self, start: int, stop: int) -> Packed:
        """Rows start .. stop - 1 in one heap, without a copy."""
        if (start, stop) == (0, len(self)) and len(self.heaps) == 1:
            return self
        return Packed.in_order(self.layout, self.starts[start : stop + 1], self.words, self.whole or self)

    def unpacked(self, names: Collection[str] | None = None) -> Any:
        """All rows, which are in one heap."""
        return take([(self, 0)], names)


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

    def lend(self, packed: Packed, buffer: np.ndarray) -> Packed:
        """`packed`, with whose end its buffer is free again."""
        weakref.finalize(packed, self.give, buffer).atexit = False
        return packed


class Packer:
    """Puts rows below each other into one Packed."""

    def __init__(self, heap_of: np.ndarray, num_heaps: int, buffers: Buffers) -> None:
        """`heap_of` is the heap of each row that will be added, in their order (int32)."""
        self._heap_of = heap_of
        self._num_heaps = num_heaps
        self._buffers = buffers
        self._starts = np.zeros(len(heap_of) + 1, np.int64)
        self._words = np.empty(0, np.int32)
        self._rows = 0
        self._ends: list[np.ndarray] = []  # of each heap's rows, after each addition
        self._totals = np.zeros((num_heaps, 0), np.int64)
        self._layout: Layout | None = None

    def add(self, rows: Examples | RowItems) -> None:
        """The next rows."""
        layout = self._check(Layout.of(rows))
        parts = dict(_parts(rows))
        num_rows, memory = len(rows.positives), _Memory()
        fixed, lists = [], []
        for field in layout.fixed:
            values = parts[field.name].values if field.is_single else parts[field.name]
            fixed.append((memory.of(values, num_rows), field.width))
        for field in layout.lists:
            each = parts[field.name]
            assert each.offsets.dtype == np.int64, f"{field.name}: offsets of {each.offsets.dtype}"
            of_weights = (0, 0) if each.weights is None else (memory.of(each.weights, len(each.values)), 1)
            of_values = memory.of(each.values, each.offsets[-1])
            lists.append((memory.of(each.offsets, num_rows + 1), of_values, field.width, *of_weights))
        tables = np.array(fixed, np.int64).reshape(-1, 2), np.array(lists, np.int64).reshape(-1, 5)
        sizes = np.empty(num_rows, np.int64)
        heap_of = self._heap_of[self._rows : self._rows + len(sizes)]
        measure_rows(tables[1], layout.header, heap_of, sizes, self._totals)
        put_rows(*tables, self._extend(sizes), self._words)

    def add_packed(self, packed: Packed) -> None:
        """The next rows, as records already."""
        layout = self._check(packed.layout)
        heap_of = self._heap_of[self._rows : self._rows + len(packed)]
        places = self._extend(np.diff(packed.starts))
        put_records(
            packed.words, packed.starts, places, self._words, layout.places[-1], heap_of, self._totals
        )  # fmt: skip

    def finish(self) -> Packed:
        assert self._layout is not None and self._rows == len(self._heap_of)
        ends = np.stack(self._ends, axis=1)  # (1 + heaps, additions)
        heaps = np.stack([ends[:-1], ends[1:]], axis=2)
        words = self._words[: self._starts[-1]]
        words.flags.writeable = False  # as those of a mapped file: kernels are compiled for one kind
        return self._buffers.lend(Packed(self._layout, self._starts, words, heaps, self._totals), self._words)

    def _check(self, layout: Layout) -> Layout:
        if self._layout is None:
            self._layout = layout
            self._totals = np.zeros((self._num_heaps, len(layout.lists)), np.int64)
        assert layout == self._layout, f"{layout} below {self._layout}"
        return self._layout

    def _extend(self, sizes: np.ndarray) -> np.ndarray:
        """Room for records of these sizes: where each begins."""
        first, self._rows = self._rows, self._rows + len(sizes)
        starts, places = self._starts[first : self._rows + 1], np.empty(len(sizes), np.int64)
        row_ends, word_ends = np.zeros((2, self._num_heaps + 1), np.int64)
        word_ends[0] = starts[0]
        deal(self._heap_of[first : self._rows], sizes, row_ends, word_ends, starts, places)
        self._ends.append(first + np.concatenate([[0], row_ends[:-1]]))
        if (end := int(starts[-1])) > len(self._words):
            # As much as all rows need if the others are like these, and some more.
            expected = int(end / self._rows * len(self._heap_of) * 1.05) + 4096
            larger = self._buffers.take(max(end, expected))
            larger[: starts[0]] = self._words[: starts[0]]
            if len(self._words):
                self._buffers.give(self._words)
            self._words = larger
        return places


def take(
    parts: Sequence[tuple[Packed, int]],
    names: Collection[str] | None = None,
    *,
    joined: Sequence[str] = (),
    room: int = 0,
) -> Any:
    """A heap of each part in turn, as the Examples or RowItems that they were made of.

    With `names` these fields alone, as RowItems. The values of the sparse features `joined` stand one behind the other
    if they are int32, with so much `room` for others behind them: see Columns.joined.
    """
    layout = parts[0][0].layout
    assert all(packed.layout is layout or packed.layout == layout for packed, _ in parts), "rows of different kinds"
    num_rows = sum(packed.heap_rows[heap] for packed, heap in parts)
    offsets = np.empty((len(layout.lists), num_rows + 1), np.int64)
    offsets[:, 0] = 0
    totals = [sum(counts) for counts in zip(*(packed.heap_values[heap] for packed, heap in parts), strict=True)]
    wanted = None if names is None else {*names, *(name + WEIGHTS for name in names)}
    fixed = [each for each in layout.fixed_arrays if wanted is None or each[0] in wanted]
    sizes = {name: num_rows * width for name, _, _, width in fixed}
    for name, _, number, width in layout.list_arrays:
        if wanted is None or name in wanted:
            sizes[name] = totals[number] * width
    first = [SPARSE + name for name in joined]
    if any(layout.types.get(name) != INT32 for name in first):
        first = []
    begins, num_words = {}, 0  # where in `out` each array does
    for name in first:
        begins[name], num_words = num_words, num_words + sizes[name]
    num_words += room if first else 0
    for name, size in sizes.items():  # the others each with a cache line
        if name not in begins:
            begins[name] = -(-num_words // LINE_WORDS) * LINE_WORDS
            num_words = begins[name] + size
    out = np.empty(num_words, np.int32)
    of_fixed = [(place, width, begins[name]) for name, _, place, width in fixed]
    of_lists = [(number, width, begins.get(name, -1)) for name, _, number, width in layout.list_arrays]
    kinds = np.array(of_fixed, np.int64).reshape(-1, 3), np.array(of_lists, np.int64).reshape(-1, 3)
    at = 0
    for packed, heap in parts:
        runs = packed.heaps[heap]
        at = copy_rows(packed.words, packed.starts, runs, at, offsets, layout.places[-1], *kinds, out)
    values = {
        name: out[begins[name] : begins[name] + sizes[name]].view(dtype)
        for name, dtype, _, _ in (*fixed, *layout.list_arrays)
        if name in begins
    }
    found: dict[str, dict[str, Any]] = {SPARSE: {}, NUMBER: {}, "": {}}
    number = 0
    for field, home, name in layout.homes:
        array = values.get(field.name)
        if not field.count:
            if array is not None:
                found[home][name] = Lists(offsets[number], array, values.get(field.name + WEIGHTS))
            number += 1
        elif array is not None:
            if home == NUMBER:
                array = array.reshape(num_rows, field.count)
            found[home][name] = Lists.singles(array) if field.is_single else array
    kind = RowItems if names is not None else KINDS[layout.kind]
    if kind is Examples:
        whole = out[: sum(sizes[name] for name in first) + room] if first else None
        found[""]["user"] = Columns(num_rows, found[SPARSE], found[NUMBER], joined=whole)
    return kind(**found[""])


def _parts(rows: Examples | RowItems) -> Iterable[tuple[str, Any]]:
    """All Lists and arrays of some rows, by name."""
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, Columns):
            yield from ((SPARSE + name, lists) for name, lists in value.sparse.items())
            yield from ((NUMBER + name, number) for name, number in value.numbers.items())
        elif value is not None:
            yield field.name, value


def _field(name: str, value: Lists | np.ndarray) -> Field:
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
