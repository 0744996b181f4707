"""Sums in float64, in an order that depends on element positions only; a reduction ends in the kernel that makes it."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import GROUP

COLUMN_BLOCK = tl.constexpr(256)


@triton.jit
def square(x):
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def row_sums(partials, stride, columns, ROWS: tl.constexpr):
    """The sum of each of ROWS rows over all blocks of tensors, a column of each; a tuple."""
    if ROWS == 2:
        return row_sum(partials, columns), row_sum(partials + stride, columns)
    else:
        return (
            row_sum(partials, columns),
            row_sum(partials + stride, columns),
            row_sum(partials + 2 * stride, columns),
            row_sum(partials + 3 * stride, columns),
            row_sum(partials + 4 * stride, columns),
            row_sum(partials + 5 * stride, columns),
        )


@triton.jit
def row_sum(row, columns):
    total = tl.load(row)
    for column in range(1, columns):
        total += tl.load(row + column)
    return total


@triton.jit
def is_last(ticket, count):
    """Whether this program is the last of `count` to come here: then it sees what all of them wrote before.

    Leaves the ticket at 0 for the next kernel.
    """
    tl.debug_barrier()  # all threads of this program have read and written before it draws
    drawn = ticket.to(tl.pointer_type(tl.int32))
    last = tl.atomic_add(drawn, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(drawn, 0)
    return last


@triton.jit
def sum_rows(target, target_stride, source, stride, count, ROWS: tl.constexpr):
    """target[row * target_stride] <- the sum of source[row * stride + i] over i < count."""
    for row in range(ROWS):
        lanes = tl.zeros([COLUMN_BLOCK], tl.float64)
        for first in range(0, count, COLUMN_BLOCK):
            column = first + tl.arange(0, COLUMN_BLOCK)
            lanes += tl.load(source + row * stride + column, column < count, other=0.0, cache_modifier=".cg")
        tl.store(target + row * target_stride, tl.sum(lanes, 0))


@triton.jit
def finish_sums(workspace, chunk, values, out, stride):
    """out[row] <- the sum over all chunks of their `values`: of groups of chunks first, then of the groups.

    Each sum is made by the last program of those it needs. Returns whether this one is the last of all. The layout of the
    workspace is in csrc/operands.h.
    """
    ROWS: tl.constexpr = len(values)
    chunks = tl.num_programs(0).to(tl.int64)
    groups = (chunks - 1) // GROUP + 1
    of_chunks = workspace + groups + 1
    of_groups = of_chunks + ROWS * chunks
    for row in tl.static_range(ROWS):
        tl.store(of_chunks + row * chunks + chunk, values[row])
    group = chunk // GROUP
    first = group * GROUP
    members = tl.minimum(chunks - first, GROUP)
    last = is_last(workspace + group, members)
    if last:
        sum_rows(of_groups + group, groups, of_chunks + first, chunks, members, ROWS)
        last = is_last(workspace + groups, groups)
        if last:
            sum_rows(out, stride, of_groups, groups, groups, ROWS)
    return last
