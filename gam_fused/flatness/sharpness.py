"""Zeroth- and first-order flatness, equations (2) and (3) of the paper, by projected ascent within the ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gam_fused.checks import whole
from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.progress import Progress, ProgressArgument
from gam_fused.flatness.vectors import check_finite, check_positive, generator, move_to, norm, random_direction

Climbed = Callable[[Objective], tuple[float, list[Tensor]]]  # a value at the present weights, and where it grows


class _Search(NamedTuple):
    """How the ball is searched."""

    rho: float
    steps: int
    step_size: float
    restarts: int
    seed: int
    progress: ProgressArgument

    def check(self) -> None:
        check_positive(rho=self.rho, step_size=self.step_size)
        whole("steps", self.steps, minimum=1)
        whole("restarts", self.restarts, minimum=0)


def zeroth_order_flatness(
    loss_fn: LossFunction,
    params: Parameters = None,
    rho: float = 0.05,
    *,
    steps: int = 20,
    step_size: float = 0.5,
    restarts: int = 1,
    seed: int = 0,
    progress: ProgressArgument = False,
) -> Tensor:
    """Equation (2), R0: the largest increase of the loss within distance `rho`, max of L(theta') - L(theta) over the ball.

    A lower bound of the maximum: the best point on the path of gradient ascent, projected onto the ball after every step.

    Args:
        loss_fn, params: see `gam_fused.flatness`.
        rho: radius of the ball, in units of weight; > 0.
        steps: ascent steps per start; each costs one gradient.
        step_size: length of a step as a fraction of `rho`.
        restarts: ascents after the first one, which starts at theta itself (or at a random point if the gradient vanishes).
            They start on the sphere of radius `rho`: at the mirror image of where the first ended (near a minimum both ends
            of the steepest direction are local maxima), then at random points.
        seed: of the random points.
        progress: True, or a function of (done, total), per gradient.

    Returns:
        0-d float64 tensor on the CPU, in units of loss; never negative, as theta itself is in the ball.

    Raises:
        ValueError: `rho` or `step_size` not above 0, `steps` below 1, `restarts` below 0, or a loss at theta that is not
            finite. Other points with a non-finite loss are ignored.
    """
    search = _Search(rho, steps, step_size, restarts, seed, progress)
    base, best = _climb(loss_fn, params, Objective.gradient, search, "zeroth_order_flatness")
    return torch.tensor(best - base, dtype=torch.float64, device="cpu")


def first_order_flatness(
    loss_fn: LossFunction,
    params: Parameters = None,
    rho: float = 0.05,
    *,
    steps: int = 20,
    step_size: float = 0.5,
    restarts: int = 1,
    seed: int = 0,
    progress: ProgressArgument = False,
) -> Tensor:
    """Equation (3), R1: `rho` times the largest gradient norm within distance `rho`; it bounds R0 (Proposition 4.2).

    A lower bound of the maximum, found like `zeroth_order_flatness`; the ascent follows the gradient of the gradient norm,
    Hessian . g / |g| (equation 8), by double backward. At a minimum of a quadratic it is rho^2 lambda_max (equation 4).

    Args:
        loss_fn, params: see `gam_fused.flatness`.
        rho: radius of the ball, in units of weight; > 0.
        steps: ascent steps per start; each costs one gradient and one Hessian-vector product.
        step_size, restarts, seed, progress: as in `zeroth_order_flatness`.

    Returns:
        0-d float64 tensor on the CPU, in units of loss.

    Raises:
        ValueError: as `zeroth_order_flatness`, for a gradient at theta that is not finite.
    """
    search = _Search(rho, steps, step_size, restarts, seed, progress)
    best = _climb(loss_fn, params, Objective.norm_and_ascent, search, "first_order_flatness")[1]
    return torch.tensor(rho * best, dtype=torch.float64, device="cpu")


def _climb(loss_fn: LossFunction, params: Parameters, climbed: Climbed, search: _Search, name: str) -> tuple[float, float]:
    """(value at theta, largest finite value met in the ball)."""
    search.check()

    def ascents(loss: Objective) -> tuple[float, float]:
        total = (1 + search.restarts) * (1 + search.steps)
        with Progress(search.progress, total, name) as bar:
            base, first = climbed(loss)
            check_finite(base)
            if norm(first):  # otherwise a random point takes its place
                bar.advance()
            random, best = generator(search.seed), base
            offset, direction = [torch.zeros_like(d) for d in first], first
            for start in range(1 + search.restarts):
                if start or not norm(first):
                    mirrored = start == 1 and norm(offset) > 0.0
                    offset = [-o for o in offset] if mirrored else random_direction(loss.params, random)
                    offset = _projected(offset, search.rho, onto_sphere=True)
                    value, direction = _at(loss, climbed, offset, bar)
                    best = max(best, value)
                for _ in range(search.steps):
                    size = norm(direction)
                    if not 0.0 < size < math.inf:
                        break
                    scale = search.step_size * search.rho / size
                    offset = _projected([o + d * scale for o, d in zip(offset, direction, strict=True)], search.rho)
                    value, direction = _at(loss, climbed, offset, bar)
                    best = max(best, value)
        return base, best

    return measured(loss_fn, params, ascents)


def _at(loss: Objective, climbed: Climbed, offset: list[Tensor], bar: Progress) -> tuple[float, list[Tensor]]:
    move_to(loss.params, loss.centre, (1.0, offset))
    value, direction = climbed(loss)
    bar.advance()
    return (value if math.isfinite(value) else -math.inf), direction


def _projected(offset: list[Tensor], rho: float, onto_sphere: bool = False) -> list[Tensor]:
    """The nearest point of the ball, or of the sphere, of radius `rho`."""
    size = norm(offset)
    return [o * (rho / size) for o in offset] if size > rho or (onto_sphere and size > 0) else offset
