"""Does the finite difference's probe survive the forward pass?

The probe moves each of N weights by about delta = rho'/sqrt(N). A forward pass that casts weights to bf16 (autocast, bf16
parameters) or TF32 rounds to a spacing of about u = 0.72 eps |theta|/sqrt(N), where 0.72 is the mean of a mantissa's lower
end over its value. Where u is the smaller, both ends of the difference carry a rounding error of u/sqrt(12), so that the
noise is u/sqrt(6); where it is the larger, a weight moves by a whole u with probability delta/u, and the noise is
sqrt(u delta). The Hessian-vector product suffers far less than the probe, since rounding noise meets little curvature:
benchmarks/results/probe_cosine.csv has what was measured.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import gam_fused
from gam_fused.backends.operands import SquaredNorm
from gam_fused.parallel.dtensor import forward_dtypes

if TYPE_CHECKING:
    from gam_fused.memory.plan import Block
    from gam_fused.optimizer import FusedGAM
    from gam_fused.step.step import Step

TF32_EPS = 2.0**-10
CLEARLY_NOISY = 4.0  # above, cosines with the exact product below 0.95 were seen; see README's table of rho_prime


def noise_ratio(optimizer: FusedGAM, step: Step) -> Tensor:
    """Rounding noise over probe, 0-d float64 on the device: an estimate from |theta|, rho' and the dtype of the forward.

    Low-precision parameters report what was stored instead: with stochastic rounding the realised perturbation is the
    intended one plus noise, so the ratio is sqrt(realised^2 - intended^2)/intended.
    """
    block = max(step.blocks, key=lambda b: torch.finfo(b.dtype).eps)
    radius = _probe_radius(optimizer)
    if block.dtype in (torch.float16, torch.bfloat16):
        realised = step.plan.shards.totals(step.blocks, lambda b: b.part("realised", 0).sum().reshape(1))
        realised = realised[0].to(block.shared.device)
        return (realised - radius**2).clamp(min=0).sqrt() / max(radius, 1e-300)
    spacing = 0.72 * _forward_eps(optimizer, block.shared.device) * _theta_norm(step)
    ratio = spacing / max(radius, 1e-300)
    return torch.where(ratio < 6.0, ratio / math.sqrt(6.0), ratio.sqrt())


class Watch:
    """Warns once when the probe is clearly below the precision of the forward pass, without making the host wait."""

    def __init__(self) -> None:
        self.autocast_eps = 0.0
        self._pending: tuple[Tensor, Callable[[], bool]] | None = None
        self._seen = self._done = False

    def see(self, loss: Any) -> None:
        """In the first pass of all: what autocast, or the model itself, casts weights to, as autograd has recorded it.

        A hook on the module would see more, but makes torch.compile compile twice.
        """
        if not self._seen:
            self._seen = True
            if isinstance(loss, Tensor) and loss.grad_fn is not None:
                self.autocast_eps = _eps_of_casts(loss.grad_fn)

    def look(self, optimizer: FusedGAM, step: Step) -> None:
        """After each step: start the estimate at the first, warn when it has arrived."""
        if self._done or not step.ascents or optimizer.method in ("sam", "exact"):
            return
        if self._pending is None:
            if _forward_eps(optimizer, step.blocks[0].shared.device) < 1e-5:
                self._done = True
                return
            ratio = noise_ratio(optimizer, step)
            if ratio.device.type == "cuda":
                host = torch.empty((), dtype=ratio.dtype, pin_memory=True, device="cpu")
                host.copy_(ratio, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(ratio.device))  # the copy's: the current device may be another
                self._pending = (host, event.query)
                return
            self._pending = (ratio, lambda: True)
        value, has_arrived = self._pending
        if has_arrived():
            self._done = True
            if float(value) > CLEARLY_NOISY:
                warnings.warn(
                    f"FusedGAM: the finite difference's probe is below the precision of the forward pass: rho_prime="
                    f"{optimizer.rho_prime:g} makes {float(value):.1f} times as much rounding noise as probe. Raise "
                    "rho_prime, or run the forward in float32",
                    stacklevel=_frames_to_the_caller(),
                )


def _frames_to_the_caller() -> int:
    """How far above the function that asks the first frame lies that is neither torch's nor this package's."""
    inside = tuple(f"{Path(module.__file__).parent}{os.sep}" for module in (torch, gam_fused) if module.__file__)
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        depth, frame = depth + 1, frame.f_back
    return depth


def _eps_of_casts(root: Any, limit: int = 20_000) -> float:
    """Spacing at 1 of the coarsest dtype that the graph below `root` casts a leaf to; 0 where it casts none."""
    eps, waiting, known = 0.0, [root], {root}
    while waiting and len(known) < limit:
        node = waiting.pop()
        below = [n for n, _ in node.next_functions if n is not None]
        if node.name() == "ToCopyBackward0" and any(hasattr(n, "variable") for n in below):
            dtype = node._input_metadata[0].dtype
            eps = max(eps, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)
        waiting += [n for n in below if n not in known]
        known.update(below)
    return eps


def _probe_radius(optimizer: FusedGAM) -> float:
    if optimizer.method in ("sam", "exact"):
        return max(float(g[optimizer.rho_key]) for g in optimizer.param_groups)
    return float(optimizer.rho_prime)


def _forward_eps(optimizer: FusedGAM, device: torch.device) -> float:
    """Spacing at 1 of the coarsest dtype that weights are cast to in the forward pass, as far as it can be seen."""
    plan = optimizer._plan
    dtypes = {b.dtype for b in plan.blocks} | forward_dtypes(plan.fsdp_modules)
    eps = max(optimizer._precision_watch.autocast_eps, *(torch.finfo(dtype).eps for dtype in dtypes))
    return max(eps, TF32_EPS) if device.type == "cuda" and _tf32_is_allowed() else eps


def _tf32_is_allowed() -> bool:
    """By these switches, which show what the older `allow_tf32` was set to as well; the other way round torch raises."""
    cudnn: Any = torch.backends.cudnn
    return any(kind.fp32_precision == "tf32" for kind in (torch.backends.cuda.matmul, cudnn.conv))


def _theta_norm(step: Step) -> Tensor:
    def square(b: Block) -> Tensor:
        partials = torch.zeros(2, b.layout.chunks, dtype=torch.float64, device=b.shared.device)
        b.kernels.squared_norm(SquaredNorm(layout=b.layout, x=b.theta, partials=partials))
        return partials[0].sum().reshape(1)

    return step.plan.shards.totals(step.blocks, square)[0].sqrt()
