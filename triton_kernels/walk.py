"""The walk over the flat vector, written once: a chunk per program, the tensors inside a chunk, blocks inside a tensor.

Kernels take `layout`, the int64 vector of `Layout.on`, and for each list an int64 vector of addresses (`TensorList.on`), or
None where the list is not used. Blocks lie on 16-byte marks of their tensor, so that whole ones are read and written 16
bytes at a time; the first and the last of a chunk, and all of a tensor whose memory is not so aligned, are masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import COLUMNS
from gam_fused.triton_kernels.math.numbers import widen

# Arguments of kernels that are not compiled in: no new kernel for another alignment, or for a number that is 1 or even.
RUNTIME = (
    *("layout", "tensors", "chunk", "workspace", "coefficients", "partials", "stride", "columns", "control", "ascent"),
    *("realised", "sums_of_d", "theta", "base", "backup", "x", "y", "g1", "last", "folded", "weight", "out"),
    *("state1", "state2", "state3", "steps"),
)


class Span(NamedTuple):
    """Part of one tensor inside a chunk.

    start: of the tensor in the flat vector. end: of the part, there. first: the tensor's element where blocks begin, the
    last 16-byte mark before the part. low, high: the part, counted from `first`.
    """

    start: Any
    end: Any
    first: Any
    low: Any
    high: Any


class Block(NamedTuple):
    """BLOCK elements of a span, from `offset` on, counted as `low` and `high` are; `index` counts them from 0.

    inside: which of them are in the span. WHOLE, which goes with a block: all are, and it is on a 16-byte mark in every
    list.
    """

    offset: Any
    index: Any
    inside: Any


@triton.jit
def chunk_of(layout, tensors, chunk, BACKWARDS: tl.constexpr = False):
    """The chunk of this program: its number, the tensor that holds its first element, that element, and the chunk's end.

    BACKWARDS: for a kernel that reads what the one before it has read; the last chunks are still in the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    number = tl.num_programs(0) - 1 - program if BACKWARDS else program
    position = number * chunk
    end = tl.minimum(position + chunk, tl.load(layout + tensors))
    return number, tl.load(layout + 3 * (tensors + 1) + number), position, end


@triton.jit
def span_at(layout, tensor, position, end, VECTOR: tl.constexpr):
    """The part of `tensor` from `position` to the end of the tensor or of the chunk."""
    start = tl.load(layout + tensor)
    stop = tl.minimum(end, tl.load(layout + tensor + 1))
    begin = position - start
    low = begin % VECTOR
    first = begin - low
    return Span(start, stop, first, low.to(tl.int32), (stop - start - first).to(tl.int32))


@triton.jit
def row_of(layout, tensors, coefficients, tensor):
    """The row of the coefficient table for `tensor`."""
    return coefficients + tl.load(layout + (tensors + 1) + tensor) * COLUMNS


@triton.jit
def is_counted(layout, tensors, tensor):
    return tl.load(layout + 2 * (tensors + 1) + tensor) != 0


@triton.jit
def address(addresses, tensor, span, DTYPE: tl.constexpr):
    """Address of the span's first block in a list, 0 where the tensor is missing or the list is not used."""
    if addresses is None:
        return tl.full((), 0, tl.int64)
    else:
        start = tl.load(addresses + tensor)
        return tl.where(start != 0, start + span.first * (DTYPE.primitive_bitwidth // 8), 0)


@triton.jit
def is_whole(span, offset, addresses, BLOCK: tl.constexpr):
    """Whether the block at `offset` is full of elements of the span and on a 16-byte mark in every list. `addresses`: all
    of them, or-ed together."""
    return (addresses % 16 == 0) & (offset >= span.low) & (offset + BLOCK <= span.high)


@triton.jit
def block_at(span, offset, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return Block(offset, index, (index >= span.low - offset) & (index < span.high - offset))


@triton.jit
def pointers(address, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    first = (address + block.offset * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if WHOLE:
        first = tl.multiple_of(first, 16)
    return first + block.index


@triton.jit
def mask_of(address, block, WHOLE: tl.constexpr):
    """Elements to read or write: none of a missing tensor."""
    if WHOLE:
        return address != 0
    else:
        return block.inside & (address != 0)


@triton.jit
def load(address, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """The block's elements as stored, zeros where the tensor is missing (address 0)."""
    return tl.load(pointers(address, block, WHOLE, DTYPE), mask_of(address, block, WHOLE), other=0.0)


@triton.jit
def read(addresses, address, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr):
    """The block's elements in compute type; zeros where the list is not used or the tensor is missing."""
    if addresses is None:
        return tl.zeros_like(block.index).to(C)
    else:
        return widen(load(address, block, WHOLE, DTYPE), C)


@triton.jit
def store(address, block, values, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """Write the block, if the tensor is there."""
    tl.store(pointers(address, block, WHOLE, DTYPE), values, mask_of(address, block, WHOLE))
