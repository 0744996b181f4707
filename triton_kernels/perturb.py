"""Kernel `perturb_`: theta <- base + radius * (x - y) / (norm + eps), with the backup and the fold of folded on the way."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.ascent import ascend, ascend_adaptive, ascent_scale, fold
from gam_fused.triton_kernels.math.constants import (
    FOLD_0,
    FOLD_2,
    LOSS_SCALE,
    NOISE_SEED,
    NOISE_STEP,
    RADIUS_0,
    XI,
)
from gam_fused.triton_kernels.math.numbers import change_of, widen
from gam_fused.triton_kernels.math.rounding import noise, noise_key, noise_stream, stochastic_round
from gam_fused.triton_kernels.math.skip import all_finite, note_found_inf, stays
from gam_fused.triton_kernels.sums import finish_sums, row_sums, square
from gam_fused.triton_kernels.walk import RUNTIME, address, block_at, chunk_of, is_whole, load, read, row_of, span_at, store


@triton.jit
def to_storage(moved, span, block, key, DTYPE: tl.constexpr):
    """Low-precision weights are rounded stochastically, or a perturbation below their spacing would be lost."""
    if DTYPE == tl.bfloat16 or DTYPE == tl.float16:
        position = span.start + span.first + block.offset
        first = position.to(tl.uint32)
        low = first + block.index.to(tl.uint32)
        here, beyond = noise_stream(key, position), noise_stream(key, position + (1 << 32))  # a block may cross 2^32
        return stochastic_round(moved, noise(tl.where(low < first, beyond, here), low), DTYPE)
    else:
        return moved


@triton.jit
def perturb_block(
    lists,
    at,
    block,
    span,
    scale,
    active,
    folds,
    key,
    WHOLE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
):
    """One block of every list. Returns (theta - base)^2 as stored."""
    base, x, y, folded, backup = lists
    theta_at, base_at, x_at, y_at, folded_at, backup_at = at
    before = load(theta_at if base is None else base_at, block, WHOLE, DTYPE)
    if backup is not None:
        store(backup_at, block, before if base is None else load(theta_at, block, WHOLE, DTYPE), WHOLE, DTYPE)
    origin, gradient = widen(before, C), read(x, x_at, block, WHOLE, DTYPE, C)
    if ADAPTIVE:
        moved = ascend_adaptive(origin, scale, gradient, read(y, y_at, block, WHOLE, DTYPE, C))
    else:
        moved = ascend(origin, scale, gradient, read(y, y_at, block, WHOLE, DTYPE, C))
    after = tl.where(active, to_storage(moved, span, block, key, DTYPE), before)
    store(theta_at, block, after, WHOLE, DTYPE)
    if folded is not None:
        store(folded_at, block, fold(folds[0], load(folded_at, block, WHOLE, C), folds[1], gradient), WHOLE, C)
    change = tl.where(active, change_of(widen(after, C), origin), 0.0)
    if not WHOLE:
        change = tl.where(block.inside, change, 0.0)
    return square(change)


@triton.jit(do_not_specialize=RUNTIME)
def perturb_kernel(
    layout, tensors, chunk, workspace, theta, base, x, y, folded, backup,
    coefficients, partials, stride, columns, control, realised, ascent, ADAPTIVE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = row_sums(partials, stride, columns, 2)
    bad = all_finite(total) == 0
    # Others may read FOUND_INF before or after it is written: what they make of it is the same.
    stay = stays(bad, ascent, control)
    if tl.program_id(0) == 0:
        note_found_inf(bad, ascent, control)
    key = noise_key(tl.load(control + NOISE_SEED), tl.load(control + NOISE_STEP), ascent)
    loss_scale, eps = tl.load(control + LOSS_SCALE), tl.load(control + XI)

    lists = base, x, y, folded, backup
    number, tensor, position, end = chunk_of(layout, tensors, chunk, True)
    sums = tl.zeros([BLOCK], tl.float64)
    while position < end:
        span = span_at(layout, tensor, position, end, VECTOR)
        row = row_of(layout, tensors, coefficients, tensor)
        at = (
            address(theta, tensor, span, DTYPE),
            address(base, tensor, span, DTYPE),
            address(x, tensor, span, DTYPE),
            address(y, tensor, span, DTYPE),
            address(folded, tensor, span, C),
            address(backup, tensor, span, DTYPE),
        )
        scale = tl.where(stay, 0.0, ascent_scale(tl.load(row + RADIUS_0 + ascent), total[0], loss_scale, eps))
        active = (scale != 0.0) & ((at[2] | at[3]) != 0)
        folds = tl.load(row + FOLD_0).to(C), tl.load(row + FOLD_2).to(C)
        scale = scale.to(C)
        together = at[0] | at[1] | at[2] | at[3] | at[4] | at[5]
        for offset in range(0, span.high, BLOCK):
            if is_whole(span, offset, together, BLOCK):
                sums += perturb_block(
                    lists, at, block_at(span, offset, BLOCK), span, scale, active, folds, key, True, ADAPTIVE, DTYPE, C
                )
            else:
                sums += perturb_block(
                    lists, at, block_at(span, offset, BLOCK), span, scale, active, folds, key, False, ADAPTIVE, DTYPE, C
                )
        position = span.end
        tensor += 1
    finish_sums(workspace, number, (tl.sum(sums, 0),), realised, 0)
