"""Algorithm 2's projection of h- on h+, and the clipping of d: the twin of csrc/math/projection.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.numbers import is_finite, square_root


class DirectionScale(NamedTuple):
    """plus_scale of Algorithm 2, and the factor that undoes the loss scale and clips |d|."""

    plus_scale: Any
    unscale: Any


@triton.jit
def direction_scale(total, minus, loss_scale, max_norm):
    """`total`: sums over counted and over other tensors of h+ h+, h- h+ and h- h- (6 of them), or of d^2 (2)."""
    plus_scale = loss_scale * 0.0 + 1.0
    squared = total[0] + total[1]
    if len(total) == 6:
        plus_scale = 1.0 - minus * tl.where(total[0] > 0.0, total[2] / total[0], 0.0)
        crossed = 2.0 * plus_scale * minus * (total[2] + total[3])
        squared = plus_scale * plus_scale * squared + crossed + minus * minus * (total[4] + total[5])
    norm = square_root(tl.where(squared > 0.0, squared, 0.0)) / loss_scale
    norm = tl.where(is_finite(squared), norm, float("inf"))
    clip = tl.where(max_norm > 0.0, max_norm / (norm + 1e-6), 1.0)
    return DirectionScale(plus_scale, tl.where(clip < 1.0, clip, 1.0) / loss_scale)
