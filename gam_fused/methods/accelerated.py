"""Algorithm 2 of the paper's appendix: d = h+ - gamma (h- minus its projection on h+), from four gradients.

h+ = alpha g1 + (1 - alpha) g3
h- = beta g0 + (1 - beta) g2
s  = <h-, h+> / |h+|^2
d  = h+ - gamma (h- - s h+) = (1 + gamma s) h+ - gamma h-
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes, pair
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    g0 = step.gradient("theta", keep=True)
    step.ascend(0, g0)  # theta1 = theta + rho' g0/|g0|
    g1 = step.gradient("theta1", keep=True)
    step.ascend(1, g1, minus=g0)  # theta2 = theta + rho (g1 - g0)/|g1 - g0|
    g2 = step.gradient("theta2")
    h_minus = step.ascend(2, g2, fold=g0)  # theta3 = theta2 + rho' g2/|g2|;  h- = beta g0 + (1 - beta) g2
    del g0, g2
    g3 = step.gradient("theta3")
    step.update(g1=g1, last=g3, folded=h_minus)  # h+ = alpha g1 + (1 - alpha) g3


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """h+ = alpha[0] g1 + alpha[1] g3, h- = beta[0] g0 + beta[1] g2, d = (1 + gamma s) h+ - gamma h-."""
    alpha, beta, gamma = pair(settings.alpha), pair(settings.beta), settings.gamma
    return Coefficients(
        radii=(settings.rho_prime, rho, settings.rho_prime), fold=beta, g1=alpha[0], last=alpha[1], folded=-gamma
    )


def norms(record: Record) -> dict[str, Tensor]:
    return {
        "gradient_norm": record.norm(0),
        "curvature": record.norm(1) / record.settings.rho_prime,
        "first_order_flatness": record.rho * record.norm(2),
        "cosine": record.cosine(),
    }


METHOD = Method(
    "accelerated",
    Takes(rho=0.05, rho_prime=0.1, alpha=0.3, beta=0.5, gamma=0.03, pairs=True),
    passes,
    coefficients,
    norms,
    probes=True,
)
