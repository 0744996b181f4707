"""Algorithm 1 with Hessian-vector products by double backward: d = h_loss + alpha h_norm, from two gradients.

Line numbers are those of Algorithm 1, arXiv 2303.03108. On a part of the batch h_norm is of that part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.direction import Lists
from gam_fused.step.method import Coefficients, Method, bounded
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    params, settings = step.plan.params, step.settings
    h_loss = step.gradient("theta", keep=True) if settings.on_part else None  # line 5
    graph, g = step.differentiable_gradient("theta", part=settings.on_part)
    v, step.record.extras["gradient_norm"] = direction_of_ascent(step, g)
    f = step.averaged(step.as_lists(hessian_vector_product(graph, params, v)))  # line 6
    del graph, v
    h_loss = h_loss or g
    if settings.oracle_radius is not None:
        step.ascend(0, h_loss, oracle=True)  # theta + sam_rho g/|g|
        h_loss = step.gradient("oracle", keep=True)
    step.ascend(0, f)  # line 7: theta_adv = theta + rho f/|f|
    graph, g_adv = step.differentiable_gradient("theta_adv", part=settings.on_part)
    v, step.record.extras["adversarial_gradient_norm"] = direction_of_ascent(step, g_adv)
    hv = step.averaged(step.as_lists(hessian_vector_product(graph, params, v)))  # line 8: h_norm = rho hv
    del graph, v
    bound = settings.max_ratio is not None  # kernels bound where there is a list g1
    step.update(g1=hv if bound else None, last=hv, folded=step.accumulator(h_loss), guard_direction=True)  # line 10


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """d = h_loss + alpha rho H(theta_adv) v, where v = g_adv/|g_adv|, turned round where a group maximises."""
    if settings.max_ratio is not None:
        return bounded(settings, Coefficients(radii=(rho, 0.0, 0.0), g1=0.0, last=rho))
    return Coefficients(radii=(rho, 0.0, 0.0), last=settings.alpha * rho, folded=1.0)


def norms(record: Record) -> dict[str, Tensor]:
    return {
        "gradient_norm": record.extras["gradient_norm"],
        "curvature": record.norm(0),
        "first_order_flatness": record.rho * record.extras["adversarial_gradient_norm"],
        **record.bound(),
    }


METHOD = Method(
    "exact",
    Takes(rho=0.05, rho_prime=0.05, alpha=1.0, oracle=True, bound=True, max_ratio=0.1),
    passes,
    coefficients,
    norms,
    twice=True,
)


def hessian_vector_product(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], vector: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Hessian . vector by differentiating the gradients once more.

    Args:
        gradients: of the loss with respect to `params`, made with `create_graph=True`; None where there is none.
        vector: shaped as `params`; None where the gradient is None.
    """
    used = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and v is not None and g.requires_grad]
    if not used:
        return [None] * len(params)
    outputs, weights = zip(*used, strict=True)
    with torch.enable_grad():
        return list(torch.autograd.grad(outputs, list(params), grad_outputs=weights, allow_unused=True))


def direction_of_ascent(step: Step, lists: Lists) -> tuple[list[Tensor | None], Tensor]:
    """The direction v in which the first-order probe of `finite_difference` would go, and the norm |g|.

    v = g / (|g| + xi) over the perturbed parameters; with `adaptive`, theta^2 g / (|theta g| + xi); the sign turned in
    groups that maximise. None where a gradient is missing or not perturbed. All of it is NaN where a gradient that is not
    counted is not finite, so that the step is skipped.
    """
    settings, params = step.settings, step.plan.params
    gradients = [g for lst in lists for g in lst.tensors]
    counted = [c for b in step.blocks for c in b.layout.counted]
    signs = [-1 if step.session.param_groups[g].get("maximize") else 1 for b in step.blocks for g in b.groups]
    weights = [p.detach() if settings.adaptive else 1 for p in params]
    rows = [_times(g, w) if g is not None and c else None for w, g, c in zip(weights, gradients, counted, strict=True)]
    others = [g for g, c in zip(gradients, counted, strict=True) if g is not None and not c]
    scale, device = step.session.loss_scaling.current_scale(params[0].device), params[0].device
    norm = _norm([g for g in rows if g is not None], device) + 0.0 * _norm(others, device)
    divisor = norm + settings.xi * scale
    v = [
        None if g is None else sign * _times(g, w) / _divisor(divisor.to(g.device, _precise(g)))
        for sign, w, g in zip(signs, weights, rows, strict=True)
    ]
    return v, norm / scale


def _times(g: Tensor, weight: Tensor | int) -> Tensor:
    """g * weight; 0 where g is 0, though the weight may be infinite."""
    return torch.where(g == 0, g, g * weight) if isinstance(weight, Tensor) else g


def _divisor(norm: Tensor) -> Tensor:
    """`norm`, or 1 where it is 0: 0 / 0 is along a zero gradient, where nothing moves."""
    return torch.where(norm == 0, 1.0, norm)


def _norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).to(device).square() for g in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64, device=device)


def _precise(g: Tensor) -> torch.dtype:
    return torch.float64 if g.dtype == torch.float64 else torch.float32
