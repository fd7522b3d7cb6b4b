"""Rows as records: all that is known of a row stands in one run of memory, so that a batch takes it from there at once.

A record is words of four bytes: its fields of one length, then how long its lists are, then the lists' values. With
one id, a list of ids and one of weighted words:

    id  2 1   17 4   9 .5                   country 5, history [17, 4], words [9] with the weight .5

The rows of a batch lie anywhere in its window. Taken column by column, each would be fetched from memory as many times
as there are columns; a record is some cache lines beside each other, fetched while those before it are copied.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from trec_twotower.data.examples import Examples, RowItems
from trec_twotower.data.kernels import LINE_WORDS, copy_rows, measure_rows, put_fixed, put_lists
from trec_twotower.data.lists import Lists
from trec_twotower.data.transforms import Columns

WORD_BYTES = 4
SPARSE, NUMBER = "sparse:", "number:"  # what the fields of an Examples' columns are called
VALUES, WEIGHTS = "values", "weights"
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
        return cls(type(rows).__name__, tuple(_field(name, value) for name, value in _parts(rows)))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        about = json.loads(text)
        return cls(about["kind"], tuple(Field(**field) for field in about["fields"]))

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


@dataclass(frozen=True, eq=False)
class Packed:
    """Records of some rows: row r is words[starts[r]:starts[r + 1]]."""

    layout: Layout
    starts: np.ndarray  # int64, one more than rows
    words: np.ndarray  # int32
    whole: Packed | None = None  # whose memory this is a part of

    def __len__(self) -> int:
        return len(self.starts) - 1

    def slice(self, start: int, stop: int) -> Packed:
        """Rows start .. stop - 1, without a copy."""
        if (start, stop) == (0, len(self)):
            return self
        return Packed(self.layout, self.starts[start : stop + 1], self.words, self.whole or self)

    def unpacked(self, names: Collection[str] | None = None) -> Any:
        """All rows, in their order."""
        return take([(self, np.arange(len(self), dtype=np.int32))], names)


class Buffers:
    """Memory that units of rows take turns in: fresh pages cost as much as what is written to them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, num_words: int) -> np.ndarray:
        """At least so many words, of any content."""
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

    def __init__(self, num_rows: int, buffers: Buffers | None = None) -> None:
        """Of so many rows in all."""
        self._num_rows = num_rows
        self._buffers = buffers or Buffers()
        self._starts = np.zeros(num_rows + 1, np.int64)
        self._words = np.empty(0, np.int32)
        self._rows = 0
        self._layout: Layout | None = None

    def add(self, rows: Examples | RowItems) -> None:
        layout = self._check(Layout.of(rows))
        parts = dict(_parts(rows))
        count = _num_rows(rows)
        end = int(self._starts[self._rows])
        sizes = np.full(count, layout.header, np.int64)
        for field in layout.lists:
            values_and_weights = field.width + (field.weight is not None)
            sizes += parts[field.name].lengths * np.int64(values_and_weights)
        starts = self._extend(sizes)[:-1]
        for field, place in zip(layout.fixed, layout.places, strict=False):
            part = parts[field.name]
            put_fixed(_as_words(part.values if field.is_single else part), field.width, starts, place, self._words)
        cursor = starts + layout.header
        for number, field in enumerate(layout.lists):
            lists, place = parts[field.name], layout.places[-1] + number
            put_lists(_as_words(lists.values), field.width, lists.offsets, starts, place, cursor, self._words)
            if lists.weights is not None:
                put_lists(_as_words(lists.weights), 1, lists.offsets, starts, place, cursor, self._words)
        assert not count or int(cursor[-1]) == int(self._starts[self._rows]) > end

    def add_packed(self, packed: Packed) -> None:
        self._check(packed.layout)
        first = int(packed.starts[0])
        starts = self._extend(np.diff(packed.starts))
        self._words[starts[0] : starts[-1]] = packed.words[first : int(packed.starts[-1])]

    def finish(self) -> Packed:
        assert self._layout is not None and self._rows == self._num_rows
        words = self._words[: self._starts[-1]]
        words.flags.writeable = False  # as those of a mapped file: kernels are compiled for one kind
        return self._buffers.lend(Packed(self._layout, self._starts, words), self._words)

    def _check(self, layout: Layout) -> Layout:
        if self._layout is None:
            self._layout = layout
        assert layout == self._layout, f"{layout} below {self._layout}"
        return self._layout

    def _extend(self, sizes: np.ndarray) -> np.ndarray:
        """Room for records of these sizes: where each begins, and the last one ends."""
        starts = self._starts[self._rows : self._rows + len(sizes) + 1]
        np.cumsum(sizes, out=starts[1:])
        starts[1:] += starts[0]
        self._rows += len(sizes)
        if (end := int(starts[-1])) > len(self._words):
            # As much as all rows need if the others are like these, and some more.
            expected = int(end / max(self._rows, 1) * self._num_rows * 1.05) + 4096
            larger = self._buffers.take(max(end, expected))
            larger[: starts[0]] = self._words[: starts[0]]
            if len(self._words):
                self._buffers.give(self._words)
            self._words = larger
        return starts


