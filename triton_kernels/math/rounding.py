"""Stochastic rounding of perturbed low-precision weights: the twin of csrc/math/rounding.h."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.numbers import bits_of, float_of, narrow


@triton.jit
def mix32(x):
    """A 32-bit integer hash."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, step, ascent):
    """The key of one ascent of one step; `seed` and `step` are whole numbers kept in float64."""
    return mix32(seed.to(tl.int64).to(tl.uint32) ^ mix32((step.to(tl.int64) * 4 + ascent).to(tl.uint32)))


@triton.jit
def noise_stream(key, position):
    """The stream of elements whose positions in the flat vector share their upper 32 bits."""
    return mix32((position >> 32).to(tl.uint32) ^ key)


@triton.jit
def noise(stream, low):
    """The noise of one element: `low` is the lower half of its position."""
    return mix32(stream + low)


@triton.jit
def drop_bits(x, noise, low: tl.constexpr):
    return float_of((bits_of(x) + (noise & low)) & (0xFFFFFFFF - low))


@triton.jit
def stochastic_round(x, noise, DTYPE: tl.constexpr):
    """float32 to bfloat16 or float16: up with the probability of the distance to the lower neighbour."""
    magnitude = bits_of(x) & 0x7FFFFFFF
    LARGEST: tl.constexpr = 0x7F7F0000 if DTYPE == tl.bfloat16 else 0x477FE000  # beyond, the upper neighbour is infinity
    if DTYPE == tl.bfloat16:
        rounded = drop_bits(x, noise, 0xFFFF)
    else:
        fraction = (noise >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        # float16 is 2^-24 apart below 2^-14
        subnormal = tl.floor(x * 16777216.0 + fraction) * 5.9604644775390625e-08
        rounded = tl.where(magnitude < 0x38800000, subnormal, drop_bits(x, noise, 0x1FFF))
    return narrow(tl.where(magnitude < LARGEST, rounded, x), DTYPE)
