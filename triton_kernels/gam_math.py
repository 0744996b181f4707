"""Every formula of Gradient norm Aware Minimization once, for Triton kernels: the twin of csrc/gam_math.h and
csrc/low_precision.h, with the same names in the same order.

Zhang et al., "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization", CVPR 2023,
arXiv 2303.03108: Algorithm 1, appendix D (Hessian-vector products from gradients), Algorithm 2 (appendix).
The executable specification is gam_fused/backends/reference.py. Scalars are float64; C, the compute type, is float32 for
float32, bfloat16 and float16 storage, float64 for float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

from gam_fused.constants import Algorithm, Column, Control, Flag

# Kernels see module constants only as constexpr.
RADIUS_0 = tl.constexpr(int(Column.RADIUS_0))
FOLD_0 = tl.constexpr(int(Column.FOLD_0))
FOLD_2 = tl.constexpr(int(Column.FOLD_2))
DIRECTION_G1 = tl.constexpr(int(Column.DIRECTION_G1))
DIRECTION_LAST = tl.constexpr(int(Column.DIRECTION_LAST))
DIRECTION_FOLDED = tl.constexpr(int(Column.DIRECTION_FOLDED))
FLAGS = tl.constexpr(int(Column.FLAGS))
LR = tl.constexpr(int(Column.LR))
WEIGHT_DECAY = tl.constexpr(int(Column.WEIGHT_DECAY))
MOMENTUM = tl.constexpr(int(Column.MOMENTUM))
DAMPENING = tl.constexpr(int(Column.DAMPENING))
BETA1 = tl.constexpr(int(Column.BETA1))
BETA2 = tl.constexpr(int(Column.BETA2))
EPS = tl.constexpr(int(Column.EPS))
COLUMNS = tl.constexpr(len(Column))

FOUND_INF = tl.constexpr(int(Control.FOUND_INF))
LAST_SKIPPED = tl.constexpr(int(Control.LAST_SKIPPED))
SKIPPED = tl.constexpr(int(Control.SKIPPED))
LOSS_SCALE = tl.constexpr(int(Control.LOSS_SCALE))
XI = tl.constexpr(int(Control.EPS))  # the paper's name, since EPS is Adam's here
MAX_NORM = tl.constexpr(int(Control.MAX_NORM))
NOISE_SEED = tl.constexpr(int(Control.NOISE_SEED))
NOISE_STEP = tl.constexpr(int(Control.NOISE_STEP))
TICKET = tl.constexpr(int(Control.TICKET))

NESTEROV = tl.constexpr(int(Flag.NESTEROV))
MAXIMIZE = tl.constexpr(int(Flag.MAXIMIZE))
AMSGRAD = tl.constexpr(int(Flag.AMSGRAD))
DECOUPLED = tl.constexpr(int(Flag.DECOUPLED))

SGD = tl.constexpr(int(Algorithm.SGD))

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


# ----------------------------------------------------------------------------------------------------------------------
# low_precision.h: storage types.


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


# ----------------------------------------------------------------------------------------------------------------------
# gam_math.h


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


# Weights may be infinite (masks). What does not move stays there, as in torch: 0 * inf and inf - inf, both NaN, are not
# computed.


@triton.jit
def times(step, factor):
    """step * factor; 0 where `step` is 0."""
    return tl.where(step == 0.0, step, step * factor)


@triton.jit
def change_of(to, origin):
    """to - origin; 0 where they are equal."""
    return tl.where(to == origin, 0.0, to - origin)


# Ascents: lines 6 and 7 of Algorithm 1, with the gradients of appendix D.


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


# The direction d: h_loss + alpha h_norm (Algorithm 1, line 10), or Algorithm 2's h+ - gamma (h- minus its projection).


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


# Base optimizers, in torch.optim's order of operations.


@triton.jit
def advance(old, step):
    """old + step, where a step of zero leaves the bits alone (-0.0 + 0.0 would be 0.0)."""
    return tl.where(step == 0.0, old, old + step)


@triton.jit
def decayed(d, weight_decay, theta):
    """d + weight_decay * theta; d alone where there is no weight decay."""
    return d + weight_decay * tl.where(weight_decay == 0.0, -0.0, theta)  # d - 0.0 is d; fewer registers than a choice of d


class Sgd(NamedTuple):
    """gain: 1 - dampening. sign: -1 where the group maximises. first: the momentum starts as d itself."""

    lr: Any
    weight_decay: Any
    momentum: Any
    gain: Any
    sign: Any
    nesterov: Any
    first: Any


@triton.jit
def flags_of(row):
    return tl.load(row + FLAGS).to(tl.int32)


@triton.jit
def sgd_of(row, step, C: tl.constexpr):
    flags = flags_of(row)
    return Sgd(
        tl.load(row + LR).to(C),
        tl.load(row + WEIGHT_DECAY).to(C),
        tl.load(row + MOMENTUM).to(C),
        (1.0 - tl.load(row + DAMPENING)).to(C),
        tl.where((flags & MAXIMIZE) != 0, -1.0, 1.0).to(C),
        (flags & NESTEROV) != 0,
        step == 1.0,
    )


@triton.jit
def sgd(h, theta, d):
    d = decayed(h.sign * d, h.weight_decay, theta)
    return advance(theta, times(-h.lr, d))


@triton.jit
def sgd_momentum(h, theta, d, momentum_buffer):
    """Returns theta and the momentum buffer."""
    d = decayed(h.sign * d, h.weight_decay, theta)
    moved = h.momentum * momentum_buffer + h.gain * d
    moved = tl.where(h.first, d, moved)
    ahead = d + h.momentum * moved
    return advance(theta, times(-h.lr, tl.where(h.nesterov, ahead, moved))), moved


class Adam(NamedTuple):
    """size: -lr / (1 - beta1^step). root: sqrt(1 - beta2^step). decay, l2: decoupled weight decay as a factor of theta, or
    L2 regularisation as a term of d. gain1: 1 - beta1. gain2: 1 - beta2. sign: -1 where the group maximises."""

    size: Any
    root: Any
    decay: Any
    l2: Any
    gain1: Any
    beta2: Any
    gain2: Any
    eps: Any
    sign: Any
    amsgrad: Any


@triton.jit
def power(x, step):
    """x^step for a whole number: Triton has no pow of its own, and this one is exact for the first steps."""
    result = x * 0.0 + 1.0
    n = step.to(tl.int64)
    while n > 0:
        result = tl.where((n & 1) != 0, result * x, result)
        x = x * x
        n = n >> 1
    return result


@triton.jit
def adam_of(row, step, C: tl.constexpr):
    flags = flags_of(row)
    lr = tl.load(row + LR)
    beta1 = tl.load(row + BETA1)
    beta2 = tl.load(row + BETA2)
    weight_decay = tl.load(row + WEIGHT_DECAY)
    decoupled = (flags & DECOUPLED) != 0
    return Adam(
        (-lr / (1.0 - power(beta1, step))).to(C),
        square_root(1.0 - power(beta2, step)).to(C),
        tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(C),
        tl.where(decoupled, 0.0, weight_decay).to(C),
        (1.0 - beta1).to(C),
        beta2.to(C),
        (1.0 - beta2).to(C),
        tl.load(row + EPS).to(C),
        tl.where((flags & MAXIMIZE) != 0, -1.0, 1.0).to(C),
        (flags & AMSGRAD) != 0,
    )


@triton.jit
def adam(h, theta, d, exp_avg, exp_avg_sq, maximum):
    """Adam and AdamW. `maximum` is max_exp_avg_sq, None where no group has amsgrad. Returns theta and the three of them."""
    d = decayed(h.sign * d, h.l2, theta)
    theta = h.decay * theta
    exp_avg = exp_avg + h.gain1 * (d - exp_avg)
    exp_avg_sq = h.beta2 * exp_avg_sq + h.gain2 * d * d
    v = exp_avg_sq
    if maximum is not None:
        v = tl.where(h.amsgrad & (maximum > v), maximum, v)
    step = divide(h.size * exp_avg, divide(square_root(v), h.root) + h.eps)
    return advance(theta, tl.where(h.size == 0.0, 0.0, step)), exp_avg, exp_avg_sq, v
