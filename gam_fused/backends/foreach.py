"""The torch backend: the kernels (see `reference`) in `torch._foreach_*`, on any device and for any strides.

Arithmetic in float32 for storage up to 32 bits, in float64 for float64. Everything that decides (skip, clip, projection,
coefficients) stays on the device as 0-d tensors, so the host waits for nothing; on the CPU, where nothing
has to wait, it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.backends.base_optimizers import UPDATES
from gam_fused.backends.math import rounding
from gam_fused.backends.math.ascent import ascent_scales
from gam_fused.backends.math.direction import direction_lists, h_plus_lists
from gam_fused.backends.math.lists import (
    Batch,
    Scalar,
    Tensors,
    add_scaled_,
    batches,
    by_group,
    change_of,
    commit_,
    difference,
    dot,
    is_compute,
    operand,
    presence,
    raw,
    scalars,
    scale_,
    select,
    sum_of_squares,
    times,
    up,
    workspace,
)
from gam_fused.backends.math.projection import direction_scale
from gam_fused.backends.math.skip import close_step, stays
from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
from gam_fused.backends.reference import copy_ as copy_  # a copy is a copy
from gam_fused.backends.reference import restore_ as restore_
from gam_fused.backends.tensor_lists import Layout
from gam_fused.constants import Column


def reason() -> str:
    """Always there."""
    return ""


def squared_norm(o: SquaredNorm) -> None:
    """See `reference.squared_norm`."""
    o.partials.zero_()
    there = presence(o.x, o.y)
    for row, counted in ((0, True), (1, False)):
        rows = [i for i in range(len(o.x)) if o.layout.counted[i] is counted and there[i]]
        for batch in batches(o.layout, rows, o.x, o.y, o.weight):
            xs, ys, weights = batch.lists
            values = difference(xs, ys)
            if weights:
                values = times(values, up(weights))
            o.partials[row, 0].add_(sum_of_squares(values))


def direction_products(o: DirectionProducts) -> None:
    """See `reference.direction_products`."""
    o.partials.zero_()
    table, there = scalars(o.coefficients), presence(o.g1, o.last, o.folded)
    for row, counted in ((0, True), (1, False)):
        indices = [i for i in range(len(o.last)) if o.layout.counted[i] is counted and there[i]]
        for group, rows in by_group(o.layout, indices):
            c = table[group]
            for batch in batches(o.layout, rows, o.g1, o.last, o.folded):
                b1, b3, minus = batch.lists
                if not len(o.g1):
                    o.partials[row, 0].add_(sum_of_squares(direction_lists(c, [], b3, minus, 1.0, 1.0)))
                    continue
                plus = h_plus_lists(c, b1, b3, minus)
                o.partials[row, 0].add_(sum_of_squares(plus))
                if minus:
                    minus = operand(minus, b1, b3)
                    o.partials[2 + row, 0].add_(dot(minus, plus))
                    o.partials[4 + row, 0].add_(sum_of_squares(minus))


def perturb_(o: Perturb) -> None:
    """See `reference.perturb_`."""
    total = o.partials.sum(1)
    stay = scalars(stays(total, o.ascent, o.control))
    sizes, table = scalars(ascent_scales(o.coefficients, total, o.control, o.ascent)), scalars(o.coefficients)
    there = presence(o.x, o.y)
    o.realised.zero_()
    for group, rows in by_group(o.layout, range(len(o.theta))):
        for moves in (True, False):
            some = [i for i in rows if there[i] is moves]
            for batch in batches(o.layout, some, o.theta, o.base, o.x, o.y, o.folded, o.backup):
                squares = _ascend_(o.layout, batch, stay, sizes[group], o.control, o.ascent, o.adaptive, moves)
                if squares is not None:
                    o.realised[0].add_(squares)
                _fold_(batch, table[group])


def _ascend_(
    layout: Layout, batch: Batch, stay: Scalar, size: Scalar, control: Tensor, ascent: int, adaptive: bool, moves: bool
) -> Tensor | None:
    """Moves one batch of theta from its base, unless `stay`. Returns the sum of squares of how far it came, None for 0."""
    theta, base, x, y, _, backup = batch.lists
    if backup:
        torch._foreach_copy_(backup, theta)
    if not moves or stay is True or (isinstance(size, float) and size == 0.0):
        if base:
            torch._foreach_copy_(theta, base)
        return None
    origin = up(base or backup or [t.clone() for t in theta])
    moved = torch._foreach_mul(difference(x, y), size)
    if adaptive:
        moved = times(moved, torch._foreach_mul(origin, origin))
    torch._foreach_add_(moved, origin)
    if stay is not False:
        moved = select(stay, origin, moved)
    _store_(layout, theta, moved, batch, control, ascent)
    return sum_of_squares(change_of(up(theta), origin))


def combined_update_(o: CombinedUpdate) -> None:
    """See `reference.combined_update_`."""
    skip = scalars(close_step(o.partials, o.control))
    plus_scale, unscale = map(scalars, direction_scale(o.coefficients, o.partials, o.control))
    if len(o.backup):
        restore_(Restore(layout=o.layout, theta=o.theta, backup=o.backup))
    o.direction.zero_()
    if skip is True:
        return
    table, there = scalars(o.coefficients), presence(o.g1, o.last, o.folded)
    for group, rows in by_group(o.layout, [i for i in range(len(o.theta)) if there[i]]):
        c = table[group]
        advanced = torch.stack([o.steps.tensors[i] for i in rows]) + 1
        step_of = dict(zip(rows, range(len(rows)), strict=True))
        for batch in batches(o.layout, rows, o.theta, o.g1, o.last, o.folded, o.state1, o.state2, o.state3):
            targets = [lst if lst and lst[0] is not None else [] for lst in (batch.lists[0], *batch.lists[4:])]
            new = [workspace(lst) if lst else [] for lst in targets]
            b1, b3, minus = batch.lists[1:4]
            d = direction_lists(c, b1, b3, minus, plus_scale, unscale)
            o.direction[0].add_(sum_of_squares(d))
            step = advanced if batch.rows is rows else advanced[[step_of[i] for i in batch.rows]]
            UPDATES[o.algorithm].lists_(c, new[0], d, new[1:], step)
            still = skip if isinstance(skip, bool) else skip | (c[Column.LR] == 0)
            for old, values in zip(targets, new, strict=True):
                if old:
                    commit_(old, values, still if values is new[0] else skip)
        commit_(raw(o.steps, rows), list(advanced), skip)
    if skip is not False:
        o.direction[0] = torch.where(skip, 0, o.direction[0])


def combine_(o: Combine) -> None:
    """See `reference.combine_`."""
    close_step(o.partials, o.control)
    plus_scale, unscale = map(scalars, direction_scale(o.coefficients, o.partials, o.control))
    o.direction.zero_()
    table = scalars(o.coefficients)
    for group, rows in by_group(o.layout, [i for i in range(len(o.out)) if o.out.tensors[i] is not None]):
        for batch in batches(o.layout, rows, o.out, o.g1, o.last, o.folded):
            targets, b1, b3, minus = batch.lists
            d = direction_lists(table[group], b1, b3, minus, plus_scale, unscale, like=targets)
            o.direction[0].add_(sum_of_squares(d))
            torch._foreach_copy_(targets, d)


def _fold_(batch: Batch, c: Scalar) -> None:
    """folded <- FOLD_0 folded + FOLD_2 x, where folded is not missing."""
    _, _, x, _, folded, _ = batch.lists
    pairs = [(a, b) for a, b in zip(folded, x, strict=True) if a is not None] if folded else []
    if not pairs:
        return
    targets, values = map(list, zip(*pairs, strict=True))
    scale_(targets, c[Column.FOLD_0])
    add_scaled_(targets, operand(values, targets), c[Column.FOLD_2])


def _store_(layout: Layout, targets: Tensors, values: Tensors, batch: Batch, control: Tensor, ascent: int) -> None:
    if is_compute(targets[0]):
        torch._foreach_copy_(targets, values)
        return
    key = rounding.key_on_device(control, ascent)
    for i, target, value in zip(batch.rows, targets, values, strict=True):
        rounding.store_(target, value, key, int(layout.table[0, i]) + batch.offset)
