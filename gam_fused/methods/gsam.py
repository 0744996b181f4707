"""Surrogate gap minimisation (Zhuang et al., ICLR 2022): d = g1 - alpha (g0 minus its projection on g1), from two gradients.

That is Algorithm 2's direction with h+ = g1, h- = g0 and gamma = alpha.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    g0 = step.gradient("theta", keep=True)
    step.ascend(0, g0)  # theta1 = theta + rho g0/|g0|
    g1 = step.gradient("theta1", keep=True)
    step.update(g1=g1, last=g1, folded=step.accumulator(g0))


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """h+ = 0 g1 + 1 g1: the last gradient is listed twice, since kernels project where there is a list g1."""
    return Coefficients(radii=(rho, 0.0, 0.0), g1=0.0, last=1.0, folded=-settings.alpha)


def norms(record: Record) -> dict[str, Tensor]:
    return {"gradient_norm": record.norm(0), "cosine": record.cosine()}


METHOD = Method("gsam", Takes(rho=0.05, alpha=0.2), passes, coefficients, norms)
