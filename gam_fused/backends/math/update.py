"""What the updates of all base optimizers have in common. `c` is a row of the coefficient table."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.backends.math.lists import Scalar, Tensors, add_scaled_
from gam_fused.constants import Column, Flag


def advance_(theta: Tensor, old: Tensor, rate: float, step: Tensor) -> None:
    """theta <- old + step, a step of this rate; one of zero leaves the bits alone (-0.0 + 0.0 would be 0.0)."""
    theta.copy_(torch.where(step == 0, old, old + step) if rate != 0 else old)


def switch(c: Scalar, flag: Flag) -> Scalar:
    """1 where the group's flag is set, 0 where not, without asking the host."""
    flags = c[Column.FLAGS]
    if isinstance(flags, float):
        return float(bool(int(flags) & flag))
    return (torch.div(flags, int(flag), rounding_mode="floor") % 2 == 1).to(flags.dtype)


def advance_lists_(theta: Tensors, change: Tensors, lr: Scalar) -> None:
    """theta <- theta - change. A change of zero, made positive first, leaves the bits alone: -0.0 - 0.0 is -0.0.

    With lr 0 the change may be 0 * inf: theta then stays, here or, where the host cannot read lr, in `combined_update_`.
    """
    if isinstance(lr, float) and lr == 0.0:
        return
    torch._foreach_add_(change, 0.0)
    torch._foreach_sub_(theta, change)


def decay_lists_(d: Tensors, theta: Tensors, weight: Scalar) -> None:
    """d += weight * theta; d alone where there is no weight decay, since weights may be infinite."""
    if isinstance(weight, float):
        if weight != 0.0:
            add_scaled_(d, theta, weight)
    else:
        add_scaled_(d, [torch.where(weight == 0, 0.0, t) for t in theta], weight)
