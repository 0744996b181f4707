"""Algorithm 2 of the paper's appendix: d = h+ - gamma (h- minus its projection on h+), from four gradients.

h+ = alpha g1 + (1 - alpha) g3
h- = beta g0 + (1 - beta) g2
s  = <h-, h+> / |h+|^2
d  = h+ - gamma (h- - s h+) = (1 + gamma s) h+ - gamma h-

On a part of the batch, whose gradients are q, the points follow from q0 to q2, and g0 + (q_i - q0) takes the place of each
other g_i.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes, pair
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    if step.settings.on_part:
        return passes_on_part(step)
    g0 = step.gradient("theta", keep=True)
    step.ascend(0, g0)  # theta1 = theta + rho' g0/|g0|
    g1 = step.gradient("theta1", keep=True)
    step.ascend(1, g1, minus=g0)  # theta2 = theta + rho (g1 - g0)/|g1 - g0|
    g2 = step.gradient("theta2")
    h_minus = step.ascend(2, g2, fold=g0)  # theta3 = theta2 + rho' g2/|g2|;  h- = beta g0 + (1 - beta) g2
    del g0, g2
    g3 = step.gradient("theta3")
    step.update(g1=g1, last=g3, folded=h_minus)  # h+ = alpha g1 + (1 - alpha) g3


def passes_on_part(step: Step) -> None:
    g0 = step.accumulator(step.gradient("theta", keep=True))
    q0 = step.gradient_on_part("theta", keep=True)
    step.ascend(0, q0)  # theta1 = theta + rho' q0/|q0|
    q1 = step.gradient_on_part("theta1", keep=True)
    step.ascend(1, q1, minus=q0)  # theta2 = theta + rho (q1 - q0)/|q1 - q0|
    plus = step.combine("plus", out=q1, g1=q0, last=q1, folded=g0)  # alpha q1 + (g0 - q0)
    minus = step.combine("minus", out=q0, last=q0, folded=g0)  # g0 - (1 - beta) q0
    del g0, q0, q1
    q2 = step.gradient_on_part("theta2")
    h_minus = step.ascend(2, q2, fold=minus)  # theta3 = theta2 + rho' q2/|q2|;  h- = g0 + (1 - beta) (q2 - q0)
    del q2, minus
    q3 = step.gradient_on_part("theta3")
    step.update(g1=plus, last=q3, folded=h_minus)  # h+ = g0 + alpha (q1 - q0) + (1 - alpha) (q3 - q0)


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """h+ = alpha[0] g1 + alpha[1] g3, h- = beta[0] g0 + beta[1] g2, d = (1 + gamma s) h+ - gamma h-."""
    alpha, beta, gamma = pair(settings.alpha), pair(settings.beta), settings.gamma
    if settings.on_part:  # the other weights are those of `plus` and `minus`
        alpha, beta = (1.0, alpha[1]), (1.0, beta[1])
    return Coefficients(
        radii=(settings.rho_prime, rho, settings.rho_prime), fold=beta, g1=alpha[0], last=alpha[1], folded=-gamma
    )


def plus_on_part(settings: Settings) -> Coefficients:
    """h+ without q3: alpha[0] q1 + (alpha[0] + alpha[1]) (g0 - q0)."""
    alpha = pair(settings.alpha)
    return Coefficients(g1=-sum(alpha), last=alpha[0], folded=sum(alpha))


def minus_on_part(settings: Settings) -> Coefficients:
    """h- without q2: (beta[0] + beta[1]) g0 - beta[1] q0."""
    beta = pair(settings.beta)
    return Coefficients(last=-beta[1], folded=sum(beta))


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
    combinations={"plus": plus_on_part, "minus": minus_on_part},
)
