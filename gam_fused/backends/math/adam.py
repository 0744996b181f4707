"""torch.optim.Adam's and AdamW's update, in their order of operations. `c` is a row of the coefficient table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.math.lists import Scalar, Tensors, add_scalar_, add_scaled_, scale_
from gam_fused.backends.math.update import advance_, advance_lists_, decay_lists_, switch
from gam_fused.constants import Column, Flag


def adam(c: list[float], theta: Tensor, d: Tensor, state: Sequence[Any], step: float) -> None:
    """The specification. `state`: exp_avg, exp_avg_sq, and max_exp_avg_sq with AMSGRAD."""
    exp_avg, exp_avg_sq, maximum = state
    flags, lr = int(c[Column.FLAGS]), c[Column.LR]
    beta1, beta2 = c[Column.BETA1], c[Column.BETA2]
    old = theta.double()
    if flags & Flag.MAXIMIZE:
        d = -d
    if flags & Flag.DECOUPLED:
        old = old * (1 - lr * c[Column.WEIGHT_DECAY])
    elif c[Column.WEIGHT_DECAY] != 0:
        d = d + c[Column.WEIGHT_DECAY] * old
    m = exp_avg.double() + (1 - beta1) * (d - exp_avg.double())
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * d * d
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if flags & Flag.AMSGRAD:
        v = torch.maximum(maximum.double(), v)
        maximum.copy_(v)
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + c[Column.EPS]
    size = -lr / (1 - beta1**step)
    advance_(theta, old, size, size * m / denominator)


def adam_lists_(
    c: Scalar, theta: Tensors, d: Tensors, state: Sequence[Tensors], step: Tensor, each: Callable[[Tensor], list[Scalar]]
) -> None:
    """The same of lists, in place. `d` is spent.

    Args:
        step: float32, one for each tensor, this one counted. each: `Batch.each`.
    """
    exp_avg, exp_avg_sq, maximum = state
    decoupled, lr, decay = switch(c, Flag.DECOUPLED), c[Column.LR], c[Column.WEIGHT_DECAY]
    beta1, beta2 = c[Column.BETA1], c[Column.BETA2]
    scale_(d, 1 - 2 * switch(c, Flag.MAXIMIZE))
    decay_lists_(d, theta, (1 - decoupled) * decay)
    scale_(theta, 1 - decoupled * lr * decay)
    add_scaled_(exp_avg, torch._foreach_sub(d, exp_avg), 1 - beta1)
    scale_(exp_avg_sq, beta2)
    torch._foreach_mul_(d, d)
    add_scaled_(exp_avg_sq, d, 1 - beta2)
    if maximum:
        torch._foreach_maximum_(maximum, exp_avg_sq)
    count = step.double()
    roots, sizes = (each(values.to(d[0].dtype)) for values in ((1 - beta2**count).sqrt(), lr / (1 - beta1**count)))
    denominator = torch._foreach_sqrt(maximum or exp_avg_sq)
    torch._foreach_div_(denominator, roots)
    add_scalar_(denominator, c[Column.EPS])
    change = torch._foreach_mul(exp_avg, sizes)
    torch._foreach_div_(change, denominator)
    advance_lists_(theta, change, lr)
