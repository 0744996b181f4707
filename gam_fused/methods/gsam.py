"""Surrogate gap minimisation (Zhuang et al., ICLR 2022): d = g1 - alpha (g0 minus its projection on g1), from two gradients.

That is Algorithm 2's direction with h+ = g1, h- = g0 and gamma = alpha. On a part of the batch, whose gradients are q,
g0 + (q1 - q0) takes the place of g1.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    g0 = step.gradient("theta", keep=True)
    q0 = step.gradient_on_part("theta", keep=True, instead_of=g0)
    step.ascend(0, q0)  # theta1 = theta + rho q0/|q0|
    g1 = step.gradient_on_part("theta1", keep=True)
    h_minus = step.accumulator(g0)
    if step.settings.on_part:
        g1 = step.combine("g1", out=g1, g1=q0, last=g1, folded=h_minus)  # g0 + (q1 - q0)
    del g0, q0
    step.update(g1=g1, last=g1, folded=h_minus)


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """h+ = 0 g1 + 1 g1: the last gradient is listed twice, since kernels project where there is a list g1."""
    return Coefficients(radii=(rho, 0.0, 0.0), g1=0.0, last=1.0, folded=-settings.alpha)


def of_whole_batch(settings: Settings) -> Coefficients:
    """q1 - q0 + g0."""
    return Coefficients(g1=-1.0, last=1.0, folded=1.0)


def norms(record: Record) -> dict[str, Tensor]:
    return {"gradient_norm": record.norm(0), "cosine": record.cosine()}


METHOD = Method("gsam", Takes(rho=0.05, alpha=0.2), passes, coefficients, norms, combinations={"g1": of_whole_batch})
