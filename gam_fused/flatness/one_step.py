"""Zeroth- and first-order flatness, estimated by the single ascent step of SAM and GAM."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.vectors import check_finite, check_positive, move_to, norm


def zeroth_order_estimate(loss_fn: LossFunction, params: Parameters = None, rho: float = 0.05) -> Tensor:
    """R0 estimated by SAM's single ascent step: L(theta + rho g/|g|) - L(theta), g = grad L(theta).

    Costs one gradient and one loss. At most R0, up to rounding; it may be negative, and is 0 if g is.

    Args:
        loss_fn, params, rho: as in `zeroth_order_flatness`.

    Returns:
        0-d float64 tensor on the CPU, in units of loss; not finite if the loss at the perturbed point is not.

    Raises:
        ValueError: `rho` not above 0, or a loss or gradient at theta that is not finite.
    """
    check_positive(rho=rho)

    def one_step(loss: Objective) -> float:
        base, g = loss.gradient()
        check_finite(base)
        _move_along(loss, rho, g)
        return loss.value() - base

    return torch.tensor(measured(loss_fn, params, one_step), dtype=torch.float64, device="cpu")


def first_order_estimate(loss_fn: LossFunction, params: Parameters = None, rho: float = 0.05) -> Tensor:
    """R1 estimated by a single step, equation (7): rho |grad L(theta + rho f/|f|)|, f = grad |grad L(theta)| (equation 8).

    Costs two gradients and one Hessian-vector product. At most R1, up to rounding; rho |g| if f is 0.

    Args:
        loss_fn, params, rho: as in `zeroth_order_flatness`.

    Returns:
        0-d float64 tensor on the CPU, in units of loss; not finite if the gradient at the perturbed point is not.

    Raises:
        ValueError: `rho` not above 0, or a gradient or f at theta that is not finite.
    """
    check_positive(rho=rho)

    def one_step(loss: Objective) -> float:
        size, f = loss.norm_and_ascent()
        check_finite(size)
        _move_along(loss, rho, f)
        return rho * norm(loss.gradient()[1])

    return torch.tensor(measured(loss_fn, params, one_step), dtype=torch.float64, device="cpu")


def _move_along(loss: Objective, length: float, direction: list[Tensor]) -> None:
    size = norm(direction)
    check_finite(size)
    move_to(loss.params, loss.centre, (length / size if size else 0.0, direction))
