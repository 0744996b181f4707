"""Zeroth- and first-order flatness, equations (2) and (3) of the paper, by projected ascent within the ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gam_fused.flatness.points import (
    LossFunction,
    check_positive,
    checked_params,
    derivative_along,
    generator,
    gradient,
    loss_at,
    move_to,
    norm,
    random_direction,
    weights_restored,
)

Objective = Callable[[], tuple[float, list[Tensor]]]  # at the present weights: a value and the direction in which it grows


def zeroth_order_flatness(
    loss_fn: LossFunction,
    params: Iterable[Tensor],
    rho: float,
    *,
    steps: int = 20,
    step_size: float = 0.5,
    starts: int = 2,
    seed: int = 0,
) -> Tensor:
    """Equation (2): the largest increase of the loss within distance `rho`, max of L(theta') - L(theta) over the ball.

    A lower bound of the maximum: the best point that gradient ascent, projected back to the ball after every step, passes.

    Args:
        rho: radius of the ball, in units of weight; > 0.
        steps: ascent steps per start; each costs one gradient.
        step_size: length of a step as a fraction of `rho`.
        starts: the first ascent leaves theta itself (or a random point where the gradient vanishes), the others random
            points on the sphere of radius `rho`.
        seed: of the random starts.

    Returns:
        0-d float64 tensor on the CPU, in units of loss; never negative, as theta itself is in the ball.

    Raises:
        ValueError: `rho`, `steps`, `step_size` or `starts` not above zero, or a loss at theta that is not finite.
    """
    checked = checked_params(params)

    def objective() -> tuple[float, list[Tensor]]:
        loss = loss_at(loss_fn)
        return float(loss.detach()), gradient(loss, checked)

    base, best = _climb(objective, checked, rho, steps, step_size, starts, seed)
    return torch.tensor(best - base, dtype=torch.float64, device="cpu")


def first_order_flatness(
    loss_fn: LossFunction,
    params: Iterable[Tensor],
    rho: float,
    *,
    steps: int = 20,
    step_size: float = 0.5,
    starts: int = 2,
    seed: int = 0,
) -> Tensor:
    """Equation (3): `rho` times the largest gradient norm within distance `rho`; it bounds equation (2) (Proposition 4.2).

    A lower bound of the maximum, found like `zeroth_order_flatness`; the ascent follows the gradient of the gradient norm,
    Hessian . g / |g| (line 6 of Algorithm 1), by double backward. At a minimum of a quadratic it is rho^2 lambda_max
    (equation 4).

    Args:
        rho: radius of the ball, in units of weight; > 0.
        steps: ascent steps per start; each costs one gradient and one Hessian-vector product.
        step_size: length of a step as a fraction of `rho`.
        starts: as in `zeroth_order_flatness`.
        seed: of the random starts.

    Returns:
        0-d float64 tensor on the CPU, in units of loss.

    Raises:
        ValueError: `rho`, `steps`, `step_size` or `starts` not above zero, or a gradient at theta that is not finite.
    """
    checked = checked_params(params)

    def objective() -> tuple[float, list[Tensor]]:
        grads = gradient(loss_at(loss_fn), checked, create_graph=True)
        size = norm(grads)
        if size == 0.0 or not math.isfinite(size):
            return size, [torch.zeros_like(p) for p in checked]
        return size, derivative_along(grads, checked, [g.detach() / size for g in grads])

    _, best = _climb(objective, checked, rho, steps, step_size, starts, seed)
    return torch.tensor(rho * best, dtype=torch.float64, device="cpu")


def _climb(
    objective: Objective, params: list[Tensor], rho: float, steps: int, step_size: float, starts: int, seed: int
) -> tuple[float, float]:
    """(value at theta, largest finite value met in the ball of radius `rho`)."""
    check_positive(rho=rho, steps=steps, step_size=step_size, starts=starts)
    random = generator(seed)
    with weights_restored(params) as centre, torch.enable_grad():
        base, first = objective()
        if not math.isfinite(base):
            raise ValueError(f"the objective is not finite at the present weights: {base}")
        best = base
        for start in range(starts):
            if start == 0 and 0.0 < norm(first) < math.inf:
                offset, direction = [torch.zeros_like(p) for p in params], first
            else:
                offset = _projected(random_direction(params, random), rho, onto_sphere=True)
                value, direction = _at(objective, params, centre, offset)
                best = max(best, value)
            for _ in range(steps):
                size = norm(direction)
                if not 0.0 < size < math.inf:
                    break
                scale = step_size * rho / size
                offset = _projected([o + d * scale for o, d in zip(offset, direction, strict=True)], rho)
                value, direction = _at(objective, params, centre, offset)
                best = max(best, value)
    return base, best


def _at(
    objective: Objective, params: list[Tensor], centre: list[Tensor], offset: list[Tensor]
) -> tuple[float, list[Tensor]]:
    move_to(params, centre, (1.0, offset))
    value, direction = objective()
    return (value if math.isfinite(value) else -math.inf), [d.detach() for d in direction]


def _projected(offset: list[Tensor], rho: float, onto_sphere: bool = False) -> list[Tensor]:
    """The nearest point of the ball, or of the sphere, of radius `rho`."""
    size = norm(offset)
    return [o * (rho / size) for o in offset] if size > rho or (onto_sphere and size > 0) else offset
