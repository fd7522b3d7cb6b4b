"""Rows in one bucket per step: the rows that a step reads from a unit are contiguous, column by column.

The rows of a batch are anywhere in its window, which exceeds the processor's caches, and reading memory at random
places dominates the time. The rows of a unit are therefore distributed, as they are hashed, over one bucket for each
step that reads from it. Writing to some hundred places in turn is nearly as fast as writing to one, and a batch copies
a few runs of each column. Six rows in two buckets, with one id and a list of ids, added as three and three rows:

    bucket of each row  0 1 0   1 1 0
    id                  5 7 9   4 8 6
    history             [17, 4] [] [3]   [21] [] [30, 31]

    buffer  id         5 9 6 | 7 4 8            fixed-width columns: bucket 0, bucket 1
            lengths    2 1 2 | 0 1 0
            history    17 4 3 |                 the first three rows: bucket 0, bucket 1
                       30 31 | 21               the other three rows
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

from trec_twotower.data.features.columns import Columns
from trec_twotower.data.loading.examples import Examples, RowItems
from trec_twotower.ops.bucket_kernels import copy_bucket, place_rows, put_columns, put_lists
from trec_twotower.ops.compilation import LINE_BYTES
from trec_twotower.ops.ragged import Ragged

VALUE_BYTES = 4  # buffers hold 32-bit values
LINE_VALUES = LINE_BYTES // VALUE_BYTES
BUFFER_VALUES = 1 << 18  # buffer sizes are multiples of this, so that most units need the same size
SPARSE, NUMBER = "sparse:", "number:"  # name prefixes of the columns of an Examples
WEIGHTS = "\0weights"  # name suffix of the weights of a list
KINDS: dict[str, Any] = {"Examples": Examples, "RowItems": RowItems}


@dataclass(frozen=True)
class Field:
    """One column of the rows."""

    name: str
    dtype: str
    count: int = 0  # values per row; 0: a list
    is_single: bool = False  # a Ragged with one value per row
    weight: str | None = None  # type of a list's weights; None: it has none

    @property
    def width(self) -> int:
        """Return the number of 32-bit values per row, or per value of a list."""
        return max(self.count, 1) * np.dtype(self.dtype).itemsize // VALUE_BYTES


@dataclass(frozen=True)
class Layout:
    """The fields of an Examples or RowItems."""

    kind: str
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, rows: Examples | RowItems) -> Layout:
        return _canonical(cls(type(rows).__name__, tuple(_field(name, value) for name, value in parts_of(rows))))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        values = json.loads(text)
        return _canonical(cls(values["kind"], tuple(Field(**field) for field in values["fields"])))

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
        """Return the number of 32-bit values per row before each fixed field, and before the lists' lengths."""
        return np.cumsum([0, *(field.width for field in self.fixed)]).tolist()

    @property
    def header(self) -> int:
        """Return the number of 32-bit values per row, without the values of lists."""
        return self.places[-1] + len(self.lists)

    @cached_property
    def fixed_arrays(self) -> list[tuple[str, str, int, int]]:
        """Name and type of each fixed field, the 32-bit values per row before it, and its width."""
        places = zip(self.fixed, self.places, strict=False)
        return [(field.name, field.dtype, place, field.width) for field, place in places]

    @cached_property
    def homes(self) -> list[tuple[Field, str, str]]:
        """Return each field, its part of an Examples (SPARSE, NUMBER or "") and its name there."""
        parts = []
        for field in self.fields:
            home = next((prefix for prefix in (SPARSE, NUMBER) if field.name.startswith(prefix)), "")
            parts.append((field, home, field.name.removeprefix(home)))
        return parts

    @cached_property
    def list_arrays(self) -> list[tuple[str, str, int, int]]:
        """Name, type, list number and width of the values and weights of all lists, in buffer order."""
        parts = []
        for number, field in enumerate(self.lists):
            parts.append((field.name, field.dtype, number, field.width))
            if field.weight is not None:
                parts.append((field.name + WEIGHTS, field.weight, number, 1))
        return parts


@lru_cache(maxsize=64)
def _canonical(layout: Layout) -> Layout:
    """Return the first layout that equals this one, so that its properties are computed once."""
    return layout


