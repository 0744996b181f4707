"""Sharpness-Aware Minimization (Foret et al., ICLR 2021): d = g1.

On a part of the batch, whose gradients are q: d = g0 + (q1 - q0).
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    if step.settings.on_part:
        return passes_on_part(step)
    g0 = step.gradient("theta")
    step.ascend(0, g0)  # theta1 = theta + rho g0/|g0|
    del g0
    step.update(last=step.gradient("theta1"))


def passes_on_part(step: Step) -> None:
    g0 = step.gradient("theta", keep=True)
    q0 = step.gradient_on_part("theta")
    rest = step.ascend(0, q0, fold=g0)  # theta1 = theta + rho q0/|q0|;  rest = g0 - q0
    del g0, q0
    step.update(last=step.gradient_on_part("theta1"), folded=rest, guard_direction=True)


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """d = g1, or q1 + (g0 - q0)."""
    return Coefficients(radii=(rho, 0.0, 0.0), fold=(1.0, -1.0), last=1.0, folded=1.0)


def norms(record: Record) -> dict[str, Tensor]:
    return {"gradient_norm": record.norm(0)}


METHOD = Method("sam", Takes(rho=0.05), passes, coefficients, norms)
