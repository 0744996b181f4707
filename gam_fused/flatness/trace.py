"""The trace of the Hessian (section 5.4 of the paper) from products with random vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gam_fused.checks import one_of, whole
from gam_fused.flatness.hessian import Hessian
from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.progress import Progress, ProgressArgument
from gam_fused.flatness.vectors import generator

AT_ONCE = 8  # vectors whose products share a pass over the data


class TraceEstimate(NamedTuple):
    """`estimate` of the trace and its `standard_error`, both 0-d float64 tensors."""

    estimate: Tensor
    standard_error: Tensor


def hessian_trace(
    loss_fn: LossFunction,
    params: Parameters = None,
    samples: int = 50,
    *,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    seed: int = 0,
    progress: ProgressArgument = False,
) -> TraceEstimate:
    """The trace of the Hessian, tr H = sum of its eigenvalues, from `samples` Hessian-vector products (section 5.4).

    "hutchinson": the mean of v . H v over random sign vectors v; its error falls as one over the square root of `samples`.

    "hutch++" (Meyer, Musco, Musco & Woodruff 2021): a third of the products finds an orthonormal basis Q of the subspace of
    H's large eigenvalues, a third gives their share tr Q'HQ exactly, and a third is Hutchinson's estimate on the rest. More
    accurate if few eigenvalues are large, as after training. Keeps `samples`/3 vectors of N elements.

    With N(0, sigma^2) noise on the weights, the loss increases by sigma^2 / 2 times the trace on average, to second order.

    Args:
        loss_fn, params: see `gam_fused.flatness`. A plain `loss_fn` is called once.
        samples: number of Hessian-vector products: at least 2, for "hutch++" 6. 2 are exact for a diagonal Hessian.
        method: one of the two above.
        seed: of the random signs.
        progress: True, or a function of (done, total), per product.

    Returns:
        `TraceEstimate(estimate, standard_error)`, float64, in units of loss per squared unit of weight. The error is that of
        the random vectors; for "hutch++", given Q.

    Raises:
        ValueError: `samples` too small, an unknown `method`, or a loss or product that is not finite.
    """
    one_of("method", method, ("hutchinson", "hutch++"))
    least = 2 if method == "hutchinson" else 6
    if whole("samples", samples, minimum=1) < least:
        raise ValueError(f"samples must be at least {least} for a standard error by {method!r}, got {samples}")

    def estimate(loss: Objective) -> TraceEstimate:
        with Progress(progress, samples, "hessian_trace") as bar:
            hessian, random = Hessian(loss, bar), generator(seed)
            if method == "hutchinson":
                return _hutchinson(hessian, random, samples, None)
            third = min(samples // 3, hessian.size)
            q = torch.linalg.qr(torch.cat([hessian @ v for v in _signs(hessian, random, third)], dim=1)).Q
            known = sum((torch.sum(v * (hessian @ v), dtype=torch.float64) for v in q.split(AT_ONCE, dim=1)), start=0.0)
            rest = _hutchinson(hessian, random, samples - 2 * third, q)
            return TraceEstimate(rest.estimate + known, rest.standard_error)

    return measured(loss_fn, params, estimate)


def _hutchinson(hessian: Hessian, random: torch.Generator, samples: int, q: Tensor | None) -> TraceEstimate:
    """Of H, or of H on the complement of the columns of `q`."""
    draws = []
    for v in _signs(hessian, random, samples):
        if q is not None:
            v = _outside(q, v)
        draws.append(torch.sum(v.double() * (hessian @ v).double(), dim=0))
    values = torch.cat(draws)
    return TraceEstimate(values.mean(), values.std() / samples**0.5)


def _outside(q: Tensor, v: Tensor) -> Tensor:
    """`v` without its part in the space of the columns of `q`; in float64, whatever TF32 is allowed, by rows."""
    rows = 1 << 16
    along = sum((a.double().T @ b.double() for a, b in zip(q.split(rows), v.split(rows), strict=True)), start=0.0)
    return torch.cat([(b - a.double() @ along).to(v.dtype) for a, b in zip(q.split(rows), v.split(rows), strict=True)])


def _signs(hessian: Hessian, random: torch.Generator, count: int) -> Iterator[Tensor]:
    """`count` random vectors of signs, as the columns of matrices."""
    for i in range(0, count, AT_ONCE):
        signs = torch.randint(0, 2, (min(AT_ONCE, count - i), hessian.size), generator=random, device="cpu") * 2 - 1
        yield hessian.on_device(signs).T
