"""Kernel `combined_update_`: the direction d, theta from its backup, and the base optimizer's update, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.combine import close_step, direction_block
from gam_fused.triton_kernels.math.adam import adam, adam_of
from gam_fused.triton_kernels.math.constants import SGD
from gam_fused.triton_kernels.math.direction import direction_of
from gam_fused.triton_kernels.math.numbers import narrow, widen
from gam_fused.triton_kernels.math.sgd import sgd, sgd_momentum, sgd_of
from gam_fused.triton_kernels.restore import restore_span
from gam_fused.triton_kernels.sums import finish_sums, square
from gam_fused.triton_kernels.walk import RUNTIME, address, block_at, chunk_of, is_whole, load, row_of, span_at, store

TENSOR_BLOCK = tl.constexpr(256)


@triton.jit
def update_block(
    lists,
    at,
    old_at,
    state,
    state_at,
    k,
    h,
    block,
    WHOLE: tl.constexpr,
    ALGORITHM: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
):
    """One block of theta and of the optimizer's state. Returns d^2."""
    theta_at, state1_at, state2_at, state3_at = state_at
    state1, state3 = state
    d = direction_block(lists, at, k, block, WHOLE, DTYPE, C)
    old = widen(load(old_at, block, WHOLE, DTYPE), C)
    if ALGORITHM == SGD:
        if state1 is None:
            new = sgd(h, old, d)
        else:
            new, moved = sgd_momentum(h, old, d, widen(load(state1_at, block, WHOLE, DTYPE), C))
            store(state1_at, block, narrow(moved, DTYPE), WHOLE, DTYPE)
    else:
        maximum = widen(load(state3_at, block, WHOLE, DTYPE), C) if state3 is not None else None
        exp_avg, exp_avg_sq = widen(load(state1_at, block, WHOLE, DTYPE), C), widen(load(state2_at, block, WHOLE, DTYPE), C)
        new, exp_avg, exp_avg_sq, maximum = adam(h, old, d, exp_avg, exp_avg_sq, maximum)
        store(state1_at, block, narrow(exp_avg, DTYPE), WHOLE, DTYPE)
        store(state2_at, block, narrow(exp_avg_sq, DTYPE), WHOLE, DTYPE)
        if state3 is not None:
            store(state3_at, block, narrow(maximum, DTYPE), WHOLE, DTYPE)
    store(theta_at, block, narrow(new, DTYPE), WHOLE, DTYPE)
    return square(d)


@triton.jit
def base_of(row, step, has_state1, ALGORITHM: tl.constexpr, C: tl.constexpr):
    """The base optimizer's scalars. A tensor without a momentum buffer takes d as its momentum, as in a first step."""
    if ALGORITHM == SGD:
        return sgd_of(row, tl.where(has_state1, step, 1.0), C)
    else:
        return adam_of(row, step, C)


@triton.jit
def advance_steps(tensors, g1, last, folded, steps):
    """steps += 1 for every tensor that was updated."""
    for first in range(0, tensors, TENSOR_BLOCK):
        tensor = first + tl.arange(0, TENSOR_BLOCK)
        there = tensor < tensors
        updated = tl.load(last + tensor, there, other=0)
        if g1 is not None:
            updated = updated | tl.load(g1 + tensor, there, other=0)
        if folded is not None:
            updated = updated | tl.load(folded + tensor, there, other=0)
        counter = tl.load(steps + tensor, there, other=0).to(tl.pointer_type(tl.float32))
        tl.store(counter, tl.load(counter, updated != 0, other=0.0) + 1.0, updated != 0)


@triton.jit(do_not_specialize=RUNTIME)
def combined_update_kernel(
    layout, tensors, chunk, workspace, theta, backup, g1, last, folded, state1, state2, state3, steps,
    coefficients, partials, stride, columns, control, sums_of_d,
    ALGORITHM: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    close = close_step(partials, stride, columns, control, coefficients, ROWS)
    lists = g1, last, folded
    state = state1, state3
    number, tensor, position, end = chunk_of(layout, tensors, chunk, True)
    sums = tl.zeros([BLOCK], tl.float64)
    while position < end:
        span = span_at(layout, tensor, position, end, VECTOR)
        theta_at = address(theta, tensor, span, DTYPE)
        at = address(g1, tensor, span, DTYPE), address(last, tensor, span, DTYPE), address(folded, tensor, span, C)
        if close.skip | ((at[0] | at[1] | at[2]) == 0):
            if backup is not None:
                restore_span(theta_at, address(backup, tensor, span, DTYPE), span, DTYPE, BLOCK)
        else:
            old_at = theta_at if backup is None else address(backup, tensor, span, DTYPE)
            state_at = (
                theta_at,
                address(state1, tensor, span, DTYPE),
                address(state2, tensor, span, DTYPE),
                address(state3, tensor, span, DTYPE),
            )
            row = row_of(layout, tensors, coefficients, tensor)
            step = tl.load(tl.load(steps + tensor).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            k = direction_of(row, close.scale, C)
            h = base_of(row, step, state_at[1] != 0, ALGORITHM, C)
            together = at[0] | at[1] | at[2] | old_at | theta_at | state_at[1] | state_at[2] | state_at[3]
            for offset in range(0, span.high, BLOCK):
                if is_whole(span, offset, together, BLOCK):
                    sums += update_block(
                        lists, at, old_at, state, state_at, k, h, block_at(span, offset, BLOCK), True, ALGORITHM, DTYPE, C
                    )
                else:
                    sums += update_block(
                        lists, at, old_at, state, state_at, k, h, block_at(span, offset, BLOCK), False, ALGORITHM, DTYPE, C
                    )
        position = span.end
        tensor += 1
    # Programs of one tensor all read its step: the last one counts the steps.
    if finish_sums(workspace, number, (tl.sum(sums, 0),), sums_of_d, 0) & (close.skip == 0):
        advance_steps(tensors, g1, last, folded, steps)
