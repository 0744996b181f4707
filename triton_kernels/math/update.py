"""What the updates of all base optimizers have in common: the twin of csrc/math/update.h."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.math.constants import FLAGS


@triton.jit
def advance(old, step):
    """old + step, where a step of zero leaves the bits alone (-0.0 + 0.0 would be 0.0)."""
    return tl.where(step == 0.0, old, old + step)


@triton.jit
def decayed(d, weight_decay, theta):
    """d + weight_decay * theta; d alone where there is no weight decay."""
    return d + weight_decay * tl.where(weight_decay == 0.0, -0.0, theta)  # d - 0.0 is d; fewer registers than a choice of d


@triton.jit
def flags_of(row):
    return tl.load(row + FLAGS).to(tl.int32)
