"""The loss along directions: landscapes in one and two dimensions (section 5.6 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gam_fused.checks import whole
from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.progress import Progress, ProgressArgument
from gam_fused.flatness.vectors import check_positive, generator, move_to, random_direction


def loss_landscape(
    loss_fn: LossFunction,
    params: Parameters = None,
    directions: int | Sequence[Sequence[Tensor]] = 2,
    *,
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
    progress: ProgressArgument = False,
) -> Tensor:
    """Losses at theta + a u (+ b v) on a regular grid, a and b from -radius to radius.

    `points` or `points`^2 losses, each one forward pass without a graph.

    Args:
        loss_fn, params: see `gam_fused.flatness`.
        directions: 1 or 2 for that many random directions, filter-normalised as in Li et al. 2018: each filter (row of the
            first axis) has the norm of the weights' filter, and tensors with fewer than two axes (biases, normalization) are
            not moved. Or one or two given directions, each a list of tensors shaped like `params`, used unchanged.
        radius: half the width of the grid, in units of the directions' lengths; > 0.
        points: per axis, at least 2; an odd number includes theta itself.
        seed: of the random directions.
        progress: True, or a function of (done, total), per loss.

    Returns:
        float64 tensor on the CPU, [points] or [points, points] (first axis along the first direction). The coordinates are
        `torch.linspace(-radius, radius, points)`. Losses that are not finite are kept.

    Raises:
        ValueError: an invalid number or shape of directions, radius or number of points.
    """
    check_positive(radius=radius)
    if whole("points", points, minimum=1) < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    if (count := directions if isinstance(directions, int) else len(directions)) not in (1, 2):
        raise ValueError(f"directions must be 1 or 2, or one or two lists of tensors, got {count}")
    ticks = torch.linspace(-radius, radius, points, dtype=torch.float64, device="cpu").tolist()
    grid = [[a] for a in ticks] if count == 1 else [[a, b] for a in ticks for b in ticks]

    def losses(loss: Objective) -> list[float]:
        axes = _axes(loss.params, directions, seed)
        found = []
        with Progress(progress, len(grid), "loss_landscape") as bar:
            for place in grid:
                move_to(loss.params, loss.centre, *zip(place, axes, strict=True))
                found.append(loss.value())
                bar.advance()
        return found

    found = measured(loss_fn, params, losses)
    return torch.tensor(found, dtype=torch.float64, device="cpu").view([points] * count)


def _axes(params: list[Tensor], directions: int | Sequence[Sequence[Tensor]], seed: int) -> list[Sequence[Tensor]]:
    if isinstance(directions, int):
        random = generator(seed)
        return [_filter_normalised(params, random) for _ in range(directions)]
    for axis in directions:
        if [d.shape for d in axis] != [p.shape for p in params]:
            got, wanted = [tuple(d.shape) for d in axis], [tuple(p.shape) for p in params]
            raise ValueError(f"a direction must be shaped like params, {wanted}, got {got}")
    return list(directions)


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
