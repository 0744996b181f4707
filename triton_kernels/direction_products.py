"""Kernel `direction_products`: h+ h+, h- h+ and h- h- of Algorithm 2, or d^2 for clipping."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.direction import direction, direction_of, h_plus
from gam_fused.triton_kernels.math.projection import DirectionScale
from gam_fused.triton_kernels.sums import finish_sums
from gam_fused.triton_kernels.walk import RUNTIME, address, block_at, chunk_of, is_counted, is_whole, read, row_of, span_at


@triton.jit
def products(lists, at, k, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr):
    """h+ h+, h- h+ and h- h-. Without g1 there is one product, d^2, in place of the first."""
    g1, last, folded = lists
    minus = read(folded, at[2], block, WHOLE, C, C)
    first, second = read(g1, at[0], block, WHOLE, DTYPE, C), read(last, at[1], block, WHOLE, DTYPE, C)
    # With g1 the projection is not known yet: h+ stands alone, h- is folded. Without, d is complete.
    plus = direction(k, first, second, minus) if g1 is None else h_plus(k, first, second)
    plus = plus.to(tl.float64)
    minus = minus.to(tl.float64)
    return plus * plus, minus * plus, minus * minus


@triton.jit(do_not_specialize=RUNTIME)
def direction_products_kernel(
    layout, tensors, chunk, workspace, g1, last, folded, coefficients, partials, stride,
    DTYPE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lists = g1, last, folded
    number, tensor, position, end = chunk_of(layout, tensors, chunk)
    zero = tl.full((), 0.0, tl.float64)
    pp, mp, mm = zero, zero, zero  # over counted tensors
    other_pp, other_mp, other_mm = zero, zero, zero
    while position < end:
        span = span_at(layout, tensor, position, end, VECTOR)
        row = row_of(layout, tensors, coefficients, tensor)
        k = direction_of(row, DirectionScale(1.0, 1.0), C)
        at = address(g1, tensor, span, DTYPE), address(last, tensor, span, DTYPE), address(folded, tensor, span, C)
        aa = tl.zeros([BLOCK], tl.float64)
        ab = tl.zeros([BLOCK], tl.float64)
        bb = tl.zeros([BLOCK], tl.float64)
        present = at[0] | at[1] | at[2]
        for offset in range(0, tl.where(present != 0, span.high, 0), BLOCK):
            if is_whole(span, offset, present, BLOCK):
                a, b, c = products(lists, at, k, block_at(span, offset, BLOCK), True, DTYPE, C)
            else:
                a, b, c = products(lists, at, k, block_at(span, offset, BLOCK), False, DTYPE, C)
            aa += a
            if g1 is not None:
                ab += b
                bb += c
        counts = is_counted(layout, tensors, tensor)
        a, b, c = tl.sum(aa, 0), tl.sum(ab, 0), tl.sum(bb, 0)
        pp, other_pp = pp + tl.where(counts, a, 0.0), other_pp + tl.where(counts, 0.0, a)
        mp, other_mp = mp + tl.where(counts, b, 0.0), other_mp + tl.where(counts, 0.0, b)
        mm, other_mm = mm + tl.where(counts, c, 0.0), other_mm + tl.where(counts, 0.0, c)
        position = span.end
        tensor += 1
    if g1 is None:
        finish_sums(workspace, number, (pp, other_pp), partials, stride)
    else:
        finish_sums(workspace, number, (pp, other_pp, mp, other_mp, mm, other_mm), partials, stride)
