"""The walk over the flat vector, written once: a chunk per program, the tensors inside a chunk, blocks inside a tensor.

Kernels take `layout`, the int64 vector of `Layout.on`, and for each list an int64 vector of addresses (`TensorList.on`), or
None where the list is not used. Blocks lie on 16-byte marks of their tensor, so that whole ones are read and written 16
bytes at a time; the first and the last of a chunk, and all of a tensor whose memory is not so aligned, are masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gam_fused.triton_kernels.gam_math import COLUMNS

# Arguments of kernels that are not compiled in: no new kernel for another alignment, or for a number that is 1 or even.
RUNTIME = (
    *("layout", "tensors", "chunk", "coefficients", "partials", "stride", "columns", "control", "ascent"),
    *("realised", "sums_of_d", "theta", "base", "backup", "x", "y", "x1", "x3", "acc", "weight", "out"),
    *("first", "second", "third", "steps"),
)


class Span(NamedTuple):
    """Part of one tensor inside a chunk.

    tensor: its index. start: of the tensor, in the flat vector. begin, stop: elements of the tensor. first: `begin`, rounded
    down to a 16-byte mark. end: `stop` in the flat vector.
    """

    tensor: Any
    start: Any
    begin: Any
    stop: Any
    first: Any
    end: Any


class Block(NamedTuple):
    """BLOCK elements of a tensor, from `start` on, those from `low` to `high` in the span. WHOLE: all are, and aligned."""

    start: Any
    index: Any
    low: Any
    high: Any
    WHOLE: Any


@triton.jit
def chunk_of(layout, tensors, chunk):
    """The chunk of this program: the tensor that holds its first element, that element, and the chunk's end."""
    program = tl.program_id(0).to(tl.int64)
    position = program * chunk
    end = tl.minimum(position + chunk, tl.load(layout + tensors))
    return tl.load(layout + 3 * (tensors + 1) + program), position, end


@triton.jit
def span_at(layout, tensor, position, end, VECTOR: tl.constexpr):
    """The part of `tensor` from `position` to the end of the tensor or of the chunk."""
    start = tl.load(layout + tensor)
    stop = tl.minimum(end, tl.load(layout + tensor + 1))
    begin = position - start
    return Span(tensor, start, begin, stop - start, begin - begin % VECTOR, stop)


@triton.jit
def row_of(layout, tensors, coefficients, tensor):
    """The row of the coefficient table for `tensor`."""
    return coefficients + tl.load(layout + (tensors + 1) + tensor) * COLUMNS


@triton.jit
def is_counted(layout, tensors, tensor):
    return tl.load(layout + 2 * (tensors + 1) + tensor) != 0


@triton.jit
def address(addresses, tensor):
    """Address of `tensor` in a list, 0 where it is missing."""
    if addresses is None:
        return tl.full((), 0, tl.int64)
    else:
        return tl.load(addresses + tensor)


@triton.jit
def is_whole(span, start, addresses, BLOCK: tl.constexpr):
    """Whether the block at `start` is full of elements of the span and on a 16-byte mark in every list. `addresses`: all
    of them, or-ed together."""
    return (addresses % 16 == 0) & (start >= span.begin) & (start + BLOCK <= span.stop)


@triton.jit
def block_at(span, start, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    low = (span.begin - start).to(tl.int32)
    high = tl.minimum(span.stop - start, BLOCK).to(tl.int32)
    return Block(start, tl.arange(0, BLOCK), low, high, WHOLE)


@triton.jit
def pointers(address, block, DTYPE: tl.constexpr):
    first = (address + block.start * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if block.WHOLE:
        first = tl.multiple_of(first, 16)
    return first + block.index


@triton.jit
def mask_of(block, present):
    if block.WHOLE:
        return present
    else:
        return (block.index >= block.low) & (block.index < block.high) & present


@triton.jit
def load(address, block, DTYPE: tl.constexpr):
    """The block's elements as stored, zeros where the tensor is missing (address 0)."""
    return tl.load(pointers(address, block, DTYPE), mask_of(block, address != 0), other=0.0)


@triton.jit
def read(addresses, address, block, DTYPE: tl.constexpr, C: tl.constexpr):
    """The block's elements in compute type; zeros where the list is not used or the tensor is missing."""
    if addresses is None:
        return tl.zeros_like(block.index).to(C)
    else:
        return load(address, block, DTYPE).to(C)


@triton.jit
def store(address, block, values, DTYPE: tl.constexpr):
    """Write the block, if the tensor is there."""
    tl.store(pointers(address, block, DTYPE), values, mask_of(block, address != 0))
