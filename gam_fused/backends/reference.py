"""The reference backend: every kernel one tensor at a time, in float64, rounded once to storage. It specifies the others.

Shared vocabulary of the kernels (DESIGN: "five kernels"):
    layout        `Layout` of the block: tensor sizes, param groups, which tensors count in norms.
    lists         `TensorList`s of that layout; `EMPTY` where an operand is not used; `None` entries are zero vectors.
    coefficients  float64 [groups, len(Column)], on the block's device.
    control       float64 [len(Control)], on the block's device.
    partials      float64 [2 * k, P]: row 2*j holds partial sums of the j-th product over counted tensors, row 2*j + 1 over
                  the others, which are guarded but not counted. P may exceed the block's chunks: the columns of all blocks
                  stand side by side, and a kernel that finishes a reduction adds up all of them.
No kernel allocates storage for its results, and none asks the host anything on a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends import rounding
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.constants import Algorithm, Column, Control, Flag


def reason() -> str:
    """Always there."""
    return ""


def squared_norm(layout: Layout, x: TensorList, y: TensorList, weight: TensorList, partials: Tensor) -> None:
    """partials <- sums of ((x - y) * weight)^2, element by element; `y` and `weight` may be `EMPTY`.

    Args:
        partials: float64 [2, layout.chunks], this block's columns.
    """
    partials.zero_()
    for i in range(len(x)):
        difference = torch.as_tensor(_value(x, i) - _value(y, i), device=partials.device)
        if len(weight):
            difference = _times(difference, _value(weight, i))
        partials[0 if layout.counted[i] else 1, 0] += difference.square().sum()


def direction_products(
    layout: Layout, x1: TensorList, x3: TensorList, acc: TensorList, coefficients: Tensor, partials: Tensor
) -> None:
    """What Algorithm 2's projection, or the clipping of d, has to know about the last gradients.

    With `x1`: partials <- sums of h+ h+, h- h+ and h- h-, where h+ = DIRECTION_1 x1 + DIRECTION_3 x3 and h- = acc ([6, P]).
    Without:   partials <- sums of d^2, where d = DIRECTION_3 x3 + DIRECTION_ACC acc ([2, P]).
    """
    partials.zero_()
    for i in range(len(x3)):
        row = 0 if layout.counted[i] else 1
        c = coefficients[layout.groups[i]]
        plus = c[Column.DIRECTION_1] * _value(x1, i) + c[Column.DIRECTION_3] * _value(x3, i)
        minus = _value(acc, i)
        products: tuple
        if len(x1):
            products = (plus * plus, minus * plus, minus * minus + 0 * plus)
        else:
            products = ((plus + c[Column.DIRECTION_ACC] * minus) ** 2,)
        for j, product in enumerate(products):
            partials[2 * j + row, 0] += product.sum()


def perturb_(
    layout: Layout,
    theta: TensorList,
    base: TensorList,
    x: TensorList,
    y: TensorList,
    acc: TensorList,
    backup: TensorList,
    coefficients: Tensor,
    partials: Tensor,
    control: Tensor,
    realised: Tensor,
    ascent: int,
    adaptive: bool,
) -> None:
    """theta <- base + radius * (x - y) / (norm + eps), Appendix D; with `adaptive`, radius * base^2 * (x - y) / norm.

    `norm` is the root of the sum of row 0 of `partials`, divided by the loss scale. A row that is not finite sets
    control[FOUND_INF], and theta <- base: passes after a bad one run at a safe point.

    Args:
        theta: written. base: the point to start from; `EMPTY` means theta itself.
        x, y: the gradients; `y` may be `EMPTY`. `None` in both leaves that tensor at its base, bit for bit.
        acc: acc <- FOLD_0 * acc + FOLD_2 * x, or `EMPTY`. backup: backup <- theta before it is perturbed, or `EMPTY`.
        partials: float64 [2, P], complete: all blocks, all devices.
        realised: float64 [layout.chunks] <- partial sums of (theta - base)^2 as stored.
        ascent: 0, 1 or 2: which radius column; 0 also clears control[FOUND_INF] of the step before.
    """
    total = partials.sum(1)
    bad = not bool(torch.isfinite(total).all())
    if bad or ascent == 0:
        control[Control.FOUND_INF] = float(bad)
    loss_scale, eps = control[Control.LOSS_SCALE].item(), control[Control.EPS].item()
    norm = math.sqrt(total[0].item()) / loss_scale if not bad else math.inf
    key = rounding.key(control[Control.NOISE_SEED].item(), control[Control.NOISE_STEP].item(), ascent)
    realised.zero_()
    start = 0
    for i, size in enumerate(layout.sizes):
        target, origin = theta.tensors[i], (base if len(base) else theta).tensors[i].clone()
        if len(backup):
            backup.tensors[i].copy_(target)
        radius = coefficients[layout.groups[i], Column.RADIUS_0 + ascent].item()
        scale = 0.0 if bad or control[Control.FOUND_INF] else _ascent_scale(radius, norm + eps, loss_scale)
        missing = x.tensors[i] is None and (not len(y) or y.tensors[i] is None)
        if scale == 0.0 or missing:
            target.copy_(origin)
        else:
            step = scale * (_value(x, i) - _value(y, i))
            if adaptive:
                step = _times(step, origin.double().square())
            rounding.store_(target, origin.double() + step, key, start)
        change = torch.where(target == origin, 0.0, target.double() - origin.double())
        realised[0] += change.square().sum()
        if len(acc) and acc.tensors[i] is not None:
            c = coefficients[layout.groups[i]]
            acc.tensors[i].copy_(c[Column.FOLD_0] * _value(acc, i) + c[Column.FOLD_2] * _value(x, i))
        start += size


def combined_update_(
    layout: Layout,
    theta: TensorList,
    backup: TensorList,
    x1: TensorList,
    x3: TensorList,
    acc: TensorList,
    first: TensorList,
    second: TensorList,
    third: TensorList,
    steps: TensorList,
    coefficients: Tensor,
    partials: Tensor,
    control: Tensor,
    direction: Tensor,
    algorithm: int,
) -> None:
    """theta <- base optimizer's update of `backup` (or of theta, when `EMPTY`) in the direction d; DESIGN section 2.

    d = (u * (DIRECTION_1 x1 + DIRECTION_3 x3) + v * acc) / loss scale * clip; v = DIRECTION_ACC, and u = 1 unless `partials`
    holds three products: then u = 1 - v * s, s = <h-, h+> / |h+|^2 (0 where |h+| = 0), over counted tensors.
    clip = min(1, MAX_NORM / (|d| + 1e-6)) where MAX_NORM > 0; |d| from `partials`, over all tensors.

    When `partials` is not finite, or control[FOUND_INF] is set, theta <- backup and nothing else of the optimizer changes:
    LAST_SKIPPED <- 1, SKIPPED += 1. A tensor that is `None` in x1, x3 and acc is restored and otherwise untouched.

    Args:
        first, second, third: SGD's momentum buffer; Adam's exp_avg, exp_avg_sq, max_exp_avg_sq. `None` where not in use.
        steps: 0-d float32 tensors, updates so far of each tensor; advanced here. SGD takes d itself as its first momentum.
        direction: float64 [layout.chunks] <- partial sums of d^2.
        algorithm: an `Algorithm`.
    """
    skip = _close_step(partials, control)
    u, unscale = _direction_scalars(coefficients, partials, control)
    direction.zero_()
    for i in range(len(theta)):
        target = theta.tensors[i]
        if len(backup):
            target.copy_(backup.tensors[i])
        if skip or all(not len(lst) or lst.tensors[i] is None for lst in (x1, x3, acc)):
            continue
        c = coefficients[layout.groups[i]].tolist()
        d = torch.zeros_like(target, dtype=torch.float64) + _direction(c, i, x1, x3, acc, u, unscale)
        direction[0] += d.square().sum()
        steps.tensors[i].add_(1)
        if algorithm == Algorithm.SGD:
            _sgd(c, target, d, first.tensors[i] if len(first) else None, steps.tensors[i].item())
        else:
            maximum = third.tensors[i] if len(third) else None
            _adam(c, target, d, first.tensors[i], second.tensors[i], maximum, steps.tensors[i].item())


def combine_(
    layout: Layout,
    out: TensorList,
    x1: TensorList,
    x3: TensorList,
    acc: TensorList,
    coefficients: Tensor,
    partials: Tensor,
    control: Tensor,
    direction: Tensor,
) -> None:
    """out <- d, the direction of `combined_update_`, for base optimizers that are not fused; sets the same control slots.

    `out` may be the same tensors as `x3`. Entries that are `None` in `out` are passed over.
    """
    _close_step(partials, control)
    u, unscale = _direction_scalars(coefficients, partials, control)
    direction.zero_()
    for i in range(len(out)):
        if out.tensors[i] is None:
            continue
        d = _direction(coefficients[layout.groups[i]].tolist(), i, x1, x3, acc, u, unscale)
        out.tensors[i].copy_(torch.zeros_like(out.tensors[i], dtype=torch.float64) + d)
        direction[0] += torch.as_tensor(d, device=direction.device).square().sum()


def restore_(layout: Layout, theta: TensorList, backup: TensorList) -> None:
    """theta <- backup, bit for bit."""
    for target, source in zip(theta.tensors, backup.tensors, strict=True):
        target.copy_(source)


def _value(lst: TensorList, i: int) -> Tensor | float:
    if not len(lst) or lst.tensors[i] is None:
        return 0.0
    return lst.tensors[i].double()


def _times(step: Any, factor: Any) -> Tensor:
    """step * factor; 0 where `step` is 0, though the factor (a weight) may be infinite."""
    return torch.where(step == 0, 0.0, step * factor)


def _ascent_scale(radius: float, norm: float, loss_scale: float) -> float:
    """Along a zero gradient nothing moves, whatever xi: 0 in place of a division by zero, and a bound float32 can hold."""
    scale = radius / norm / loss_scale if norm > 0 else 0.0
    return min(max(scale, -3e38), 3e38)


def _close_step(partials: Tensor, control: Tensor) -> bool:
    skip = bool(control[Control.FOUND_INF]) or not bool(torch.isfinite(partials.sum(1)).all())
    control[Control.LAST_SKIPPED] = float(skip)
    control[Control.SKIPPED] += float(skip)
    control[Control.NOISE_STEP] += 1
    return skip


def _direction_scalars(coefficients: Tensor, partials: Tensor, control: Tensor) -> tuple[float, float]:
    """u of Algorithm 2, and the factor that undoes the loss scale and clips."""
    total = partials.sum(1).tolist()
    loss_scale, max_norm = control[Control.LOSS_SCALE].item(), control[Control.MAX_NORM].item()
    v = coefficients[0, Column.DIRECTION_ACC].item()
    if len(total) == 6:
        u = 1.0 - v * (total[2] / total[0] if total[0] > 0 else 0.0)
        plus, cross, minus = total[0] + total[1], total[2] + total[3], total[4] + total[5]
        squared = u * u * plus + 2 * u * v * cross + v * v * minus
    else:
        u, squared = 1.0, total[0] + total[1]
    norm = math.sqrt(max(squared, 0.0)) / loss_scale if math.isfinite(squared) else math.inf
    clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    return u, clip / loss_scale


def _direction(
    c: list[float], i: int, x1: TensorList, x3: TensorList, acc: TensorList, u: float, unscale: float
) -> Tensor | float:
    plus = c[Column.DIRECTION_1] * _value(x1, i) + c[Column.DIRECTION_3] * _value(x3, i)
    return (u * plus + c[Column.DIRECTION_ACC] * _value(acc, i)) * unscale


def _advance_(theta: Tensor, old: Tensor, rate: float, step: Tensor) -> None:
    """theta <- old + step, a step of this rate; one of zero leaves the bits alone (-0.0 + 0.0 would be 0.0)."""
    theta.copy_(torch.where(step == 0, old, old + step) if rate != 0 else old)


def _sgd(c: list[float], theta: Tensor, d: Tensor, momentum_buffer: Tensor | None, step: float) -> None:
    """torch.optim.SGD's update, in its order of operations."""
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
    _advance_(theta, old, -c[Column.LR], -c[Column.LR] * d)


def _adam(c: list[float], theta: Tensor, d: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, maximum: Any, step: float) -> None:
    """torch.optim.Adam's and AdamW's update, in their order of operations."""
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
    _advance_(theta, old, size, size * m / denominator)
