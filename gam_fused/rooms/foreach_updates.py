"""Pieces of the torch room: the direction d, and the updates of the base optimizers in torch.optim's order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gam_fused.constants import Column, Control, Flag
from gam_fused.rooms.foreach_lists import Tensors, operand, raw, shapes_of, up
from gam_fused.tensor_lists import TensorList


def h_plus(c: Tensor, x1: TensorList, x3: TensorList, rows: Sequence[int], shapes: TensorList | None = None) -> Tensors:
    shapes = shapes or shapes_of(x1, x3, TensorList(()), None)
    plus = torch._foreach_mul(operand(x3, rows, shapes), c[Column.DIRECTION_3])
    if len(x1):
        torch._foreach_add_(plus, torch._foreach_mul(operand(x1, rows, shapes), c[Column.DIRECTION_1]))
    return plus


def direction_of(
    c: Tensor,
    x1: TensorList,
    x3: TensorList,
    acc: TensorList,
    rows: Sequence[int],
    u: Tensor,
    unscale: Tensor,
    like: TensorList | None = None,
) -> Tensors:
    shapes = shapes_of(x1, x3, acc, like)
    d = torch._foreach_mul(h_plus(c, x1, x3, rows, shapes), u * unscale)
    if len(acc):
        torch._foreach_add_(d, torch._foreach_mul(operand(acc, rows, shapes), c[Column.DIRECTION_ACC] * unscale))
    return d


def direction_scalars(coefficients: Tensor, partials: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """u of Algorithm 2, and the factor that undoes the loss scale and clips; 0-d float64."""
    total, v = partials.sum(1), coefficients[0, Column.DIRECTION_ACC]
    if len(total) == 6:
        u = 1 - v * torch.where(total[0] > 0, total[2] / total[0], 0)
        plus, cross, minus = total.view(3, 2).sum(1)
        squared = u * u * plus + 2 * u * v * cross + v * v * minus
    else:
        u, squared = torch.ones_like(v), total.sum()
    norm = squared.clamp(min=0).sqrt() / control[Control.LOSS_SCALE]
    max_norm = control[Control.MAX_NORM]
    clip = torch.where(max_norm > 0, (max_norm / (norm + 1e-6)).clamp(max=1), 1)
    return u, clip / control[Control.LOSS_SCALE]


def switch(c: Tensor, flag: Flag) -> Tensor:
    """1 where the group's flag is set, 0 where not, without asking the host."""
    return (torch.div(c[Column.FLAGS], int(flag), rounding_mode="floor") % 2 == 1).to(c.dtype)


def advance(old: Tensors, step: Tensors) -> Tensors:
    """old + step; a step of zero leaves the bits alone."""
    return [torch.where(s == 0, o, o + s) for o, s in zip(old, step, strict=True)]


def sgd(c: Tensor, old: Tensors, d: Tensors, first: TensorList, rows: list[int], step: Tensor) -> list:
    """torch.optim.SGD's update, in its order of operations; returns new theta, then (targets, values) of the state."""
    d = torch._foreach_mul(d, 1 - 2 * switch(c, Flag.MAXIMIZE))
    d = torch._foreach_add(d, torch._foreach_mul(old, c[Column.WEIGHT_DECAY]))
    state: list[tuple[Tensors, Tensors]] = []
    if len(first) and first.tensors[rows[0]] is not None:
        buffers = raw(first, rows)
        moved = torch._foreach_mul(up(buffers), c[Column.MOMENTUM])
        torch._foreach_add_(moved, torch._foreach_mul(d, 1 - c[Column.DAMPENING]))
        started = [torch.where(s == 1, g, m) for s, g, m in zip(step, d, moved, strict=True)]
        state.append((buffers, started))
        nesterov = switch(c, Flag.NESTEROV)
        ahead = torch._foreach_add(d, torch._foreach_mul(started, c[Column.MOMENTUM]))
        d = [torch.where(nesterov == 1, a, m) for a, m in zip(ahead, started, strict=True)]
    return [advance(old, torch._foreach_mul(d, -c[Column.LR])), *state]


def adam(
    c: Tensor,
    old: Tensors,
    d: Tensors,
    first: TensorList,
    second: TensorList,
    third: TensorList,
    rows: list[int],
    step: Tensor,
) -> list:
    """torch.optim.Adam's and AdamW's update, in their order of operations; returns as `_sgd`."""
    decoupled, lr = switch(c, Flag.DECOUPLED), c[Column.LR]
    d = torch._foreach_mul(d, 1 - 2 * switch(c, Flag.MAXIMIZE))
    d = torch._foreach_add(d, torch._foreach_mul(old, (1 - decoupled) * c[Column.WEIGHT_DECAY]))
    old = torch._foreach_mul(old, 1 - decoupled * lr * c[Column.WEIGHT_DECAY])
    m_list, v_list = raw(first, rows), raw(second, rows)
    m = torch._foreach_add(up(m_list), torch._foreach_mul(torch._foreach_sub(d, up(m_list)), 1 - c[Column.BETA1]))
    v = torch._foreach_mul(up(v_list), c[Column.BETA2])
    torch._foreach_add_(v, torch._foreach_mul(torch._foreach_mul(d, d), 1 - c[Column.BETA2]))
    state = [(m_list, m), (v_list, v)]
    if len(third) and third.tensors[rows[0]] is not None:
        v = torch._foreach_maximum(up(raw(third, rows)), v)
        state.append((raw(third, rows), v))
    exponent = step.double()
    root = (1 - c[Column.BETA2] ** exponent).sqrt()
    size = -lr / (1 - c[Column.BETA1] ** exponent)
    denominator = [torch.add(a.sqrt() / r, c[Column.EPS]) for a, r in zip(v, root, strict=True)]
    change = [s * a / b for s, a, b in zip(size, m, denominator, strict=True)]
    return [advance(old, change), *state]
