"""Ascents, lines 6 and 7 of Algorithm 1 with the gradients of appendix D: the twin of csrc/math/ascent.h."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.numbers import square_root, times


@triton.jit
def ascent_scale(radius, total, loss_scale, eps):
    """radius / (|x| + eps) for gradients that are `loss_scale` times too large, `total` the sum of their squares.

    Along x = 0 nothing moves, whatever eps: 0 in place of a division by zero, and a bound that float32 can hold.
    """
    norm = square_root(total) / loss_scale + eps
    scale = tl.where(norm > 0.0, radius / norm / loss_scale, 0.0)
    return tl.minimum(tl.maximum(scale, -3e38), 3e38)


@triton.jit
def ascend(base, scale, x, y):
    """base + scale * (x - y)."""
    return base + scale * (x - y)


@triton.jit
def ascend_adaptive(base, scale, x, y):
    """base + scale * base^2 * (x - y): element-wise scaling as in ASAM."""
    return base + times(scale * (x - y), base * base)


@triton.jit
def fold(c0, folded, c2, x):
    """What later directions need of g0 and g2, kept in one vector: folded <- FOLD_0 folded + FOLD_2 x."""
    return c0 * folded + c2 * x
