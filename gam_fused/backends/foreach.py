"""The torch backend: the kernels (see `reference`) in `torch._foreach_*`, on any device and for any strides.

Arithmetic in float32 for storage up to 32 bits, in float64 for float64. Everything that decides (skip, clip, projection,
coefficients) stays on the device as 0-d tensors, so the host waits for nothing; on the CPU, where nothing
has to wait, it is read. On a device launches grow with param groups, not with tensors: see `batches`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.backends.base_optimizers import UPDATES
from gam_fused.backends.batches import Batch, batches, by_group, presence, raw
from gam_fused.backends.math import rounding
from gam_fused.backends.math.ascent import ascent_scales
from gam_fused.backends.math.direction import direction_lists, h_plus_lists
from gam_fused.backends.math.lists import (
    Scalar,
    Tensors,
    add_scaled_,
    change_of,
    difference,
    dot,
    operand,
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
        for batch in batches(o.layout, rows, x=o.x, y=o.y, weight=o.weight):
            if len(o.y) or len(o.weight):
                values = difference(batch["x"], batch["y"])
                if len(o.weight):
                    values = times(values, up(batch["weight"]))
            else:
                values = batch.tensors["x"] if batch.vectors else up(batch["x"])  # norms of a list are one launch
            o.partials[row, 0].add_(sum_of_squares(values))


def direction_products(o: DirectionProducts) -> None:
    """See `reference.direction_products`."""
    o.partials.zero_()
    table, there = scalars(o.coefficients), presence(o.g1, o.last, o.folded)
    for row, counted in ((0, True), (1, False)):
        indices = [i for i in range(len(o.last)) if o.layout.counted[i] is counted and there[i]]
        for group, rows in by_group(o.layout, indices):
            c = table[group]
            for batch in batches(o.layout, rows, g1=o.g1, last=o.last, folded=o.folded):
                b1, b3, minus = batch["g1"], batch["last"], batch["folded"]
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
            lists = {"theta": o.theta, "base": o.base, "x": o.x, "y": o.y, "folded": o.folded, "backup": o.backup}
            for batch in batches(o.layout, some, **lists):
                squares = _ascend_(batch, stay, sizes[group], o.control, o.ascent, o.adaptive, moves)
                if squares is not None:
                    o.realised[0].add_(squares)
                _fold_(batch, table[group])


def _ascend_(
    batch: Batch, stay: Scalar, size: Scalar, control: Tensor, ascent: int, adaptive: bool, moves: bool
) -> Tensor | None:
    """Moves one batch of theta from its base, unless `stay`. Returns the sum of squares of how far it came, None for 0."""
    if batch.has("backup"):
        batch.copy_("backup", "theta")
    if not moves or stay is True or (isinstance(size, float) and size == 0.0):
        if batch.has("base"):
            batch.copy_("theta", "base")
        return None
    origin = up(batch["base"] or batch["backup"] or batch.copy_of("theta"))
    moved = torch._foreach_mul(difference(batch["x"], batch["y"]), size)
    if adaptive:
        moved = times(moved, torch._foreach_mul(origin, origin))
    torch._foreach_add_(moved, origin)
    if stay is not False:
        moved = select(stay, origin, moved)
    return sum_of_squares(change_of(_store_(batch, moved, control, ascent), origin))


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
    lists = {"theta": o.theta, "state1": o.state1, "state2": o.state2, "state3": o.state3}
    for group, rows in by_group(o.layout, [i for i in range(len(o.theta)) if there[i]]):
        c = table[group]
        for batch in batches(o.layout, rows, **lists, g1=o.g1, last=o.last, folded=o.folded):
            new = {name: workspace(batch[name]) if batch.has(name) else [] for name in lists}
            d = direction_lists(c, batch["g1"], batch["last"], batch["folded"], plus_scale, unscale)
            o.direction[0].add_(sum_of_squares(d))
            theta, *state = new.values()
            UPDATES[o.algorithm].lists_(c, theta, d, state, _counts(o, batch.rows) + 1, batch.each)
            still = skip if isinstance(skip, bool) else skip | (c[Column.LR] == 0)
            for name, values in new.items():
                if values:
                    batch.commit(name, values, still if name == "theta" else skip)
        counts = _counts(o, rows)
        advanced = counts + (1.0 if skip is False else torch.where(skip, 0.0, 1.0))
        torch._foreach_copy_(raw(o.steps, rows), list(advanced.to(counts.dtype)))
    if skip is not False:
        o.direction[0] = torch.where(skip, 0, o.direction[0])


def _counts(o: CombinedUpdate, rows: list[int]) -> Tensor:
    return torch.stack(raw(o.steps, rows))


def combine_(o: Combine) -> None:
    """See `reference.combine_`."""
    close_step(o.partials, o.control)
    plus_scale, unscale = map(scalars, direction_scale(o.coefficients, o.partials, o.control))
    o.direction.zero_()
    table = scalars(o.coefficients)
    for group, rows in by_group(o.layout, [i for i in range(len(o.out)) if o.out.tensors[i] is not None]):
        for batch in batches(o.layout, rows, out=o.out, g1=o.g1, last=o.last, folded=o.folded):
            like = [] if batch.vectors else batch["out"]
            d = direction_lists(table[group], batch["g1"], batch["last"], batch["folded"], plus_scale, unscale, like=like)
            o.direction[0].add_(sum_of_squares(d))
            batch.store("out", d)


def restore_(o: Restore) -> None:
    """See `reference.restore_`."""
    if len(o.theta):
        torch._foreach_copy_(o.theta.tensors, o.backup.tensors)


copy_ = restore_  # a copy is a copy


def _fold_(batch: Batch, c: Scalar) -> None:
    """folded <- FOLD_0 folded + FOLD_2 x, where folded is not missing."""
    folded, x = batch.where_there("folded", "x") if batch.tensors["folded"] else ([], [])
    if folded:
        scale_(folded, c[Column.FOLD_0])
        add_scaled_(folded, operand(x, folded), c[Column.FOLD_2])
        batch.store("folded", folded)


def _store_(batch: Batch, values: Tensors, control: Tensor, ascent: int) -> Tensors:
    """theta <- values. Returns them as they are stored."""
    dtype = batch.tensors["theta"][0].dtype
    if dtype == values[0].dtype:
        batch.store("theta", values)
        return values
    key = rounding.key_on_device(control, ascent)
    if batch.vectors:
        noise = rounding.noise(batch.positions(control.device), key)
        rounded = rounding.stochastic_round(values[0], dtype, noise)
        batch.store("theta", [rounded])
        return up([rounded])
    for i, target, value in zip(batch.rows, batch["theta"], values, strict=True):
        rounding.store_(target, value, key, batch.layout.starts[i] + batch.offset)
    return up(batch["theta"])
