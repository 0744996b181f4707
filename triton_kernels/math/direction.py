"""The direction d: the twin of csrc/math/direction.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import DIRECTION_FOLDED, DIRECTION_G1, DIRECTION_LAST


class Direction(NamedTuple):
    """Coefficients of g1, last and folded in d."""

    g1: Any
    last: Any
    folded: Any


@triton.jit
def direction_of(row, scale, C: tl.constexpr):
    """From a row of the coefficient table."""
    plus = scale.plus_scale * scale.unscale
    return Direction(
        (plus * tl.load(row + DIRECTION_G1)).to(C),
        (plus * tl.load(row + DIRECTION_LAST)).to(C),
        (scale.unscale * tl.load(row + DIRECTION_FOLDED)).to(C),
    )


@triton.jit
def h_plus(k, g1, last):
    return k.g1 * g1 + k.last * last


@triton.jit
def direction(k, g1, last, folded):
    return h_plus(k, g1, last) + k.folded * folded
