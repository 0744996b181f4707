"""Sharpness-Aware Minimization (Foret et al., ICLR 2021): d = g1."""

from __future__ import annotations

from torch import Tensor

from gam_fused.settings import Settings, Takes
from gam_fused.step.method import Coefficients, Method
from gam_fused.step.record import Record
from gam_fused.step.step import Step


def passes(step: Step) -> None:
    g0 = step.gradient("theta")
    step.ascend(0, g0)  # theta1 = theta + rho g0/|g0|
    del g0
    step.update(last=step.gradient("theta1"))


def coefficients(settings: Settings, rho: float) -> Coefficients:
    """d = g1."""
    return Coefficients(radii=(rho, 0.0, 0.0), last=1.0)


def norms(record: Record) -> dict[str, Tensor]:
    return {"gradient_norm": record.norm(0)}


METHOD = Method("sam", Takes(rho=0.05), passes, coefficients, norms)
