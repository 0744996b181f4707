"""A step between those of the method (`interval`): d = h_loss, one pass, or two with the SAM oracle. No method by itself."""

from __future__ import annotations

from gam_fused.step.step import Step


def passes(step: Step) -> None:
    """d = h_loss."""
    g0 = step.gradient("theta")
    if step.settings.oracle_radius is None:
        step.update(last=g0, table="plain")
    else:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        del g0
        step.update(last=step.gradient("theta1"), table="plain")
