"""The main flatness measures as floats, for training logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from gam_fused.flatness.batches import over_batches
from gam_fused.flatness.eigenvalues import hessian_eigenvalues
from gam_fused.flatness.objective import Objective, measured
from gam_fused.flatness.progress import ProgressArgument
from gam_fused.flatness.sharpness import first_order_flatness, zeroth_order_flatness
from gam_fused.flatness.trace import hessian_trace
from gam_fused.flatness.vectors import NotFiniteError, norm


def report(
    model: nn.Module,
    criterion: Callable[..., Tensor] | None,
    loader: Iterable[Any],
    *,
    rho: float = 0.05,
    steps: int = 10,
    restarts: int = 0,
    samples: int = 10,
    tolerance: float = 1e-2,
    seed: int = 0,
    progress: ProgressArgument = False,
    **how: Any,
) -> dict[str, float]:
    """Is this minimum flatter? Each measure once, coarsely, over a loader's mini-batches, as floats to log.

    With S steps, R restarts and K Lanczos iterations (10 to 20), this costs (1 + R)(1 + S) gradients for R0, as many
    gradients and Hessian-vector products for R1, and K + `samples` products.

    Args:
        model, criterion, loader: as for `over_batches`, which takes `how`: batch_loss, batches, training, all_ranks,
            generators.
        rho: radius of both flatness measures.
        steps, restarts: of their ascents.
        samples: products for the trace, by Hutchinson's estimator.
        tolerance: of the largest eigenvalue.
        seed: of all random vectors. progress: True, or a function of (done, total); one count per measure.

    Returns:
        ``loss``; ``gradient_norm``; ``zeroth_order_flatness`` (R0, equation 2); ``first_order_flatness`` (R1, equation 3);
        ``largest_eigenvalue`` (equation 4); ``trace`` and its ``trace_error``. NaN if the loss, its gradient or its
        curvature is not finite.

    Raises:
        TypeError, ValueError: as `over_batches` and the measures.
    """
    loss = over_batches(model, criterion, loader, **how)
    ascent: dict[str, Any] = {"steps": steps, "restarts": restarts, "seed": seed, "progress": progress}

    def gradient_norm(objective: Objective) -> tuple[float, float]:
        value, gradient = objective.gradient()
        return value, norm(gradient)

    result = dict(zip(("loss", "gradient_norm"), measured(loss, None, gradient_norm), strict=True))
    measures: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "zeroth_order_flatness": lambda: (zeroth_order_flatness(loss, rho=rho, **ascent),),
        "first_order_flatness": lambda: (first_order_flatness(loss, rho=rho, **ascent),),
        "largest_eigenvalue": lambda: (hessian_eigenvalues(loss, tolerance=tolerance, seed=seed, progress=progress),),
        "trace trace_error": lambda: hessian_trace(loss, samples=samples, seed=seed, progress=progress),
    }
    for names, measure in measures.items():
        try:
            values = [float(t) for t in measure()]
        except NotFiniteError:
            values = [math.nan] * len(names.split())
        result |= zip(names.split(), values, strict=True)
    return result
