"""Storage types and what they are computed in, and arithmetic that differs from Triton's in places: the twin of
csrc/math/numbers.h. C is the compute type: float32 for float32, bfloat16 and float16 storage, float64 for float64."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import INTERPRETED


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(x, C: tl.constexpr):
    """Storage to compute type: exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter misreads subnormal numbers
        return float_of(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return x.to(C)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Compute type to storage, to nearest, ties to even; NaN stays NaN."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # hardware rounds, the interpreter cuts off
        bits = bits_of(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return quiet.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def square_root(x):
    """Correctly rounded, as in C."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(x, y):
    """Correctly rounded, as in C."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def is_finite(x):
    return tl.abs(x) <= 1.7976931348623157e308


@triton.jit
def times(step, factor):
    """step * factor; 0 where `step` is 0."""
    return tl.where(step == 0.0, step, step * factor)


@triton.jit
def change_of(to, origin):
    """to - origin; 0 where they are equal."""
    return tl.where(to == origin, 0.0, to - origin)
