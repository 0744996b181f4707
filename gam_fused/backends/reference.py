"""The reference backend: every kernel one tensor at a time, in float64, rounded once to storage. It specifies the others.

`operands` says what each kernel takes, and what its operands have in common.
No kernel allocates storage for its results, and none asks the host anything on a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.base_optimizers import UPDATES
from gam_fused.backends.math import rounding
from gam_fused.backends.math.ascent import ascent_scales
from gam_fused.backends.math.direction import direction, h_plus
from gam_fused.backends.math.projection import direction_scale
from gam_fused.backends.math.skip import close_step, stays
from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
from gam_fused.backends.tensor_lists import TensorList
from gam_fused.constants import Column, Control


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
        plus = h_plus(c, _value(o.g1, i), _value(o.last, i))
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
    stay = bool(stays(total, o.ascent, o.control))
    scales = ascent_scales(o.coefficients, total, o.control, o.ascent, _sqrt).tolist()
    key = rounding.key(o.control[Control.NOISE_SEED].item(), o.control[Control.NOISE_STEP].item(), o.ascent)
    o.realised.zero_()
    start = 0
    for i, size in enumerate(o.layout.sizes):
        target, origin = o.theta.tensors[i], (o.base if len(o.base) else o.theta).tensors[i].clone()
        if len(o.backup):
            o.backup.tensors[i].copy_(target)
        scale = 0.0 if stay else scales[o.layout.groups[i]]
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
    """theta <- the base's update of `backup` (or of theta, when `EMPTY`) in the direction d; docs/design.md, section 2.

    d = (plus_scale * h+ + minus * h-) / loss scale * clip, where h+ = DIRECTION_G1 g1 + DIRECTION_LAST last, h- = folded and
    minus = DIRECTION_FOLDED. plus_scale = 1 unless `partials` holds three products: then plus_scale = 1 - minus * s, where
    s = <h-, h+> / |h+|^2 (0 where |h+| = 0), over counted tensors.
    clip = min(1, MAX_NORM / (|d| + 1e-6)) where MAX_NORM > 0; |d| from `partials`, over all tensors.

    When `partials` is not finite, or control[FOUND_INF] is set, theta <- backup and nothing else of the optimizer changes:
    LAST_SKIPPED <- 1, SKIPPED += 1. A tensor that is `None` in g1, last and folded is restored and otherwise untouched.
    SGD takes d itself as its first momentum.
    """
    skip = bool(close_step(o.partials, o.control))
    plus_scale, unscale = (t.item() for t in direction_scale(o.coefficients, o.partials, o.control, _sqrt))
    o.direction.zero_()
    for i in range(len(o.theta)):
        target = o.theta.tensors[i]
        if len(o.backup):
            target.copy_(o.backup.tensors[i])
        if skip or all(not len(lst) or lst.tensors[i] is None for lst in (o.g1, o.last, o.folded)):
            continue
        c = o.coefficients[o.layout.groups[i]].tolist()
        values = [_value(lst, i) for lst in (o.g1, o.last, o.folded)]
        d = torch.zeros_like(target, dtype=torch.float64) + direction(c, *values, plus_scale=plus_scale, unscale=unscale)
        o.direction[0] += d.square().sum()
        o.steps.tensors[i].add_(1)
        state = [lst.tensors[i] if len(lst) else None for lst in (o.state1, o.state2, o.state3)]
        UPDATES[o.algorithm].exact(c, target, d, state, o.steps.tensors[i].item())


def combine_(o: Combine) -> None:
    """out <- d, the direction of `combined_update_`, for base optimizers that are not fused; sets the same control slots."""
    close_step(o.partials, o.control)
    plus_scale, unscale = (t.item() for t in direction_scale(o.coefficients, o.partials, o.control, _sqrt))
    o.direction.zero_()
    for i in range(len(o.out)):
        if o.out.tensors[i] is None:
            continue
        c = o.coefficients[o.layout.groups[i]].tolist()
        values = [_value(lst, i) for lst in (o.g1, o.last, o.folded)]
        d = direction(c, *values, plus_scale=plus_scale, unscale=unscale)
        o.out.tensors[i].copy_(torch.zeros_like(o.out.tensors[i], dtype=torch.float64) + d)
        o.direction[0] += torch.as_tensor(d, device=o.direction.device).square().sum()


def restore_(o: Restore) -> None:
    """theta <- backup, bit for bit."""
    for target, source in zip(o.theta.tensors, o.backup.tensors, strict=True):
        target.copy_(source)


copy_ = restore_


def _sqrt(t: Tensor) -> Tensor:
    """Of one number, rounded as IEEE 754 has it, as C++ does; torch's own may be off by one unit in the last place."""
    return torch.tensor(math.sqrt(t.item()) if t >= 0 else math.nan, dtype=torch.float64, device=t.device)


def _value(lst: TensorList, i: int) -> Any:  # a tensor, or 0.0 where there is none
    if not len(lst) or lst.tensors[i] is None:
        return 0.0
    return lst.tensors[i].double()


def _times(step: Any, factor: Any) -> Tensor:
    """step * factor; 0 where `step` is 0, though the factor (a weight) may be infinite."""
    return torch.where(step == 0, 0.0, step * factor)
