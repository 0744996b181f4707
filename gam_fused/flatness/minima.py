"""How many local minima lie around the weights (section 5.1 of the paper)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gam_fused.checks import whole
from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.progress import Progress, ProgressArgument
from gam_fused.flatness.vectors import check_positive, generator, move_to, norm, random_direction


class MinimaDensity(NamedTuple):
    """Numbers of local `minima` and `maxima` along each direction, int64 tensors [directions]."""

    minima: Tensor
    maxima: Tensor


def local_minima_density(
    loss_fn: LossFunction,
    params: Parameters = None,
    directions: int = 100,
    *,
    step: float = 0.01,
    radius: float = 0.1,
    seed: int = 0,
    progress: ProgressArgument = False,
) -> MinimaDensity:
    """Section 5.1: how many local minima and maxima lie within `radius` along random directions.

    From theta the weights move along a random direction in steps of norm `step`. A point counts if its loss is strictly
    below (above) that of both its neighbours, so theta and the last point never count.

    Costs `directions` * `radius` / `step` losses, each one forward pass without a graph; 1,000 with the paper's settings.

    Args:
        loss_fn, params: see `gam_fused.flatness`.
        directions: number of random directions, uniform on the sphere.
        step: distance of neighbouring points, in units of weight; > 0.
        radius: how far to go; at least two steps.
        seed: of the directions.
        progress: True, or a function of (done, total), per loss.

    Returns:
        `MinimaDensity(minima, maxima)`.

    Raises:
        ValueError: an invalid value of `directions`, `step` or `radius`.
    """
    whole("directions", directions, minimum=1)
    check_positive(step=step, radius=radius)
    count = round(radius / step)
    if count < 2:
        raise ValueError(f"radius must be at least two steps, got radius {radius} and step {step}")

    def walks(loss: Objective) -> Tensor:
        losses, random = torch.empty(directions, count + 1, dtype=torch.float64, device="cpu"), generator(seed)
        with Progress(progress, directions * count, "local_minima_density") as bar:
            losses[:, 0] = loss.value()
            for row in losses:
                direction = random_direction(loss.params, random)
                unit = step / norm(direction)
                for i in range(1, count + 1):
                    move_to(loss.params, loss.centre, (i * unit, direction))
                    row[i] = loss.value()
                    bar.advance()
        return losses

    losses = measured(loss_fn, params, walks)
    before, here, after = losses[:, :-2], losses[:, 1:-1], losses[:, 2:]
    minima = ((here < before) & (here < after)).sum(dim=1)
    return MinimaDensity(minima, ((here > before) & (here > after)).sum(dim=1))
