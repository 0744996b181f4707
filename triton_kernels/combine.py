"""Kernel `combine_`: the direction d, written out for base optimizers that are not fused; and what `combined_update_` shares
with it: the close of the step and d of a block."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.direction import direction, direction_of
from gam_fused.triton_kernels.math.numbers import narrow
from gam_fused.triton_kernels.math.skip import close_of, count_step
from gam_fused.triton_kernels.sums import finish_sums, row_sums, square
from gam_fused.triton_kernels.walk import RUNTIME, address, block_at, chunk_of, is_whole, read, row_of, span_at, store


@triton.jit
def close_step(partials, stride, columns, control, coefficients, ROWS: tl.constexpr):
    """Decides; the first program counts the step in slots of the control block that no other reads meanwhile."""
    close = close_of(row_sums(partials, stride, columns, ROWS), control, coefficients)
    if tl.program_id(0) == 0:
        count_step(close.skip, control)
    return close


@triton.jit
def direction_block(lists, at, k, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr):
    """d of a block; `lists` and `at`: g1, last, folded and their addresses."""
    g1, last, folded = lists
    return direction(
        k,
        read(g1, at[0], block, WHOLE, DTYPE, C),
        read(last, at[1], block, WHOLE, DTYPE, C),
        read(folded, at[2], block, WHOLE, C, C),
    )


@triton.jit
def combine_block(lists, at, out_at, k, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr):
    d = direction_block(lists, at, k, block, WHOLE, DTYPE, C)
    store(out_at, block, narrow(d, DTYPE), WHOLE, DTYPE)
    return square(d)


@triton.jit(do_not_specialize=RUNTIME)
def combine_kernel(
    layout, tensors, chunk, workspace, out, g1, last, folded, coefficients, partials, stride, columns, control, sums_of_d,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    close = close_step(partials, stride, columns, control, coefficients, ROWS)
    lists = g1, last, folded
    number, tensor, position, end = chunk_of(layout, tensors, chunk, True)
    sums = tl.zeros([BLOCK], tl.float64)
    while position < end:
        span = span_at(layout, tensor, position, end, VECTOR)
        k = direction_of(row_of(layout, tensors, coefficients, tensor), close.scale, C)
        out_at = address(out, tensor, span, DTYPE)
        at = address(g1, tensor, span, DTYPE), address(last, tensor, span, DTYPE), address(folded, tensor, span, C)
        together = out_at | at[0] | at[1] | at[2]
        for offset in range(0, tl.where(out_at != 0, span.high, 0), BLOCK):
            if is_whole(span, offset, together, BLOCK):
                sums += combine_block(lists, at, out_at, k, block_at(span, offset, BLOCK), True, DTYPE, C)
            else:
                sums += combine_block(lists, at, out_at, k, block_at(span, offset, BLOCK), False, DTYPE, C)
        position = span.end
        tensor += 1
    finish_sums(workspace, number, (tl.sum(sums, 0),), sums_of_d, 0)
