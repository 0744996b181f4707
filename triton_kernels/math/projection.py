"""What is known of the direction before elements are visited: the twin of csrc/math/projection.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import ALPHA, DIRECTION_FOLDED, LOSS_SCALE, MAX_NORM, MAX_RATIO, XI
from gam_fused.triton_kernels.math.numbers import is_finite, square_root


class DirectionScale(NamedTuple):
    """plus_scale, the weight of h+ in d, and the factor that undoes the loss scale and clips |d|."""

    plus_scale: Any
    unscale: Any


@triton.jit
def projecting_scale(minus, plus_plus, minus_plus):
    """Algorithm 2: 1 - minus s takes the projection of h- on h+ out of minus h-; s = <h-, h+> / |h+|^2."""
    return 1.0 - minus * tl.where(plus_plus > 0.0, minus_plus / plus_plus, 0.0)


@triton.jit
def bounded_scale(row, plus_plus, minus_minus, loss_scale, xi):
    """alpha' = min(alpha, max_ratio |h_loss| / (|h_norm| + xi)), with h- = h_loss and h+ = h_norm.

    alpha may be infinite; the result is a number that float32 can hold.
    """
    norm = square_root(plus_plus) / loss_scale + xi
    bound = tl.where(norm > 0.0, tl.load(row + MAX_RATIO) * (square_root(minus_minus) / loss_scale) / norm, 1e30)
    alpha = tl.load(row + ALPHA)
    alpha = tl.where(alpha < bound, alpha, bound)
    return tl.where(alpha < 1e30, alpha, 1e30)


@triton.jit
def direction_scale(total, row, control):
    """`total`: sums over counted and over other tensors of h+ h+, h- h+ and h- h- (6 of them), or of d^2 (2).

    `row`: of the coefficient table, the first.
    """
    loss_scale, max_norm = tl.load(control + LOSS_SCALE), tl.load(control + MAX_NORM)
    minus = tl.load(row + DIRECTION_FOLDED)
    plus_scale = loss_scale * 0.0 + 1.0
    squared = total[0] + total[1]
    if len(total) == 6:
        bounded = bounded_scale(row, total[0], total[4], loss_scale, tl.load(control + XI))
        plus_scale = tl.where(tl.load(row + MAX_RATIO) > 0.0, bounded, projecting_scale(minus, total[0], total[2]))
        crossed = 2.0 * plus_scale * minus * (total[2] + total[3])
        squared = plus_scale * plus_scale * squared + crossed + minus * minus * (total[4] + total[5])
    norm = square_root(tl.where(squared > 0.0, squared, 0.0)) / loss_scale
    norm = tl.where(is_finite(squared), norm, float("inf"))
    clip = tl.where(max_norm > 0.0, max_norm / (norm + 1e-6), 1.0)
    return DirectionScale(plus_scale, tl.where(clip < 1.0, clip, 1.0) / loss_scale)
