"""The gradient norm at theta itself as a penalty (Zhao et al., ICML 2022): d = grad (L + alpha rho |grad L|), two gradients.

The Hessian-vector product H g0/|g0| ~ (g1 - g0)/rho' is Appendix D's, so with c = alpha rho/rho'

    d = h_loss + c (g1 - g0),    h_loss = g0: d = (1 - c) g0 + c g1

At c = 1 that is SAM with radius rho'; the default weighs half of it.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    g0 = step.gradient("theta", keep=True)
    if step.settings.oracle_is_off_the_probe:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        h_loss = step.gradient("oracle", keep=True)
        folded = step.ascend(0, g0, fold=h_loss)  # theta1 = theta + rho' g0/|g0|;  folded = h_loss - c g0
        del g0, h_loss
        step.update(last=step.gradient("theta1"), folded=folded, guard_direction=True)
    else:
        step.ascend(0, g0)  # theta1 = theta + rho' g0/|g0|
        step.update(last=step.gradient("theta1"), folded=step.accumulator(g0))


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """h_loss = g0: d = (1 - c) g0 + c g1. h_loss = g1 (the SAM oracle at rho'): d = -c g0 + (1 + c) g1."""
    c = settings.alpha * rho / settings.rho_prime
    radii = (settings.rho_prime, 0.0, 0.0)
    if settings.oracle_is_off_the_probe:
        return Coefficients(radii, fold=(1.0, -c), last=c, folded=1.0)
    if settings.oracle == "sam":
        return Coefficients(radii, last=1.0 + c, folded=-c)
    return Coefficients(radii, last=c, folded=1.0 - c)


def norms(record: Record) -> dict[str, Tensor]:
    return {"gradient_norm": record.norm(0)}


METHOD = Method(
    "gradient_penalty",
    Takes(rho=0.05, rho_prime=0.05, alpha=0.5, oracle=True),
    passes,
    coefficients,
    norms,
    probes=True,
)
