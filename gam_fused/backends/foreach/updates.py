"""Pieces of the torch backend: the direction d, and the updates of the base optimizers in torch.optim's order of operations.

`c` is a row of the coefficient table. Lists that end up changed are changed in place: `foreach_lists.workspace`s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.backends.foreach.lists import Scalar, Tensors, add_scalar_, add_scaled_, operand, scalars, scale_, select
from gam_fused.constants import Column, Control, Flag


def h_plus(c: Scalar, g1: Tensors, last: Tensors, *like: Tensors) -> Tensors:
    """DIRECTION_G1 g1 + DIRECTION_LAST last, in new tensors. like: where to see shapes if both are missing."""
    plus = torch._foreach_mul(operand(last, g1, *like), c[Column.DIRECTION_LAST])
    if g1:
        add_scaled_(plus, operand(g1, last, *like), c[Column.DIRECTION_G1])
    return plus


def direction_of(
    c: Scalar, g1: Tensors, last: Tensors, folded: Tensors, plus_scale: Scalar, unscale: Scalar, like: Tensors = ()
) -> Tensors:
    """d = unscale (plus_scale h+ + DIRECTION_FOLDED folded), in new tensors; g1 and folded may be empty."""
    d = h_plus(c, g1, last, folded, like)
    scale_(d, plus_scale * unscale)
    if folded:
        add_scaled_(d, operand(folded, last, g1, like), c[Column.DIRECTION_FOLDED] * unscale)
    return d


def direction_scalars(coefficients: Tensor, partials: Tensor, control: Tensor) -> tuple[Scalar, Scalar]:
    """plus_scale of Algorithm 2, and the factor that undoes the loss scale and clips."""
    total, minus = partials.sum(1), coefficients[0, Column.DIRECTION_FOLDED]
    if len(total) == 6:
        plus_scale = 1 - minus * torch.where(total[0] > 0, total[2] / total[0], 0)
        pp, mp, mm = total.view(3, 2).sum(1)
        squared = plus_scale * plus_scale * pp + 2 * plus_scale * minus * mp + minus * minus * mm
    else:
        plus_scale, squared = torch.ones_like(minus), total.sum()
    norm = squared.clamp(min=0).sqrt() / control[Control.LOSS_SCALE]
    max_norm = control[Control.MAX_NORM]
    clip = torch.where(max_norm > 0, (max_norm / (norm + 1e-6)).clamp(max=1), 1)
    return scalars(plus_scale), scalars(clip / control[Control.LOSS_SCALE])


def switch(c: Scalar, flag: Flag) -> Scalar:
    """1 where the group's flag is set, 0 where not, without asking the host."""
    flags = c[Column.FLAGS]
    if isinstance(flags, float):
        return float(bool(int(flags) & flag))
    return (torch.div(flags, int(flag), rounding_mode="floor") % 2 == 1).to(flags.dtype)


def advance_(theta: Tensors, change: Tensors, lr: Scalar) -> None:
    """theta <- theta - change. A change of zero, made positive first, leaves the bits alone: -0.0 - 0.0 is -0.0.

    With lr 0 the change may be 0 * inf: theta then stays, here or, where the host cannot read lr, in `combined_update_`.
    """
    if isinstance(lr, float) and lr == 0.0:
        return
    torch._foreach_add_(change, 0.0)
    torch._foreach_sub_(theta, change)


def _decay_(d: Tensors, theta: Tensors, weight: Scalar) -> None:
    """d += weight * theta; d alone where there is no weight decay, since weights may be infinite."""
    if isinstance(weight, float):
        if weight != 0.0:
            add_scaled_(d, theta, weight)
    else:
        add_scaled_(d, [torch.where(weight == 0, 0.0, t) for t in theta], weight)


def sgd_(c: Scalar, theta: Tensors, d: Tensors, momentum_buffer: Tensors, step: Tensor) -> None:
    """torch.optim.SGD's update, in its order of operations. `d` is spent. step: float32 [len(theta)], this one counted."""
    scale_(d, 1 - 2 * switch(c, Flag.MAXIMIZE))
    _decay_(d, theta, c[Column.WEIGHT_DECAY])
    if momentum_buffer:
        momentum = c[Column.MOMENTUM]
        scale_(momentum_buffer, momentum)
        add_scaled_(momentum_buffer, d, 1 - c[Column.DAMPENING])
        first = scalars(step == 1)
        if not isinstance(first, list) or any(first):
            started = select(list(first), d, momentum_buffer)
            torch._foreach_copy_(momentum_buffer, started)
        nesterov = switch(c, Flag.NESTEROV) == 1
        if nesterov is False:
            d = momentum_buffer
        else:
            add_scaled_(d, momentum_buffer, momentum)
            d = select(nesterov, d, momentum_buffer)
    advance_(theta, torch._foreach_mul(d, c[Column.LR]), c[Column.LR])


def adam_(
    c: Scalar, theta: Tensors, d: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, maximum: Tensors, step: Tensor
) -> None:
    """torch.optim.Adam's and AdamW's update, in their order of operations. `d`, `step` as in `sgd_`; `maximum` may be []."""
    decoupled, lr, decay = switch(c, Flag.DECOUPLED), c[Column.LR], c[Column.WEIGHT_DECAY]
    beta1, beta2 = c[Column.BETA1], c[Column.BETA2]
    scale_(d, 1 - 2 * switch(c, Flag.MAXIMIZE))
    _decay_(d, theta, (1 - decoupled) * decay)
    scale_(theta, 1 - decoupled * lr * decay)
    add_scaled_(exp_avg, torch._foreach_sub(d, exp_avg), 1 - beta1)
    scale_(exp_avg_sq, beta2)
    torch._foreach_mul_(d, d)
    add_scaled_(exp_avg_sq, d, 1 - beta2)
    if maximum:
        torch._foreach_maximum_(maximum, exp_avg_sq)
    count = step.double()
    roots, sizes = (_each(values) for values in ((1 - beta2**count).sqrt(), lr / (1 - beta1**count)))
    denominator = torch._foreach_sqrt(maximum or exp_avg_sq)
    torch._foreach_div_(denominator, roots)
    add_scalar_(denominator, c[Column.EPS])
    change = torch._foreach_mul(exp_avg, sizes)
    torch._foreach_div_(change, denominator)
    advance_(theta, change, lr)


def _each(values: Tensor) -> list[Scalar]:
    """One scalar for each tensor of a list."""
    return list(scalars(values))