def take(parts: Sequence[tuple[Packed, np.ndarray]], names: Collection[str] | None = None) -> Any:
    """The given rows (int32) of each part in turn, as the Examples or RowItems they were made of.

    With `names` these fields alone, as RowItems.
    """
    layout = parts[0][0].layout
    assert all(packed.layout == layout for packed, _ in parts), "records of different kinds in one step"
    num_rows = sum(len(rows) for _, rows in parts)
    offsets = np.zeros((len(layout.lists), num_rows + 1), np.int64)
    at = 0
    for packed, rows in parts:
        measure_rows(packed.words, packed.starts, rows, layout.places[-1], at, offsets)
        at += len(rows)
    room = _Room()
    wanted = {field.name for field in layout.fields} if names is None else names
    fixed = [
        (place, field.width, room.reserve((field.name, VALUES), field.dtype, num_rows * field.width))
        for field, place in zip(layout.fixed, layout.places, strict=False)
        if field.name in wanted
    ]
    lists = []
    for number, (field, end) in enumerate(zip(layout.lists, offsets[:, -1].tolist(), strict=True)):
        for part, dtype in ((VALUES, field.dtype), (WEIGHTS, field.weight)):
            if dtype is not None:
                width = field.width if part is VALUES else 1
                is_wanted = field.name in wanted
                lists.append((number, width, room.reserve((field.name, part), dtype, end * width) if is_wanted else -1))
    out = np.empty(room.num_words, np.int32)
    kinds = np.array(fixed, np.int64).reshape(-1, 3), np.array(lists, np.int64).reshape(-1, 3)
    at = 0
    for packed, rows in parts:
        copy_rows(packed.words, packed.starts, rows, at, offsets, *kinds, layout.header, out)
        at += len(rows)
    arrays = room.arrays(out)
    offsets_of = dict(zip((field.name for field in layout.lists), offsets, strict=True))
    found: dict[str, Any] = {}
    for field in layout.fields:
        if field.name not in wanted:
            continue
        values = arrays[field.name, VALUES]
        if field.name in offsets_of:
            found[field.name] = Lists(offsets_of[field.name], values, arrays.get((field.name, WEIGHTS)))
        elif field.is_single:
            found[field.name] = Lists.singles(values)
        else:
            found[field.name] = values.reshape(num_rows, field.count) if field.name.startswith(NUMBER) else values
    return _rebuilt(RowItems if names is not None else KINDS[layout.kind], num_rows, found)


class _Room:
    """Arrays that are to lie in one piece of memory, each at the beginning of a cache line."""

    def __init__(self) -> None:
        self.num_words = 0
        self._arrays: dict[tuple[str, str], tuple[int, str, int]] = {}

    def reserve(self, name: tuple[str, str], dtype: str, num_words: int) -> int:
        """The first word of a new array."""
        first = self.num_words
        self._arrays[name] = first, dtype, num_words
        self.num_words += -(-num_words // LINE_WORDS) * LINE_WORDS
        return first

    def arrays(self, words: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        return {
            name: words[first : first + num_words].view(dtype)
            for name, (first, dtype, num_words) in self._arrays.items()
        }


def _parts(rows: Examples | RowItems) -> Iterable[tuple[str, Any]]:
    """All Lists and arrays of some rows, by name."""
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, Columns):
            yield from ((SPARSE + name, lists) for name, lists in value.sparse.items())
            yield from ((NUMBER + name, number) for name, number in value.numbers.items())
        elif value is not None:
            yield field.name, value


def _num_rows(rows: Examples | RowItems) -> int:
    return len(rows.positives)


def _field(name: str, value: Lists | np.ndarray) -> Field:
    if isinstance(value, np.ndarray):
        return Field(name, value.dtype.str, value.shape[1] if value.ndim > 1 else 1)
    if value.is_single:
        return Field(name, value.values.dtype.str, 1, True)
    return Field(name, value.values.dtype.str, weight=None if value.weights is None else value.weights.dtype.str)


def _rebuilt(kind: Any, num_rows: int, found: dict[str, Any]) -> Any:
    parts = {name: value for name, value in found.items() if ":" not in name}
    if kind is Examples:
        sparse = {name.removeprefix(SPARSE): value for name, value in found.items() if name.startswith(SPARSE)}
        numbers = {name.removeprefix(NUMBER): value for name, value in found.items() if name.startswith(NUMBER)}
        parts["user"] = Columns(num_rows, sparse, numbers)
    return kind(**parts)


def _as_words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.int32)
