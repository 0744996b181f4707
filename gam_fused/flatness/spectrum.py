"""Largest eigenvalues and trace of the Hessian, the measures of Lemma 4.1 of the paper, without forming it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gam_fused.flatness.points import (
    LossFunction,
    check_positive,
    checked_params,
    derivative_along,
    generator,
    gradient,
    loss_at,
)


class TraceEstimate(NamedTuple):
    """`estimate` of the trace and its `standard_error`, both 0-d float64 tensors."""

    estimate: Tensor
    standard_error: Tensor


def hessian_eigenvalues(
    loss_fn: LossFunction,
    params: Iterable[Tensor],
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
) -> Tensor:
    """The `k` largest eigenvalues (largest algebraically, not in magnitude) of the Hessian, in descending order.

    At a minimum the largest is lambda_max of equation (4): the first-order flatness over rho^2. Computed by Lanczos
    iteration with full reorthogonalisation on products by double backward; found eigenvectors are projected out and the next
    search starts anew, so that multiple eigenvalues are listed as often as they occur.

    Args:
        loss_fn: called once. Double backward goes through every kernel of the model, so kernels without a second derivative
            (some fused attention) must be switched off.
        params: the tensors to differentiate by, N elements in all.
        k: how many, 1 <= k <= N.
        tolerance: a search ends when |H v - lambda v| <= tolerance * |lambda|; the eigenvalue's own error is then at most
            that, and about its square over the gap to the next eigenvalue.
        max_iterations: Hessian-vector products per eigenvalue. Every one keeps a vector of N elements.
        seed: of the random start vectors.

    Returns:
        float64 tensor [k], in units of loss per squared unit of weight, on the first parameter's device.

    Raises:
        ValueError: `k`, `tolerance` or `max_iterations` out of range, or a loss or product that is not finite.

    Warns:
        RuntimeWarning: an eigenvalue did not converge within `max_iterations`; the best estimate, a lower bound up to
            rounding, is returned.
    """
    weights = checked_params(params)
    check_positive(tolerance=tolerance, max_iterations=max_iterations)
    size = sum(p.numel() for p in weights)
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the number of elements, {size}, got {k}")
    product = _hessian_product(loss_fn, weights)
    random = generator(seed)
    found: list[Tensor] = []
    values = []
    for _ in range(k):
        start = torch.randn(size, generator=random, dtype=torch.float64, device="cpu").to(
            weights[0].device, _vector_dtype(weights)
        )
        value, vector = _largest(product, start, found, tolerance, max_iterations)
        values.append(value)
        found.append(vector)
    return torch.stack(values).sort(descending=True).values.to(weights[0].device)


def hessian_trace(loss_fn: LossFunction, params: Iterable[Tensor], samples: int = 50, *, seed: int = 0) -> TraceEstimate:
    """The trace of the Hessian by Hutchinson's estimator: the mean of v . H v over random vectors v of signs.

    For N(0, sigma^2) noise on the weights the expected increase of the loss is sigma^2 / 2 times the trace, to second order.

    Args:
        loss_fn: called once.
        samples: number of Hessian-vector products, at least 2. The error falls as one over its square root; for a
            diagonal Hessian any number is exact.
        seed: of the random signs.

    Returns:
        `TraceEstimate(estimate, standard_error)`, in units of loss per squared unit of weight.

    Raises:
        ValueError: `samples` below 2, or a loss or product that is not finite.
    """
    weights = checked_params(params)
    if samples < 2:
        raise ValueError(f"samples must be at least 2 for a standard error, got {samples}")
    product = _hessian_product(loss_fn, weights)
    random = generator(seed)
    size = sum(p.numel() for p in weights)
    draws = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (size,), generator=random, device="cpu") * 2 - 1
        signs = signs.to(weights[0].device, _vector_dtype(weights))
        draws.append(torch.dot(signs.double(), product(signs).double()))
    values = torch.stack(draws)
    return TraceEstimate(values.mean(), values.std() / samples**0.5)


def _vector_dtype(params: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def _hessian_product(loss_fn: LossFunction, params: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """v -> H v for flat vectors; one graph of the gradient serves every product."""
    with torch.enable_grad():
        grads = gradient(loss_at(loss_fn), params, create_graph=True)
    dtype, device = _vector_dtype(params), params[0].device
    sizes = [p.numel() for p in params]

    def product(vector: Tensor) -> Tensor:
        parts = [v.view_as(p).to(p.device, p.dtype) for v, p in zip(vector.split(sizes), params, strict=True)]
        flat = torch.cat([h.detach().to(device, dtype).reshape(-1) for h in derivative_along(grads, params, parts)])
        if not torch.isfinite(flat).all():
            raise ValueError("the Hessian-vector product is not finite: the loss has no finite curvature at these weights")
        return flat

    return product


def _orthogonalised(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):  # twice is enough: one pass loses orthogonality to rounding
        for b in basis:
            vector = vector - torch.dot(b, vector) * b
    return vector


def _largest(
    product: Callable[[Tensor], Tensor], start: Tensor, found: list[Tensor], tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """The largest eigenpair in the complement of `found`, by Lanczos iteration from `start`."""
    vector = _orthogonalised(start, found)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    limit = min(max_iterations, start.numel() - len(found))
    while True:
        basis.append(vector / vector.norm())
        image = product(basis[-1])
        diagonal.append(float(torch.dot(basis[-1].double(), image.double())))
        vector = _orthogonalised(image, found + basis)
        off = float(vector.norm())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        if beside:
            off_diagonal = torch.tensor(beside, dtype=torch.float64, device="cpu")
            tridiagonal += torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        residual = off * abs(float(vectors[-1, -1]))
        floor = torch.finfo(image.dtype).eps * float(
            values.abs().max()
        )  # below it `vector` is rounding: the space is closed
        converged = residual <= max(tolerance * abs(float(values[-1])), floor) or off <= floor
        if converged or len(basis) >= limit:
            break
        beside.append(off)
    if not converged and limit < start.numel() - len(found):
        warnings.warn(
            f"hessian_eigenvalues: residual {residual:.2g} of eigenvalue {float(values[-1]):.4g} after {limit} products "
            f"is above the tolerance {tolerance:g}; raise max_iterations",
            RuntimeWarning,
            stacklevel=3,
        )
    ritz = torch.stack(basis, dim=1) @ vectors[:, -1].to(basis[0])
    return values[-1], _orthogonalised(ritz, found) / ritz.norm()
