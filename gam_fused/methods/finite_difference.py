"""Algorithm 1 with Appendix D's Hessian-vector products: d = h_loss + alpha h_norm, from four gradients.

Line numbers are those of Algorithm 1, arXiv 2303.03108. On a part of the batch h_norm is of that part: q0, q1 and so on are
its gradients.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method, bounded
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    settings = step.settings
    g0 = step.gradient("theta", keep=True)  # line 5
    q0 = step.gradient_on_part("theta", keep=True, instead_of=g0)
    h_loss, extra = g0, settings.oracle_is_off_the_probe
    if extra:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        h_loss = step.gradient("oracle", keep=True)
    step.ascend(0, q0)  # theta1 = theta + rho' q0/|q0|
    q1 = step.gradient_on_part("theta1", keep=settings.oracle == "sam")  # line 6: f ~ (q1 - q0)/rho'
    if settings.oracle == "sam" and not extra:
        h_loss = q1
    step.ascend(1, q1, minus=q0)  # line 7: theta2 = theta + rho (q1 - q0)/|q1 - q0|
    del g0, q0, q1
    q2 = step.gradient_on_part("theta2", keep=settings.max_ratio is not None)
    if settings.max_ratio is None:
        folded = step.ascend(2, q2, fold=h_loss)  # theta3 = theta2 + rho' q2/|q2|;  folded = h_loss - c q2
        del q2, h_loss
        q3 = step.gradient_on_part("theta3")  # line 8: h_norm ~ (rho/rho') (q3 - q2)
        step.update(last=q3, folded=folded, guard_direction=extra or settings.on_part)  # line 10
    else:
        step.ascend(2, q2)
        q3 = step.gradient_on_part("theta3")
        step.update(g1=q2, last=q3, folded=step.accumulator(h_loss))


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """d = h_loss + c (g3 - g2), c = alpha rho/rho': folded = h_loss - c g2, d = folded + c g3.

    Bounded, it is h_loss + alpha' h+ with h+ = (rho/rho') (g3 - g2).
    """
    radii, c = (settings.rho_prime, rho, settings.rho_prime), rho / settings.rho_prime
    if settings.max_ratio is not None:
        return bounded(settings, Coefficients(radii, g1=-c, last=c))
    c = settings.alpha * rho / settings.rho_prime
    return Coefficients(radii, fold=(1.0, -c), last=c, folded=1.0)


def norms(record: Record) -> dict[str, Tensor]:
    return {
        "gradient_norm": record.norm(0),
        "curvature": record.norm(1) / record.settings.rho_prime,
        "first_order_flatness": record.rho * record.norm(2),
        **record.bound(),
    }


METHOD = Method(
    "finite_difference",
    Takes(rho=0.05, rho_prime=0.05, alpha=1.0, oracle=True, bound=True, max_ratio=0.1),
    passes,
    coefficients,
    norms,
    probes=True,
)
