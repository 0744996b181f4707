"""torch.optim.Adam's and AdamW's update: the twin of csrc/math/adam.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import AMSGRAD, BETA1, BETA2, DECOUPLED, EPS, LR, MAXIMIZE, WEIGHT_DECAY
from gam_fused.triton_kernels.math.numbers import divide, square_root
from gam_fused.triton_kernels.math.update import advance, decayed, flags_of


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
