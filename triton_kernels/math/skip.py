"""The skip decision: a step of which a gradient was not finite moves nothing and is counted; twin of csrc/math/skip.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import FOUND_INF, LAST_SKIPPED, NOISE_STEP, SKIPPED
from gam_fused.triton_kernels.math.numbers import is_finite
from gam_fused.triton_kernels.math.projection import direction_scale


@triton.jit
def all_finite(total):
    finite = is_finite(total[0]) & is_finite(total[1])
    if len(total) == 6:
        finite = finite & is_finite(total[2]) & is_finite(total[3]) & is_finite(total[4]) & is_finite(total[5])
    return finite


@triton.jit
def stays(bad, ascent, control):
    """Whether an ascent stays at its base: its reduction is `bad`, or that of an ascent before it in this step was."""
    return bad | ((ascent != 0) & (tl.load(control + FOUND_INF) != 0.0))


@triton.jit
def note_found_inf(bad, ascent, control):
    """What the ascent tells those after it; the first one forgets the step before."""
    if bad | (ascent == 0):
        tl.store(control + FOUND_INF, bad.to(tl.float64))


class Close(NamedTuple):
    """What a step's end knows before it visits elements: whether to skip, and the scalars of d."""

    skip: Any
    scale: Any


@triton.jit
def close_of(total, control, coefficients):
    """`total`: sums of the rows of the last reduction."""
    skip = (tl.load(control + FOUND_INF) != 0.0) | (all_finite(total) == 0)
    return Close(skip, direction_scale(total, coefficients, control))


@triton.jit
def count_step(skip, control):
    tl.store(control + LAST_SKIPPED, skip.to(tl.float64))
    tl.store(control + SKIPPED, tl.load(control + SKIPPED) + skip.to(tl.float64))
    tl.store(control + NOISE_STEP, tl.load(control + NOISE_STEP) + 1.0)
