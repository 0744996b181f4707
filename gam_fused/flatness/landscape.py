"""The loss along directions: landscapes (section 5.6 of the paper) and the density of local minima (section 5.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gam_fused.flatness.points import (
    LossFunction,
    check_positive,
    checked_params,
    generator,
    loss_at,
    move_to,
    norm,
    random_direction,
    weights_restored,
)


class MinimaDensity(NamedTuple):
    """Numbers of local `minima` and `maxima` along each direction, int64 tensors [directions]."""

    minima: Tensor
    maxima: Tensor


def loss_landscape(
    loss_fn: LossFunction,
    params: Iterable[Tensor],
    directions: int | Sequence[Sequence[Tensor]] = 2,
    *,
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
) -> Tensor:
    """Losses at theta + a u (+ b v) on a regular grid, a and b from -radius to radius.

    Args:
        directions: 1 or 2 for that many random directions, filter-normalised as in Li et al. 2018: each filter (row of the
            first axis) is as long as the weights' own, and tensors of fewer than two axes (biases, norms) stay. Or one or
            two given directions, each a list of tensors shaped like `params`, used as they are.
        radius: half the width of the grid, in lengths of the directions; > 0.
        points: per axis, at least 2; odd counts contain theta itself.
        seed: of the random directions.

    Returns:
        float64 tensor on the CPU, [points] or [points, points] (first axis along the first direction). The coordinates are
        `torch.linspace(-radius, radius, points)`. Losses that are not finite are kept.

    Raises:
        ValueError: a number or shape of directions, radius or number of points that is not allowed.
    """
    weights = checked_params(params)
    check_positive(radius=radius)
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    if isinstance(directions, int):
        random = generator(seed)
        axes: list[Sequence[Tensor]] = [_filter_normalised(weights, random) for _ in range(directions)]
    else:
        axes = list(directions)
    if len(axes) not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, or one or two lists of tensors, got {len(axes)}")
    for axis in axes:
        if [d.shape for d in axis] != [p.shape for p in weights]:
            got, wanted = [tuple(d.shape) for d in axis], [tuple(p.shape) for p in weights]
            raise ValueError(f"a direction must be shaped like params, {wanted}, got {got}")
    ticks = torch.linspace(-radius, radius, points, dtype=torch.float64, device="cpu").tolist()
    grid = [[a] for a in ticks] if len(axes) == 1 else [[a, b] for a in ticks for b in ticks]
    with weights_restored(weights) as centre:
        losses = [_loss_along(loss_fn, weights, centre, list(zip(place, axes, strict=True))) for place in grid]
    return torch.tensor(losses, dtype=torch.float64, device="cpu").view([points] * len(axes))


def local_minima_density(
    loss_fn: LossFunction,
    params: Iterable[Tensor],
    directions: int = 100,
    *,
    step: float = 0.01,
    radius: float = 0.1,
    seed: int = 0,
) -> MinimaDensity:
    """Section 5.1: how many local minima and maxima lie within `radius` along random directions.

    From theta the weights move along a random direction in steps of norm `step`; a point counts whose loss is strictly below
    (above) that of both its neighbours, so theta and the last point never count.

    Args:
        directions: number of random directions, uniform on the sphere.
        step: distance of neighbouring points, in units of weight; > 0.
        radius: how far to go; at least two steps.
        seed: of the directions.

    Returns:
        `MinimaDensity(minima, maxima)`.

    Raises:
        ValueError: `directions`, `step` or `radius` not allowed.
    """
    weights = checked_params(params)
    check_positive(directions=directions, step=step, radius=radius)
    count = round(radius / step)
    if count < 2:
        raise ValueError(f"radius must be at least two steps, got radius {radius} and step {step}")
    random = generator(seed)
    losses = torch.empty(directions, count + 1, dtype=torch.float64, device="cpu")
    with weights_restored(weights) as centre:
        losses[:, 0] = _loss_along(loss_fn, weights, centre, [])
        for row in losses:
            direction = random_direction(weights, random)
            unit = step / norm(direction)
            for i in range(1, count + 1):
                row[i] = _loss_along(loss_fn, weights, centre, [(i * unit, direction)])
    before, here, after = losses[:, :-2], losses[:, 1:-1], losses[:, 2:]
    minima = ((here < before) & (here < after)).sum(dim=1)
    return MinimaDensity(minima, ((here > before) & (here > after)).sum(dim=1))


def _filter_normalised(params: Sequence[Tensor], random: torch.Generator) -> list[Tensor]:
    result = []
    for p, d in zip(params, random_direction(params, random), strict=True):
        if p.dim() < 2:
            result.append(torch.zeros_like(d))
            continue
        lengths = d.flatten(1).norm(dim=1).clamp_min(torch.finfo(d.dtype).tiny)
        ratio = p.detach().flatten(1).norm(dim=1) / lengths
        result.append(d * ratio.view(-1, *[1] * (p.dim() - 1)))
    return result


def _loss_along(
    loss_fn: LossFunction, params: list[Tensor], centre: list[Tensor], steps: list[tuple[float, Sequence[Tensor]]]
) -> float:
    move_to(params, centre, *steps)
    with torch.no_grad():
        return float(loss_at(loss_fn))
