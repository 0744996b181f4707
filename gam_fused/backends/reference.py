"""The reference backend: every kernel one tensor at a time, in float64, rounded once to storage. It specifies the others.

`operands` says what each kernel takes, and what its operands have in common.
No kernel allocates storage for its results, and none asks the host anything on a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends import rounding
from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
from gam_fused.backends.tensor_lists import TensorList
from gam_fused.constants import Algorithm, Column, Control, Flag


def reason() -> str:
    """Always there."""
    return ""


def squared_norm(o: SquaredNorm) -> None:
    """partials <- sums of ((x - y) * weight)^2, element by element."""
    o.partials.zero_()
    for i in range(len(o.x)):
        difference = torch.as_tensor(_value(o.x, i) - _value(o.y, i), device=o.partials.device)
        if len(o.weight):
            difference = _times(difference, _value(o.weight, i))
        o.partials[0 if o.layout.counted[i] else 1, 0] += difference.square().sum()


def direction_products(o: DirectionProducts) -> None:
    """What Algorithm 2's projection, or the clipping of d, has to know about the last gradients.

    With `g1` (6 rows): sums of h+ h+, h- h+ and h- h-, where h+ = DIRECTION_G1 g1 + DIRECTION_LAST last and h- = folded.
    Without (2 rows): sums of d^2, where d = DIRECTION_LAST last + DIRECTION_FOLDED folded.
    """
    o.partials.zero_()
    for i in range(len(o.last)):
        row = 0 if o.layout.counted[i] else 1
        c = o.coefficients[o.layout.groups[i]]
        plus = c[Column.DIRECTION_G1] * _value(o.g1, i) + c[Column.DIRECTION_LAST] * _value(o.last, i)
        minus = _value(o.folded, i)
        products: tuple[Any, ...]
        if len(o.g1):
            products = (plus * plus, minus * plus, minus * minus + 0 * plus)
        else:
            products = ((plus + c[Column.DIRECTION_FOLDED] * minus) ** 2,)
        for j, product in enumerate(products):
            o.partials[2 * j + row, 0] += product.sum()


def perturb_(o: Perturb) -> None:
    """theta <- base + radius * (x - y) / (norm + eps), Appendix D; with `adaptive`, radius * base^2 * (x - y) / norm.

    `norm` is the root of the sum of row 0 of `partials`, divided by the loss scale. A row that is not finite sets
    control[FOUND_INF], and theta <- base: passes after a bad one run at a safe point.

    `None` in both `x` and `y` leaves that tensor at its base, bit for bit.
    """
    total = o.partials.sum(1)
    bad = not bool(torch.isfinite(total).all())
    if bad or o.ascent == 0:
        o.control[Control.FOUND_INF] = float(bad)
    loss_scale, eps = o.control[Control.LOSS_SCALE].item(), o.control[Control.EPS].item()
    norm = math.sqrt(total[0].item()) / loss_scale if not bad else math.inf
    key = rounding.key(o.control[Control.NOISE_SEED].item(), o.control[Control.NOISE_STEP].item(), o.ascent)
    o.realised.zero_()
    start = 0
    for i, size in enumerate(o.layout.sizes):
        target, origin = o.theta.tensors[i], (o.base if len(o.base) else o.theta).tensors[i].clone()
        if len(o.backup):
            o.backup.tensors[i].copy_(target)
        radius = o.coefficients[o.layout.groups[i], Column.RADIUS_0 + o.ascent].item()
        scale = 0.0 if bad or o.control[Control.FOUND_INF] else _ascent_scale(radius, norm + eps, loss_scale)
        missing = o.x.tensors[i] is None and (not len(o.y) or o.y.tensors[i] is None)
        if scale == 0.0 or missing:
            target.copy_(origin)
        else:
            step = scale * (_value(o.x, i) - _value(o.y, i))
            if o.adaptive:
                step = _times(step, origin.double().square())
            rounding.store_(target, origin.double() + step, key, start)
        change = torch.where(target == origin, 0.0, target.double() - origin.double())
        o.realised[0] += change.square().sum()
        if len(o.folded) and o.folded.tensors[i] is not None:
            c = o.coefficients[o.layout.groups[i]]
            o.folded.tensors[i].copy_(c[Column.FOLD_0] * _value(o.folded, i) + c[Column.FOLD_2] * _value(o.x, i))
        start += size


def combined_update_(o: CombinedUpdate) -> None:
    """theta <- base optimizer's update of `backup` (or of theta, when `EMPTY`) in the direction d; DESIGN section 2.

    d = (plus_scale * h+ + minus * h-) / loss scale * clip, where h+ = DIRECTION_G1 g1 + DIRECTION_LAST last, h- = folded and
    minus = DIRECTION_FOLDED. plus_scale = 1 unless `partials` holds three products: then plus_scale = 1 - minus * s, where
    s = <h-, h+> / |h+|^2 (0 where |h+| = 0), over counted tensors.
    clip = min(1, MAX_NORM / (|d| + 1e-6)) where MAX_NORM > 0; |d| from `partials`, over all tensors.

    When `partials` is not finite, or control[FOUND_INF] is set, theta <- backup and nothing else of the optimizer changes:
    LAST_SKIPPED <- 1, SKIPPED += 1. A tensor that is `None` in g1, last and folded is restored and otherwise untouched.
    SGD takes d itself as its first momentum.
    """
    skip = _close_step(o.partials, o.control)
    plus_scale, unscale = _direction_scalars(o.coefficients, o.partials, o.control)
    o.direction.zero_()
    for i in range(len(o.theta)):
        target = o.theta.tensors[i]
        if len(o.backup):
            target.copy_(o.backup.tensors[i])
        if skip or all(not len(lst) or lst.tensors[i] is None for lst in (o.g1, o.last, o.folded)):
            continue
        c = o.coefficients[o.layout.groups[i]].tolist()
        d = torch.zeros_like(target, dtype=torch.float64) + _direction(c, i, o.g1, o.last, o.folded, plus_scale, unscale)
        o.direction[0] += d.square().sum()
        o.steps.tensors[i].add_(1)
        if o.algorithm == Algorithm.SGD:
            _sgd(c, target, d, o.state1.tensors[i] if len(o.state1) else None, o.steps.tensors[i].item())
        else:
            maximum = o.state3.tensors[i] if len(o.state3) else None
            _adam(c, target, d, o.state1.tensors[i], o.state2.tensors[i], maximum, o.steps.tensors[i].item())


def combine_(o: Combine) -> None:
    """out <- d, the direction of `combined_update_`, for base optimizers that are not fused; sets the same control slots."""
    _close_step(o.partials, o.control)
    plus_scale, unscale = _direction_scalars(o.coefficients, o.partials, o.control)
    o.direction.zero_()
    for i in range(len(o.out)):
        if o.out.tensors[i] is None:
            continue
        d = _direction(o.coefficients[o.layout.groups[i]].tolist(), i, o.g1, o.last, o.folded, plus_scale, unscale)
        o.out.tensors[i].copy_(torch.zeros_like(o.out.tensors[i], dtype=torch.float64) + d)
        o.direction[0] += torch.as_tensor(d, device=o.direction.device).square().sum()


def restore_(o: Restore) -> None:
    """theta <- backup, bit for bit."""
    for target, source in zip(o.theta.tensors, o.backup.tensors, strict=True):
        target.copy_(source)


copy_ = restore_


def _value(lst: TensorList, i: int) -> Any:  # a tensor, or 0.0 where there is none
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
    """plus_scale of Algorithm 2, and the factor that undoes the loss scale and clips."""
    total = partials.sum(1).tolist()
    loss_scale, max_norm = control[Control.LOSS_SCALE].item(), control[Control.MAX_NORM].item()
    minus = coefficients[0, Column.DIRECTION_FOLDED].item()
    if len(total) == 6:
        plus_scale = 1.0 - minus * (total[2] / total[0] if total[0] > 0 else 0.0)
        pp, mp, mm = total[0] + total[1], total[2] + total[3], total[4] + total[5]
        squared = plus_scale * plus_scale * pp + 2 * plus_scale * minus * mp + minus * minus * mm
    else:
        plus_scale, squared = 1.0, total[0] + total[1]
    norm = math.sqrt(max(squared, 0.0)) / loss_scale if math.isfinite(squared) else math.inf
    clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    return plus_scale, clip / loss_scale


def _direction(
    c: list[float], i: int, g1: TensorList, last: TensorList, folded: TensorList, plus_scale: float, unscale: float
) -> Any:
    plus = c[Column.DIRECTION_G1] * _value(g1, i) + c[Column.DIRECTION_LAST] * _value(last, i)
    return (plus_scale * plus + c[Column.DIRECTION_FOLDED] * _value(folded, i)) * unscale


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
