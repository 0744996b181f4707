"""Algorithm 1 with Appendix D's Hessian-vector products: d = h_loss + alpha h_norm, from four gradients.

Line numbers are those of Algorithm 1, arXiv 2303.03108.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    settings = step.settings
    g0 = step.gradient("theta", keep=True)  # line 5
    h_loss, extra = g0, settings.oracle_is_off_the_probe
    if extra:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        h_loss = step.gradient("oracle", keep=True)
    step.ascend(0, g0)  # theta1 = theta + rho' g0/|g0|
    g1 = step.gradient("theta1", keep=settings.oracle == "sam")  # line 6: f ~ (g1 - g0)/rho'
    if settings.oracle == "sam" and not extra:
        h_loss = g1
    step.ascend(1, g1, minus=g0)  # line 7: theta2 = theta + rho (g1 - g0)/|g1 - g0|
    del g0, g1
    g2 = step.gradient("theta2")
    folded = step.ascend(2, g2, fold=h_loss)  # theta3 = theta2 + rho' g2/|g2|;  folded = h_loss - c g2
    del g2, h_loss
    g3 = step.gradient("theta3")  # line 8: h_norm ~ (rho/rho') (g3 - g2)
    step.update(last=g3, folded=folded, guard_direction=extra)  # line 10


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """d = h_loss + c (g3 - g2), c = alpha rho/rho': folded = h_loss - c g2, d = folded + c g3."""
    c = settings.alpha * rho / settings.rho_prime
    return Coefficients(radii=(settings.rho_prime, rho, settings.rho_prime), fold=(1.0, -c), last=c, folded=1.0)


def norms(record: Record) -> dict[str, Tensor]:
    return {
        "gradient_norm": record.norm(0),
        "curvature": record.norm(1) / record.settings.rho_prime,
        "first_order_flatness": record.rho * record.norm(2),
    }


METHOD = Method(
    "finite_difference",
    Takes(rho=0.05, rho_prime=0.05, alpha=1.0, oracle=True),
    passes,
    coefficients,
    norms,
    probes=True,
)
