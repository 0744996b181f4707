"""What figures 2, 3 and 5 show of one trained network, of the loss on its training data in eval mode."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn

from gam_fused import flatness
from studies.defaults.networks import Data
from studies.defaults.steps import loss

RHO = 0.1  # radius of R0 and R1, and of figure 2 (section 5.1)
EIGENVALUES = 50  # figure 3
DIRECTIONS = 100  # figure 2
LANDSCAPE_RADIUS, LANDSCAPE_POINTS = 1.0, 21  # figure 5
SAMPLES = 500


def measured(model: nn.Module, data: Data, converged: bool, quick: bool = False) -> dict[str, Any]:
    """JSON-ready: "eigenvalues" (the largest, in falling order), "trace"; and once converged also "R0", "R1", "minima" and
    "maxima" of each direction, and "landscape", losses [points][points].

    Numbers are NaN, and lists empty, where the curvature is not finite.
    """
    model.eval()
    x, y = data.inputs[:SAMPLES], data.targets[:SAMPLES]
    params = list(model.parameters())
    count, directions, points = (5, 3, 3) if quick else (EIGENVALUES, DIRECTIONS, LANDSCAPE_POINTS)

    def loss_fn():  # type: ignore[no-untyped-def]
        return loss(model, x, y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the last of 50 eigenvalues need not have converged
        try:
            eigenvalues = flatness.hessian_eigenvalues(loss_fn, params, count, tolerance=1e-3).tolist()
            trace = flatness.hessian_trace(loss_fn, params, samples=count).estimate.item()
        except ValueError:
            return {"eigenvalues": [], "eigenvalue": math.nan, "trace": math.nan, "R0": math.nan, "R1": math.nan}
    result = {"eigenvalues": eigenvalues, "eigenvalue": eigenvalues[0], "trace": trace}
    if not converged:
        return result
    density = flatness.local_minima_density(loss_fn, params, directions, radius=RHO)
    landscape = flatness.loss_landscape(loss_fn, params, radius=LANDSCAPE_RADIUS, points=points)
    return {
        **result,
        "R0": float(flatness.zeroth_order_flatness(loss_fn, params, RHO)),
        "R1": float(flatness.first_order_flatness(loss_fn, params, RHO)),
        "minima": density.minima.tolist(),
        "maxima": density.maxima.tolist(),
        "landscape": [[float(f"{value:.5g}") for value in row] for row in landscape.tolist()],
    }
