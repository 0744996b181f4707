"""Kernel `squared_norm`: sums of ((x - y) * weight)^2."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.numbers import times
from gam_fused.triton_kernels.sums import finish_sums, square
from gam_fused.triton_kernels.walk import RUNTIME, address, block_at, chunk_of, is_counted, is_whole, read, span_at


@triton.jit
def squares(lists, at, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr):
    x, y, weight = lists
    value = read(x, at[0], block, WHOLE, DTYPE, C) - read(y, at[1], block, WHOLE, DTYPE, C)
    if weight is not None:
        value = times(value, read(weight, at[2], block, WHOLE, DTYPE, C))
    return square(value)


@triton.jit(do_not_specialize=RUNTIME)
def squared_norm_kernel(
    layout, tensors, chunk, workspace, x, y, weight, partials, stride,
    DTYPE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, tensor, position, end = chunk_of(layout, tensors, chunk)
    counted = tl.full((), 0.0, tl.float64)
    others = tl.full((), 0.0, tl.float64)
    while position < end:
        span = span_at(layout, tensor, position, end, VECTOR)
        at = address(x, tensor, span, DTYPE), address(y, tensor, span, DTYPE), address(weight, tensor, span, DTYPE)
        sums = tl.zeros([BLOCK], tl.float64)
        high = tl.where((at[0] | at[1]) != 0, span.high, 0)
        for offset in range(0, high, BLOCK):
            if is_whole(span, offset, at[0] | at[1] | at[2], BLOCK):
                sums += squares((x, y, weight), at, block_at(span, offset, BLOCK), True, DTYPE, C)
            else:
                sums += squares((x, y, weight), at, block_at(span, offset, BLOCK), False, DTYPE, C)
        total = tl.sum(sums, 0)
        counts = is_counted(layout, tensors, tensor)
        counted += tl.where(counts, total, 0.0)
        others += tl.where(counts, 0.0, total)
        position = span.end
        tensor += 1
    finish_sums(workspace, number, (counted, others), partials, stride)
