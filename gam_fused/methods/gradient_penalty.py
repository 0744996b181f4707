"""The gradient norm at theta itself as a penalty (Zhao et al., ICML 2022): d = grad (L + alpha rho |grad L|), two gradients.

The Hessian-vector product H g0/|g0| ~ (g1 - g0)/rho' is Appendix D's, so with c = alpha rho/rho'

    d = h_loss + c (g1 - g0),    h_loss = g0: d = (1 - c) g0 + c g1

At c = 1 that is SAM with radius rho'; the default weighs half of it. On a part of the batch (g1 - g0) is of that part: q0
and q1 are its gradients.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method, bounded
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    settings = step.settings
    g0 = step.gradient("theta", keep=True)
    q0 = step.gradient_on_part("theta", keep=True, instead_of=g0)
    h_loss, extra = g0, settings.oracle_is_off_the_probe
    if extra:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        h_loss = step.gradient("oracle", keep=True)
    del g0
    if settings.max_ratio is not None:
        step.ascend(0, q0)  # theta1 = theta + rho' q0/|q0|
        q1 = step.gradient_on_part("theta1", keep=settings.oracle == "sam")
        if settings.oracle == "sam" and not extra:
            h_loss = q1
        step.update(g1=q0, last=q1, folded=step.accumulator(h_loss))
    elif extra or settings.on_part:
        folded = step.ascend(0, q0, fold=h_loss)  # theta1 = theta + rho' q0/|q0|;  folded = h_loss - c q0
        del q0, h_loss
        step.update(last=step.gradient_on_part("theta1"), folded=folded, guard_direction=True)
    else:
        step.ascend(0, q0)
        step.update(last=step.gradient("theta1"), folded=step.accumulator(q0))


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """h_loss = g0: d = (1 - c) g0 + c g1. h_loss = g1 (the SAM oracle at rho'): d = -c g0 + (1 + c) g1.

    Bounded, it is h_loss + alpha' h+ with h+ = (rho/rho') (g1 - g0).
    """
    radii, c = (settings.rho_prime, 0.0, 0.0), rho / settings.rho_prime
    if settings.max_ratio is not None:
        return bounded(settings, Coefficients(radii, g1=-c, last=c))
    c = settings.alpha * rho / settings.rho_prime
    if settings.oracle_is_off_the_probe or settings.on_part:
        return Coefficients(radii, fold=(1.0, -c), last=c, folded=1.0)
    if settings.oracle == "sam":
        return Coefficients(radii, last=1.0 + c, folded=-c)
    return Coefficients(radii, last=c, folded=1.0 - c)


def norms(record: Record) -> dict[str, Tensor]:
    return {"gradient_norm": record.norm(0), **record.bound()}


METHOD = Method(
    "gradient_penalty",
    Takes(rho=0.05, rho_prime=0.05, alpha=0.5, oracle=True, bound=True, max_ratio=0.1),
    passes,
    coefficients,
    norms,
    probes=True,
)