@dataclass(frozen=True, eq=False)
class BucketedRows:
    """Rows in buckets, one per step."""

    layout: Layout
    starts: np.ndarray  # int64 (buckets + 1): first row of each bucket
    buffer: np.ndarray  # int32, see the module
    bounds: np.ndarray  # int64 (additions, values and weights of lists, buckets, 2): start and end in the buffer

    @cached_property
    def bucket_values(self) -> list[list[int]]:
        """Return the number of values of each list, for each bucket."""
        sizes = np.diff(self.bounds, axis=3)[..., 0].sum(axis=0)  # (values and weights, buckets)
        arrays = enumerate(self.layout.list_arrays)
        values = [sizes[at] // width for at, (name, _, _, width) in arrays if not name.endswith(WEIGHTS)]
        return np.stack(values, axis=1).tolist() if values else [[]] * (len(self.starts) - 1)

    @cached_property
    def bucket_rows(self) -> list[int]:
        """Return the number of rows of each bucket."""
        return np.diff(self.starts).tolist()


class Buffers:
    """Reusable buffers for units of rows: a new memory page costs as much time as writing its content."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, num_values: int) -> np.ndarray:
        """Return a buffer of at least this many values, with arbitrary content."""
        num_values = -(-num_values // BUFFER_VALUES) * BUFFER_VALUES
        with self._lock:
            fitting = [number for number, buffer in enumerate(self._free) if len(buffer) >= num_values]
            if fitting:
                return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))
            if self._free:  # too small for these units: drop it
                self._free.pop(0)
        return np.empty(num_values, np.int32)

    def give(self, buffer: np.ndarray) -> None:
        """Make a buffer available again."""
        with self._lock:
            self._free.append(buffer)

    def lend(self, bucketed: BucketedRows, buffer: np.ndarray) -> BucketedRows:
        """Return `bucketed`; its buffer becomes free when `bucketed` is deleted."""
        weakref.finalize(bucketed, self.give, buffer).atexit = False
        return bucketed


class RowBucketer:
    """Distributes rows over the buckets of one BucketedRows."""

    def __init__(self, bucket_of: np.ndarray, num_buckets: int, buffers: Buffers) -> None:
        """`bucket_of` is the bucket of each row to be added, in order (int32)."""
        self._bucket_of = bucket_of
        self._buffers = buffers
        self._starts = np.zeros(num_buckets + 1, np.int64)
        np.cumsum(np.bincount(bucket_of, minlength=num_buckets), out=self._starts[1:])
        self._ends = self._starts[:-1].copy()  # position of each bucket's next row
        self._buffer = np.empty(0, np.int32)
        self._rows = self._buffer_end = 0
        self._bounds: list[np.ndarray] = []
        self._layout: Layout | None = None

    def add(self, rows: Examples | RowItems) -> None:
        """Add the next rows."""
        layout = self._check(Layout.of(rows))
        parts = dict(parts_of(rows))
        num_rows, memory = len(rows.positives), _Addresses()
        columns, lists, num_values = [], [], 0
        for field, place in zip(layout.fixed, layout.places, strict=False):
            values = parts[field.name].values if field.is_single else parts[field.name]
            columns.append((memory.of(values, num_rows), field.width, place * len(self._bucket_of)))
        for number, field in enumerate(layout.lists):
            each = parts[field.name]
            assert each.offsets.dtype == np.int64, f"{field.name}: offsets of {each.offsets.dtype}"
            of_weights = (0, 0) if each.weights is None else (memory.of(each.weights, len(each.values)), 1)
            of_values = memory.of(each.values, each.offsets[-1])
            lengths = (layout.places[-1] + number) * len(self._bucket_of)
            lists.append((memory.of(each.offsets, num_rows + 1), lengths, of_values, field.width, *of_weights))
            num_values += len(each.values) * (field.width + of_weights[1])
        bucket_of = self._bucket_of[self._rows : self._rows + num_rows]
        self._rows += num_rows
        self._make_room(num_values + LINE_VALUES * len(layout.list_arrays) * (len(self._starts) - 1))
        places = np.empty(num_rows, np.int64)
        place_rows(bucket_of, self._ends, places)
        put_columns(np.array(columns, np.int64).reshape(-1, 3), places, self._buffer)
        bounds = np.empty((len(layout.list_arrays), len(self._starts) - 1, 2), np.int64)
        table = np.array(lists, np.int64).reshape(-1, 6)
        self._buffer_end = put_lists(table, bucket_of, places, self._buffer, self._buffer_end, bounds)
        self._bounds.append(bounds)

    def finish(self) -> BucketedRows:
        """Return the bucketed rows; all rows must have been added."""
        assert self._layout is not None and self._rows == len(self._bucket_of)
        bucketed = BucketedRows(self._layout, self._starts, self._buffer[: self._buffer_end], np.stack(self._bounds))
        return self._buffers.lend(bucketed, self._buffer)

    def _check(self, layout: Layout) -> Layout:
        if self._layout is None:
            self._layout = layout
            self._buffer_end = layout.header * len(self._bucket_of)
        assert layout == self._layout, f"cannot append {layout} to {self._layout}"
        return self._layout

    def _make_room(self, num_values: int) -> None:
        """Make the buffer large enough for this many more values."""
        assert self._layout is not None
        end = self._buffer_end + num_values
        if end <= len(self._buffer):
            return
        # The size that all rows need if the rest resembles the rows so far, plus a margin.
        columns = self._layout.header * len(self._bucket_of)
        expected = columns + int((end - columns) / max(self._rows, 1) * len(self._bucket_of) * 1.05) + 4096
        larger = self._buffers.take(max(end, expected))
        if len(self._buffer):
            larger[: self._buffer_end] = self._buffer[: self._buffer_end]
            self._buffers.give(self._buffer)
        self._buffer = larger


def take(parts: Sequence[tuple[BucketedRows, int]]) -> Any:
    """Return one bucket of each part, concatenated, as Examples or RowItems."""
    layout = parts[0][0].layout
    assert all(bucketed.layout is layout or bucketed.layout == layout for bucketed, _ in parts), (
        "rows of different kinds"
    )
    num_rows = sum(bucketed.bucket_rows[bucket] for bucketed, bucket in parts)
    offsets = np.empty((len(layout.lists), num_rows + 1), np.int64)
    offsets[:, 0] = 0
    totals = [
        sum(counts) for counts in zip(*(bucketed.bucket_values[bucket] for bucketed, bucket in parts), strict=True)
    ]
    sizes = {name: num_rows * width for name, _, _, width in layout.fixed_arrays}
    sizes |= {name: totals[number] * width for name, _, number, width in layout.list_arrays}
    begins, num_values = {}, 0  # start of each array in `out`, aligned to cache lines
    for name, size in sizes.items():
        begins[name] = -(-num_values // LINE_VALUES) * LINE_VALUES
        num_values = begins[name] + size
    out = np.empty(num_values, np.int32)
    fixed_table = [(place, width, begins[name]) for name, _, place, width in layout.fixed_arrays]
    list_table = [(number, width, begins[name]) for name, _, number, width in layout.list_arrays]
    kinds = np.array(fixed_table, np.int64).reshape(-1, 3), np.array(list_table, np.int64).reshape(-1, 3)
    at = 0
    for bucketed, bucket in parts:
        at = copy_bucket(
            bucketed.buffer, bucketed.starts, bucketed.bounds, bucket, at, offsets, layout.places[-1], *kinds, out
        )
    values = {
        name: out[begins[name] : begins[name] + sizes[name]].view(dtype)
        for name, dtype, _, _ in (*layout.fixed_arrays, *layout.list_arrays)
    }
    return assembled(layout, num_rows, values, list(offsets))


def assembled(layout: Layout, num_rows: int, values: Mapping[str, np.ndarray], offsets: Sequence[np.ndarray]) -> Any:
    """Return the Examples or RowItems of a layout, from the flat arrays of its fields and its lists' offsets."""
    parts: dict[str, dict[str, Any]] = {SPARSE: {}, NUMBER: {}, "": {}}
    list_offsets = iter(offsets)
    for field, home, name in layout.homes:
        array = values[field.name]
        if not field.count:
            parts[home][name] = Ragged(next(list_offsets), array, values.get(field.name + WEIGHTS))
        elif field.is_single:
            parts[home][name] = Ragged.singles(array)
        else:
            parts[home][name] = array.reshape(num_rows, field.count) if home == NUMBER else array
    if layout.kind == Examples.__name__:
        parts[""]["user"] = Columns(num_rows, parts[SPARSE], parts[NUMBER])
    return KINDS[layout.kind](**parts[""])


def parts_of(rows: Examples | RowItems) -> Iterable[tuple[str, Any]]:
    """Return the Ragged and the arrays of rows, with their names."""
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, Columns):
            yield from ((SPARSE + name, lists) for name, lists in value.sparse.items())
            yield from ((NUMBER + name, number) for name, number in value.numbers.items())
        elif value is not None:
            yield field.name, value


def _field(name: str, value: Ragged | np.ndarray) -> Field:
    array = value if isinstance(value, np.ndarray) else value.values
    assert array.itemsize % VALUE_BYTES == 0, f"{name}: {array.dtype} is not a multiple of {VALUE_BYTES} bytes"
    if isinstance(value, np.ndarray):
        return Field(name, value.dtype.str, value.shape[1] if value.ndim > 1 else 1)
    if value.is_single:
        return Field(name, value.values.dtype.str, 1, True)
    return Field(name, value.values.dtype.str, weight=None if value.weights is None else value.weights.dtype.str)


class _Addresses:
    """Addresses of arrays, which it keeps alive."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def of(self, values: np.ndarray, count: int) -> int:
        """Return the address of an array after checking its length: nothing checks reads through an address."""
        assert len(values) == count, f"{len(values)} entries instead of {count}"
        self._arrays.append(np.ascontiguousarray(values))
        return self._arrays[-1].ctypes.data
