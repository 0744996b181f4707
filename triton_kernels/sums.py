"""Sums in float64, in an order that depends on element positions only: no atomics, one column per chunk."""

from __future__ import annotations

import triton
import triton.language as tl

COLUMN_BLOCK = tl.constexpr(256)


@triton.jit
def square(x):
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def row_sums(partials, stride, columns, ROWS: tl.constexpr):
    """The sum over the columns of each of ROWS rows, a tuple. Every program adds up all columns, in the same order."""
    PADDED: tl.constexpr = triton.next_power_of_2(ROWS)
    row = tl.arange(0, PADDED)[:, None]
    lanes = tl.zeros([PADDED, COLUMN_BLOCK], tl.float64)
    for first in range(0, columns, COLUMN_BLOCK):
        column = first + tl.arange(0, COLUMN_BLOCK)[None, :]
        lanes += tl.load(partials + row * stride + column, (row < ROWS) & (column < columns), other=0.0)
    totals = tl.sum(lanes, 1)
    row = tl.arange(0, PADDED)
    if ROWS == 2:
        return pick(totals, row, 0), pick(totals, row, 1)
    else:
        return (
            pick(totals, row, 0),
            pick(totals, row, 1),
            pick(totals, row, 2),
            pick(totals, row, 3),
            pick(totals, row, 4),
            pick(totals, row, 5),
        )


@triton.jit
def pick(totals, row, k: tl.constexpr):
    return tl.sum(tl.where(row == k, totals, 0.0), 0)


@triton.jit
def put(partials, stride, row: tl.constexpr, counted, others):
    """This chunk's sums over counted and over other tensors into its column of rows `row` and `row + 1`."""
    column = partials + tl.program_id(0)
    tl.store(column + row * stride, counted)
    tl.store(column + (row + 1) * stride, others)
