"""Plots of the measures' results with matplotlib, which is imported at the first plot: `pip install matplotlib`.

Every function takes results, draws on `ax` or on the axes of a new figure, and returns the axes: `ax.figure.savefig(...)`.
To show several results in one plot, call the function once for each with a `label`, then `ax.legend()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.flatness.density import SpectralDensity
from gam_fused.flatness.minima import MinimaDensity

LOSS, EIGENVALUE = "loss", "eigenvalue of the Hessian"


def eigenvalues(values: Tensor, *, bins: int = 20, ax: Any = None, label: str | None = None) -> Any:
    """A histogram of the largest eigenvalues, as figure 3 of the paper. `values`: [k], of `hessian_eigenvalues`."""
    ax = _axes(ax)
    ax.hist(_numbers(values), bins=bins, alpha=0.6, label=label)
    return _named(ax, EIGENVALUE, "number of eigenvalues")


def spectral_density(
    result: SpectralDensity, *, width: float | None = None, points: int = 1000, ax: Any = None, label: str | None = None
) -> Any:
    """The density of all eigenvalues, on a logarithmic axis.

    Args:
        result: of `spectral_density`.
        width: standard deviation of the Gaussians, in units of eigenvalues; a hundredth of the spectrum's extent by default.
        points: number of points of the curve.
    """
    ax = _axes(ax)
    low, high = float(result.nodes.min()), float(result.nodes.max())
    width = width or (high - low) / 100 or max(abs(high), 1.0) / 100
    at = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64, device="cpu")
    heights = result.density(at, width)
    ax.plot(_numbers(at), _numbers(heights), label=label)
    ax.set_yscale("log")
    ax.set_ylim(bottom=float(heights.max()) * 1e-7)  # below it there are only the tails of Gaussians
    return _named(ax, EIGENVALUE, "density")


def landscape_1d(losses: Tensor, radius: float = 1.0, *, ax: Any = None, label: str | None = None) -> Any:
    """The loss along one direction. `losses`: [points], of `loss_landscape(..., directions=1, radius=radius)`."""
    ax, ticks = _axes(ax), _ticks(losses, 1, radius)
    ax.plot(_numbers(ticks), _numbers(losses), label=label)
    return _named(ax, "along the direction", LOSS)


def landscape_2d(losses: Tensor, radius: float = 1.0, *, levels: int = 20, ax: Any = None) -> Any:
    """Contours of the loss in a plane. `losses`: [points, points], of `loss_landscape(..., radius=radius)`."""
    ax, ticks = _axes(ax), _ticks(losses, 2, radius)
    lines = ax.contour(_numbers(ticks), _numbers(ticks), _numbers(losses.T), levels=levels)
    ax.figure.colorbar(lines, ax=ax, label=LOSS)
    ax.plot(0, 0, "k+")  # theta
    ax.set_aspect("equal")
    return _named(ax, "along the first direction", "along the second direction")


def landscape_3d(losses: Tensor, radius: float = 1.0, *, ax: Any = None) -> Any:
    """The loss over a plane as a surface, as figure 5 of the paper. `losses`: as for `landscape_2d`; `ax`: of a 3-D plot."""
    ax, ticks = _axes(ax, projection="3d"), _ticks(losses, 2, radius)
    if ax.name != "3d":
        raise ValueError("landscape_3d needs axes with three dimensions: plt.subplot(projection='3d')")
    first, second = torch.meshgrid(ticks, ticks, indexing="ij")
    ax.plot_surface(_numbers(first), _numbers(second), _numbers(losses), cmap="viridis", linewidth=0)
    ax.set_zlabel(LOSS)
    ax.set_box_aspect(None, zoom=0.8)  # room for labels
    return _named(ax, "along the first direction", "along the second direction")


def minima_density(result: MinimaDensity, *, ax: Any = None) -> Any:
    """How many directions have how many local minima and maxima, as figure 2. `result`: of `local_minima_density`."""
    ax = _axes(ax)
    edges = [i - 0.5 for i in range(int(max(result.minima.max(), result.maxima.max())) + 2)]
    ax.hist([_numbers(result.minima), _numbers(result.maxima)], bins=edges, label=["local minima", "local maxima"])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return _named(ax, "number within the radius", "number of directions")


def flatness(
    rhos: Sequence[float], zeroth: Sequence[Any], first: Sequence[Any], *, ax: Any = None, label: str | None = None
) -> Any:
    """R0 (dashed) and R1 (solid) against rho, on logarithmic axes.

    Args:
        rhos: radii; zeroth, first: `zeroth_order_flatness` and `first_order_flatness` at each.
    """
    ax = _axes(ax)
    name = f", {label}" if label else ""
    (line,) = ax.plot(rhos, [float(r) for r in first], "o-", label="R1, first order" + name)
    ax.plot(rhos, [float(r) for r in zeroth], "o--", color=line.get_color(), label="R0, zeroth order" + name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(rhos, [f"{r:g}" for r in rhos], minor=False)
    ax.set_xticks([], minor=True)
    ax.legend()
    return _named(ax, "rho", "flatness, in units of loss")


def _axes(ax: Any, **kind: Any) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "gam_fused.flatness.plots draws with matplotlib, which is missing: pip install matplotlib"
        ) from error
    return plt.figure(layout="constrained").add_subplot(**kind) if ax is None else ax


def _named(ax: Any, x: str, y: str) -> Any:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    return ax


def _ticks(losses: Tensor, dimensions: int, radius: float) -> Tensor:
    if losses.dim() != dimensions or len(set(losses.shape)) != 1:
        raise ValueError(f"losses must have {dimensions} equal dimensions, got shape {tuple(losses.shape)}")
    return torch.linspace(-radius, radius, losses.size(0), dtype=torch.float64, device="cpu")


def _numbers(t: Tensor) -> Any:
    """As an array of numpy's, which matplotlib wants; what is not finite leaves a gap."""
    t = t.detach().to("cpu", torch.float64)
    return torch.where(t.isfinite(), t, math.nan).numpy()
