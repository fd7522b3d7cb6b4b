"""Compilation of loops with numba, and the memory intrinsics that those loops need.

A compiled loop is several times faster than numpy's passes over whole arrays and releases the interpreter lock, so
reader threads run in parallel. The first call of a kernel compiles it (under a second). numba caches the
result next to the module, or in the user's cache folder if that is not writable.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.np.arrayobj import make_array

LINE_BYTES = 64  # size of a cache line

Kernel = Callable[..., Any]
intrinsic: Any = extending.intrinsic  # its type stub describes the code generator, not the calls from kernels


def kernel(function: Kernel | None = None, **options: Any) -> Any:
    """Return the function compiled by numba; `options` are further options of `numba.njit`."""
    if function is None:
        return partial(kernel, **options)
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # numba found no writable folder for the cache
        return njit(nogil=True, **options)(function)


@intrinsic
def copy_run(context: Any, out: Any, at: Any, values: Any, low: Any, count: Any) -> Any:
    """Copy values[low : low + count] to out[at : at + count] by memcpy, which needs half the time of a loop."""
    assert out.dtype == values.dtype and out.layout == values.layout == "C"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = [
            builder.gep(make_array(kind)(context, builder, array).data, [index])
            for kind, array, index in zip(signature.args[:4:2], arguments[:4:2], arguments[1:4:2], strict=True)
        ]
        item_bytes = make_array(signature.args[0])(context, builder, arguments[0]).itemsize
        cgutils.raw_memcpy(builder, pointers[0], pointers[1], arguments[4], item_bytes)
        return context.get_dummy_value()

    return types.void(out, types.int64, values, types.int64, types.int64), generate


@intrinsic
def copy_from(context: Any, out: Any, at: Any, address: Any, count: Any) -> Any:
    """Copy `count` items from a memory address to out[at:], for arrays unknown at compile time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = make_array(signature.args[0])(context, builder, arguments[0])
        to = builder.gep(array.data, [arguments[1]])
        cgutils.raw_memcpy(builder, to, builder.inttoptr(arguments[2], to.type), arguments[3], array.itemsize)
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, types.int64), generate


@intrinsic
def line_from(context: Any, out: Any, at: Any, address: Any) -> Any:
    """Copy LINE_BYTES from a memory address to out[at:]; one call of memcpy costs as much as several of these."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(8), LINE_BYTES).as_pointer()
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        loaded = builder.load(builder.inttoptr(arguments[2], line), align=1)
        builder.store(loaded, builder.bitcast(builder.gep(data, [arguments[1]]), line), align=1)
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64), generate


def _loader(kind: Any) -> Any:
    """Return an intrinsic that reads one number of the numba type `kind` from a memory address."""

    def load(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer()))

        return kind(types.int64), generate

    return intrinsic(load)


int32_at, int64_at = _loader(types.int32), _loader(types.int64)


@intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """Return the index of the lowest bit that is set in a uint64, which must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate
