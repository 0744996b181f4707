"""torch.optim.SGD's update, in its order of operations. `c` is a row of the coefficient table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gam_fused.backends.math.lists import Scalar, Tensors, add_scaled_, scale_, select
from gam_fused.backends.math.update import advance_, advance_lists_, decay_lists_, switch
from gam_fused.constants import Column, Flag


def sgd(c: list[float], theta: Tensor, d: Tensor, state: Sequence[Tensor | None], step: float) -> None:
    """The specification. `state`: the momentum buffer, if there is one."""
    momentum_buffer = state[0]
    flags = int(c[Column.FLAGS])
    old = theta.double()
    if flags & Flag.MAXIMIZE:
        d = -d
    if c[Column.WEIGHT_DECAY] != 0:
        d = d + c[Column.WEIGHT_DECAY] * old
    if momentum_buffer is not None:
        momentum = c[Column.MOMENTUM]
        moved = momentum * momentum_buffer.double() + (1 - c[Column.DAMPENING]) * d
        moved = d if step == 1 else moved
        momentum_buffer.copy_(moved)
        d = d + momentum * moved if flags & Flag.NESTEROV else moved
    advance_(theta, old, -c[Column.LR], -c[Column.LR] * d)


def sgd_lists_(
    c: Scalar, theta: Tensors, d: Tensors, state: Sequence[Tensors], step: Tensor, each: Callable[[Tensor], list[Scalar]]
) -> None:
    """The same of lists, in place. `d` is spent.

    Args:
        step: float32, one for each tensor, this one counted. each: `Batch.each`.
    """
    momentum_buffer = state[0]
    scale_(d, 1 - 2 * switch(c, Flag.MAXIMIZE))
    decay_lists_(d, theta, c[Column.WEIGHT_DECAY])
    if momentum_buffer:
        momentum = c[Column.MOMENTUM]
        scale_(momentum_buffer, momentum)
        add_scaled_(momentum_buffer, d, 1 - c[Column.DAMPENING])
        first = each(step == 1)
        if any(f is not False for f in first):
            started = select(first, d, momentum_buffer)
            torch._foreach_copy_(momentum_buffer, started)
        nesterov = switch(c, Flag.NESTEROV) == 1
        if nesterov is False:
            d = momentum_buffer
        else:
            add_scaled_(d, momentum_buffer, momentum)
            d = select(nesterov, d, momentum_buffer)
    advance_lists_(theta, torch._foreach_mul(d, c[Column.LR]), c[Column.LR])
