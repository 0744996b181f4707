"""The largest eigenvalues of the Hessian (Lemma 4.1 and section 5.4 of the paper), without forming it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gam_fused.checks import whole
from gam_fused.flatness.hessian import Hessian
from gam_fused.flatness.lanczos import Krylov
from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.progress import Progress, ProgressArgument
from gam_fused.flatness.vectors import check_positive, generator

SPARE = 40  # vectors beyond twice the wanted ones, before a restart
CHAIN = 10  # products


def hessian_eigenvalues(
    loss_fn: LossFunction,
    params: Parameters = None,
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
    progress: ProgressArgument = False,
) -> Tensor:
    """The `k` largest eigenvalues (largest algebraically, not in magnitude) of the Hessian, in descending order.

    At a minimum the largest is lambda_max of equation (4): the first-order flatness over rho^2. Section 5.4 shows 50 of
    them. Computed by Lanczos iteration with full reorthogonalisation and thick restarts; Hessian-vector products use double
    backward.

    Args:
        loss_fn, params: see `gam_fused.flatness`; N elements in all. A plain `loss_fn` is called once. Every
            operator of the model must support double backward.
        k: how many, 1 <= k <= N.
        tolerance: the iteration ends when |H v - lambda v| <= tolerance * |lambda| for each; the error of an eigenvalue is
            then at most that, and about its square over the gap to the next eigenvalue. For k > 1 the iteration continues
            from a random vector, to find multiple eigenvalues, and neglects the remaining residuals: they may be up to twice
            that.
        max_iterations: Hessian-vector products per eigenvalue. At most 2 k + 40 vectors of N elements are kept.
        seed: of the random start vector.
        progress: True, or a function of (done, total), per product; total is the maximum, which is rarely reached.

    Returns:
        float64 tensor [k], in units of loss per squared unit of weight, on the first parameter's device.

    Raises:
        ValueError: `k`, `tolerance` or `max_iterations` out of range, or a loss or product that is not finite.

    Warns:
        RuntimeWarning: not all converged within `max_iterations` * k products; the best estimates, lower bounds up to
            rounding, are returned.
    """
    check_positive(tolerance=tolerance)
    whole("max_iterations", max_iterations, minimum=1)
    whole("k", k, minimum=1)

    def largest(loss: Objective) -> tuple[Tensor, str]:
        size = sum(p.numel() for p in loss.params)
        if k > size:
            raise ValueError(f"k must be between 1 and the number of elements, {size}, got {k}")
        limit = max_iterations * k
        with Progress(progress, limit, "hessian_eigenvalues") as bar:
            space = Krylov(Hessian(loss, bar), generator(seed), min(size, 2 * k + SPARE))
            converged = _search(space, k, size, tolerance, limit)
        return space.values[:k].to(loss.params[0].device), "" if converged else _shortfall(space, k, tolerance, limit)

    values, shortfall = measured(loss_fn, params, largest)
    if shortfall:
        warnings.warn(shortfall, RuntimeWarning, stacklevel=2)
    return values


def _search(space: Krylov, k: int, size: int, tolerance: float, limit: int) -> bool:
    """Extends `space` until its `k` largest eigenpairs have converged; False where `limit` products were too few.

    A Krylov space holds one eigenvector of each multiple eigenvalue. So once all have converged, a random vector outside the
    space starts a chain anew, until the largest value that comes from there is known well enough to be none of them.
    """
    found: Tensor | None = None  # the values that the chain under way is to confirm
    chain, every = 0, max(1, k // 10)  # solving a large projection takes as long as a product of a small network
    for done in range(1, limit + 1):
        space.extend()
        chain += 1
        if not (space.closed or space.is_full() or chain % every == 0 or done == limit):
            continue
        space.solve()
        converged = space.have_converged(k, tolerance)
        if space.size == size or (converged and k == 1):
            return True
        if found is not None and converged and _is_confirmed(space, k, chain):
            if torch.allclose(space.values[:k], found, rtol=tolerance, atol=0.0):
                return True
            found = None
        if found is None and converged:
            found, chain = space.values[:k], 0
            space.restart(k)
            space.start_anew()
        elif space.closed:
            space.start_anew()
        elif space.is_full():
            space.restart(k + SPARE // 2)
    return converged


def _is_confirmed(space: Krylov, k: int, chain: int) -> bool:
    """Whether a chain of this many products would have shown another copy of one of the `k` largest."""
    return space.closed or (chain >= CHAIN and bool(space.residuals()[k] <= 0.1 * space.values[k - 1].abs()))


def _shortfall(space: Krylov, k: int, tolerance: float, limit: int) -> str:
    residuals, values = space.residuals()[:k], space.values[:k]
    worst = int((residuals - tolerance * values.abs()).argmax())
    return (
        f"hessian_eigenvalues: residual {float(residuals[worst]):.2g} of eigenvalue {float(values[worst]):.4g} after "
        f"{limit} products is above the tolerance {tolerance:g}; raise max_iterations"
    )
