"""The whole spectrum of the Hessian as a density, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gam_fused.checks import whole
from gam_fused.flatness.hessian import Hessian
from gam_fused.flatness.lanczos import Krylov
from gam_fused.flatness.objective import LossFunction, Objective, Parameters, measured
from gam_fused.flatness.progress import Progress, ProgressArgument
from gam_fused.flatness.vectors import check_positive, generator


class SpectralDensity(NamedTuple):
    """Quadratures of the spectrum: float64 `nodes` (eigenvalues) and `weights` (fractions of them), [probes, steps].

    Each row of `weights` adds up to 1. If a probe ended early, the rest of its row has weight 0.
    """

    nodes: Tensor
    weights: Tensor

    def density(self, points: Tensor, width: float) -> Tensor:
        """The density at `points` [m], float64 [m]: the mean over probes of Gaussians of standard deviation `width` at the
        nodes. Its integral is 1; its unit is one over that of eigenvalues.

        Raises:
            ValueError: `width` not above 0.
        """
        check_positive(width=width)
        at = points.detach().to("cpu", torch.float64).reshape(-1, 1, 1)
        heights = torch.exp(-0.5 * ((at - self.nodes) / width).square()) / (width * math.sqrt(2 * math.pi))
        return (heights * self.weights).sum(dim=2).mean(dim=1)


def spectral_density(
    loss_fn: LossFunction,
    params: Parameters = None,
    *,
    probes: int = 4,
    steps: int = 80,
    seed: int = 0,
    progress: ProgressArgument = False,
) -> SpectralDensity:
    """All eigenvalues of the Hessian as a density, by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    phi(t) = 1/N sum_i delta(t - lambda_i) is the mean of sum_i (v . u_i)^2 delta(t - lambda_i) over random unit vectors v.
    `steps` of Lanczos iteration from v give a Gauss quadrature of that: nodes are the eigenvalues of the tridiagonal matrix,
    weights the squared first elements of its eigenvectors. The ends of the spectrum are sharp, its bulk has the right
    moments.

    Args:
        loss_fn, params: see `gam_fused.flatness`; N elements in all. A plain `loss_fn` is called once.
        probes: number of random vectors; the spread of their rows indicates the error.
        steps: Hessian-vector products per probe; as many vectors of N elements are kept.
        seed: of the random vectors.
        progress: True, or a function of (done, total), per product.

    Returns:
        `SpectralDensity(nodes, weights)`, float64 on the CPU; nodes in units of loss per squared unit of weight.

    Raises:
        ValueError: `probes` or `steps` below 1, or a loss or product that is not finite.
    """
    whole("probes", probes, minimum=1)
    whole("steps", steps, minimum=1)

    def quadratures(loss: Objective) -> SpectralDensity:
        nodes, weights = (torch.zeros(probes, steps, dtype=torch.float64, device="cpu") for _ in range(2))
        random = generator(seed)
        with Progress(progress, probes * steps, "spectral_density") as bar:
            hessian = Hessian(loss, bar)
            for row in range(probes):
                space = Krylov(hessian, random, min(steps, hessian.size))
                while not (space.closed or space.is_full()):
                    space.extend()
                space.solve()
                nodes[row, : space.size], weights[row, : space.size] = space.values, space.vectors[0].square()
        return SpectralDensity(nodes, weights)

    return measured(loss_fn, params, quadratures)
