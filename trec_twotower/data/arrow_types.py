"""Arrow types as this package reads them: one type for each kind of value, whichever type the writer used.

Text is `string` or `large_string`, a list is `list` or `large_list` (of floating-point numbers also `fixed_size_list`),
and no column is a dictionary, run-end encoded, a view or an extension. Numbers of types for which Arrow lacks functions
have the next wider one. Types that no feature reads, such as structs, keep their type.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.ops.hashing import is_text


def is_list(kind: pa.DataType) -> bool:
    """Return whether a plain type is a list of any kind."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that a column of type `kind` is read as."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_fixed_size_list(kind):
        inner = plain_type(kind.value_type)
        return pa.list_(inner, kind.list_size) if pa.types.is_floating(inner) else pa.large_list(inner)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    return kind


def is_plain(kind: pa.DataType) -> bool:
    """Return whether values of type `kind` are read as they are; the names of list elements do not count."""
    return plain_type(kind) == kind


def plain_array(array: pa.Array, *, keeps_dictionaries: bool = False) -> pa.Array:
    """Return the same values with a plain type; with `keeps_dictionaries`, text may stay dictionary-encoded.

    Raises pa.ArrowException if the values do not fit, such as text beyond 2 GiB.
    """
    kind = array.type
    if is_plain(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return plain_array(array.storage, keeps_dictionaries=keeps_dictionaries)
    if pa.types.is_run_end_encoded(kind):
        return plain_array(pc.run_end_decode(array), keeps_dictionaries=keeps_dictionaries)
    if pa.types.is_dictionary(kind):
        return _plain_dictionary(array, keeps_dictionaries)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return plain_array(_list_of_view(array), keeps_dictionaries=keeps_dictionaries)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = plain_array(array.values, keeps_dictionaries=keeps_dictionaries)
        made = pa.list_(values.type) if pa.types.is_list(kind) else pa.large_list(values.type)
        return pa.Array.from_buffers(
            made, len(array), array.buffers()[:2], array.null_count, array.offset, children=[values]
        )
    if pa.types.is_fixed_size_list(kind):
        return _list_of_fixed_size(array)
    if pa.types.is_struct(kind):
        fields = [pa.field(field.name, plain_type(field.type)) for field in kind]
        parts = [plain_array(part) for part in array.flatten()]
        return pa.StructArray.from_arrays(parts, fields=fields, mask=array.is_null())
    if pa.types.is_map(kind):
        made = plain_type(kind)
        parts = [plain_array(array.keys), plain_array(array.items)]
        entries = pa.StructArray.from_arrays(parts, fields=[made.key_field, made.item_field])
        return pa.Array.from_buffers(
            made, len(array), array.buffers()[:2], array.null_count, array.offset, children=[entries]
        )
    return array.cast(plain_type(kind))


def plain_column(column: pa.ChunkedArray, *, keeps_dictionaries: bool = False) -> pa.ChunkedArray:
    """Return `plain_array` of every chunk."""
    if is_plain(column.type):
        return column
    if not column.num_chunks:
        return pa.chunked_array([], plain_type(column.type))
    return pa.chunked_array([plain_array(chunk, keeps_dictionaries=keeps_dictionaries) for chunk in column.chunks])


def plain_table(table: pa.Table, columns: Iterable[str]) -> pa.Table:
    """Return a table of these columns in plain types; columns that it lacks are left out."""
    return pa.table({name: plain_column(table[name]) for name in columns if name in table.column_names})


def as_list(array: pa.Array) -> pa.Array:
    """Return a list column with offsets: a fixed-size list becomes a large list, of which null rows hold nothing."""
    if not pa.types.is_fixed_size_list(array.type):
        return array
    lengths = np.where(array.is_valid().to_numpy(zero_copy_only=False), array.type.list_size, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = array.is_null() if array.null_count else None
    return pa.LargeListArray.from_arrays(pa.array(offsets), array.flatten(), mask=mask)  # flatten leaves null rows out


def _plain_dictionary(array: pa.DictionaryArray, keeps_dictionaries: bool) -> pa.Array:
    values = plain_array(array.dictionary)
    encoded = pa.DictionaryArray.from_arrays(array.indices, values, safe=False)
    is_kept = keeps_dictionaries and is_text(values.type) and not values.null_count
    return encoded if is_kept else encoded.dictionary_decode()


def _list_of_view(array: pa.Array) -> pa.Array:
    """Return a list view as a list. Arrow's own cast loses elements after a null row (pyarrow 26.0.1)."""
    is_large = pa.types.is_large_list_view(array.type)
    width = np.int64 if is_large else np.int32
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = plain_array(array.values)
    first = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    taken = np.repeat(first - offsets[:-1], lengths) + np.arange(offsets[-1])
    made = pa.LargeListArray if is_large else pa.ListArray
    return made.from_arrays(
        pa.array(offsets.astype(width)),
        values.take(pa.array(taken)),
        mask=array.is_null() if array.null_count else None,
    )


def _list_of_fixed_size(array: pa.FixedSizeListArray) -> pa.Array:
    """Return a fixed-size list as a list, or with plain elements where it stays one."""
    size = array.type.list_size
    values = plain_array(array.values.slice(array.offset * size, len(array) * size))
    mask = array.is_null() if array.null_count else None
    whole = pa.FixedSizeListArray.from_arrays(values, size, mask=mask)
    return whole if pa.types.is_floating(values.type) else as_list(whole)


def widest(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type that holds both without loss: the wider integer or float, or lists of it; else None."""
    if one == other or pa.types.is_null(other):  # a column of nulls has no type
        return one
    if pa.types.is_null(one):
        return other
    if is_list(one) and is_list(other):
        inner = widest(one.value_type, other.value_type)
        is_large = any(not pa.types.is_list(kind) for kind in (one, other))
        return None if inner is None else pa.large_list(inner) if is_large else pa.list_(inner)
    for is_kind in (pa.types.is_signed_integer, pa.types.is_floating):
        if is_kind(one) and is_kind(other):
            return one if one.bit_width > other.bit_width else other
    return pa.large_string() if is_text(one) and is_text(other) else None


def is_wider(wide: pa.DataType, kind: pa.DataType) -> bool:
    """Return whether numbers of the type `wide`, which holds `kind`, may not fit into `kind`."""
    if is_list(wide) and is_list(kind):
        return is_wider(wide.value_type, kind.value_type)
    return wide != kind and not pa.types.is_null(kind) and not is_text(wide)


def holds_null_alone(kind: pa.DataType) -> bool:
    """Return whether this is the type of a column of nulls, or of lists without elements."""
    return pa.types.is_null(kind.value_type if is_list(kind) else kind)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
