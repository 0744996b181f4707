"""The torch room: the verbs (see `reference`) in `torch._foreach_*`, on any device and for any strides.

Arithmetic in float32 for storage up to 32 bits, in float64 for float64. Everything that decides (skip, clip, projection,
coefficients) stays on the device as 0-d tensors, so the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused import rounding
from gam_fused.constants import Algorithm, Column, Control
from gam_fused.rooms.foreach_lists import (
    Tensors,
    by_group,
    commit_,
    difference,
    dot,
    operand,
    present,
    raw,
    shapes_of,
    sum_of_squares,
    up,
)
from gam_fused.rooms.foreach_updates import adam, direction_of, direction_scalars, h_plus, sgd
from gam_fused.rooms.reference import restore_ as restore_  # a copy is a copy
from gam_fused.tensor_lists import Layout, TensorList


def reason() -> str:
    """Always there."""
    return ""


def squared_norm(layout: Layout, x: TensorList, y: TensorList, weight: TensorList, partials: Tensor) -> None:
    """See `reference.squared_norm`."""
    partials.zero_()
    for row, counted in ((0, True), (1, False)):
        rows = [i for i in range(len(x)) if layout.counted[i] is counted and present(i, x, y)]
        if rows:
            values = difference(x, y, rows)
            if len(weight):
                values = torch._foreach_mul(values, operand(weight, rows))
            partials[row, 0] = sum_of_squares(values)


def direction_products(
    layout: Layout, x1: TensorList, x3: TensorList, acc: TensorList, coefficients: Tensor, partials: Tensor
) -> None:
    """See `reference.direction_products`."""
    partials.zero_()
    shapes = shapes_of(x1, x3, acc, None)
    for row, counted in ((0, True), (1, False)):
        indices = [i for i in range(len(x3)) if layout.counted[i] is counted and present(i, x1, x3, acc)]
        for group, rows in by_group(layout, indices):
            c = coefficients[group]
            plus = h_plus(c, x1, x3, rows, shapes)
            minus = operand(acc, rows, shapes) if len(acc) else [torch.zeros_like(p) for p in plus]
            pairs: tuple[tuple[Tensors, Tensors], ...]
            if len(x1):
                pairs = ((plus, plus), (minus, plus), (minus, minus))
            else:
                d = torch._foreach_add(plus, torch._foreach_mul(minus, c[Column.DIRECTION_ACC]))
                pairs = ((d, d),)
            for j, (left, right) in enumerate(pairs):
                partials[2 * j + row, 0] += dot(left, right)


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
    """See `reference.perturb_`."""
    total = partials.sum(1)
    bad = ~torch.isfinite(total).all()
    if ascent > 0:
        bad = bad | (control[Control.FOUND_INF] != 0)
    control[Control.FOUND_INF] = bad.to(control.dtype)
    norm = total[0].sqrt() / control[Control.LOSS_SCALE]
    scale = coefficients[:, Column.RADIUS_0 + ascent] / (norm + control[Control.EPS]) / control[Control.LOSS_SCALE]

    everything = range(len(theta))
    if len(backup):
        torch._foreach_copy_(raw(backup, everything), raw(theta, everything))
    if len(base):
        origin = raw(base, everything)
        torch._foreach_copy_(raw(theta, everything), origin)
    else:
        origin = raw(backup, everything) if len(backup) else [t.clone() for t in theta.tensors]
    for group, rows in by_group(layout, [i for i in everything if present(i, x, y)]):
        start = [origin[i] for i in rows]
        step = torch._foreach_mul(difference(x, y, rows), scale[group])
        if adaptive:
            step = torch._foreach_mul(step, torch._foreach_mul(up(start), up(start)))
        moved = torch._foreach_add(up(start), step)
        _store_(layout, [theta.tensors[i] for i in rows], moved, rows, control, ascent)
        commit_([theta.tensors[i] for i in rows], start, ~bad)
    realised.zero_()
    realised[0] = sum_of_squares(torch._foreach_sub(up(theta.tensors), up(origin)))
    _fold_(layout, x, acc, coefficients)


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
    """See `reference.combined_update_`."""
    skip = _close_step(partials, control)
    u, unscale = direction_scalars(coefficients, partials, control)
    if len(backup):
        restore_(layout, theta, backup)
    direction.zero_()
    for group, rows in by_group(layout, [i for i in range(len(theta)) if present(i, x1, x3, acc)]):
        c = coefficients[group]
        d = direction_of(c, x1, x3, acc, rows, u, unscale)
        direction[0] += sum_of_squares(d)
        step = torch.stack([steps.tensors[i] for i in rows]) + 1
        old = up([theta.tensors[i] for i in rows])
        if algorithm == Algorithm.SGD:
            results = sgd(c, old, d, first, rows, step)
        else:
            results = adam(c, old, d, first, second, third, rows, step)
        results.append(([steps.tensors[i] for i in rows], list(step)))
        for targets, values in [([theta.tensors[i] for i in rows], results[0]), *results[1:]]:
            commit_(targets, values, skip)
    direction[0] = torch.where(skip, 0, direction[0])


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
    """See `reference.combine_`."""
    _close_step(partials, control)
    u, unscale = direction_scalars(coefficients, partials, control)
    direction.zero_()
    for group, rows in by_group(layout, [i for i in range(len(out)) if out.tensors[i] is not None]):
        d = direction_of(coefficients[group], x1, x3, acc, rows, u, unscale, like=out)
        direction[0] += sum_of_squares(d)
        torch._foreach_copy_([out.tensors[i] for i in rows], d)


def _fold_(layout: Layout, x: TensorList, acc: TensorList, coefficients: Tensor) -> None:
    if not len(acc):
        return
    for group, rows in by_group(layout, [i for i in range(len(acc)) if acc.tensors[i] is not None]):
        targets = raw(acc, rows)
        torch._foreach_mul_(targets, coefficients[group, Column.FOLD_0])
        torch._foreach_add_(targets, torch._foreach_mul(operand(x, rows, acc), coefficients[group, Column.FOLD_2]))


def _store_(layout: Layout, targets: Tensors, values: Tensors, rows: list[int], control: Tensor, ascent: int) -> None:
    if targets[0].dtype in (torch.float32, torch.float64):
        torch._foreach_copy_(targets, values)
        return
    key = rounding.key_on_device(control, ascent)
    for i, target, value in zip(rows, targets, values, strict=True):
        rounding.store_(target, value, key, int(layout.table[0, i]))


def _close_step(partials: Tensor, control: Tensor) -> Tensor:
    skip = (control[Control.FOUND_INF] != 0) | ~torch.isfinite(partials.sum(1)).all()
    control[Control.LAST_SKIPPED] = skip.to(control.dtype)
    control[Control.SKIPPED] += skip
    control[Control.NOISE_STEP] += 1
    return skip
