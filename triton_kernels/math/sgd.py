"""torch.optim.SGD's update: the twin of csrc/math/sgd.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import DAMPENING, LR, MAXIMIZE, MOMENTUM, NESTEROV, WEIGHT_DECAY
from gam_fused.triton_kernels.math.numbers import times
from gam_fused.triton_kernels.math.update import advance, decayed, flags_of


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
