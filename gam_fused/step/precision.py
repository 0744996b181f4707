"""Does the finite difference's probe survive the forward pass?

The probe moves each of N weights by about delta = rho'/sqrt(N). A forward pass that casts weights to bf16 (autocast, bf16
parameters) or TF32 rounds to a spacing of about u = 0.72 eps |theta|/sqrt(N), where 0.72 is the mean of a mantissa's lower
end over its value. Where u is the smaller, both ends of the difference carry a rounding error of u/sqrt(12), so that the
noise is u/sqrt(6); where it is the larger, a weight moves by a whole u with probability delta/u, and the noise is
sqrt(u delta). The Hessian-vector product suffers far less than the probe, since rounding noise meets little curvature:
studies/results/probe_cosine.csv has what was measured.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.operands import SquaredNorm
from gam_fused.memory.blocks import Block
from gam_fused.step.record import Record
from gam_fused.torch_private import dtype_cast_to, forward_dtypes

TF32_EPS = 2.0**-10
CLEARLY_NOISY = 4.0  # above, cosines with the exact product below 0.95 were seen; see docs/methods.md
_INSIDE = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def noise_ratio(record: Record, autocast_eps: float) -> Tensor:
    """Rounding noise over probe, 0-d float64 on the device: an estimate from |theta|, rho' and the dtype of the forward.

    Low-precision parameters report what was stored instead: with stochastic rounding the realised perturbation is the
    intended one plus noise, so the ratio is sqrt(realised^2 - intended^2)/intended.
    """
    block = max(record.blocks, key=lambda b: torch.finfo(b.dtype).eps)
    radius = record.first_radius
    if block.dtype in (torch.float16, torch.bfloat16):
        realised = record.shards.totals(record.blocks, lambda b: b.part("realised", 0).sum().reshape(1))
        realised = realised[0].to(block.shared.device)
        return (realised - radius**2).clamp(min=0).sqrt() / max(radius, 1e-300)
    spacing = 0.72 * _forward_eps(record, autocast_eps) * _theta_norm(record)
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

    def look(self, record: Record) -> None:
        """After each step: start the estimate at the first, warn when it has arrived."""
        if self._done or not record.ascents or not record.method.probes:
            return
        if self._pending is None:
            if _forward_eps(record, self.autocast_eps) < 1e-5:
                self._done = True
                return
            ratio = noise_ratio(record, self.autocast_eps)
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
                _warn(record.settings.rho_prime, float(value))


def _warn(rho_prime: float, ratio: float) -> None:
    """Where the user's code has called the step; before Python 3.12, which cannot skip frames by file, from here."""
    text = (
        f"FusedGAM: the finite difference's probe is below the precision of the forward pass: at rho_prime={rho_prime:g}, "
        f"rounding noise is {ratio:.1f} times as large as the probe. Raise rho_prime, or run the forward pass in float32"
    )
    if sys.version_info >= (3, 12):
        warnings.warn(text, skip_file_prefixes=_INSIDE)
    else:
        warnings.warn(text, stacklevel=2)


def _eps_of_casts(root: Any, limit: int = 20_000) -> float:
    """Spacing at 1 of the coarsest dtype that the graph below `root` casts a leaf to; 0 where it casts none."""
    eps, waiting, known = 0.0, [root], {root}
    while waiting and len(known) < limit:
        node = waiting.pop()
        below = [n for n, _ in node.next_functions if n is not None]
        if node.name() == "ToCopyBackward0" and any(hasattr(n, "variable") for n in below):
            dtype = dtype_cast_to(node)
            eps = max(eps, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)
        waiting += [n for n in below if n not in known]
        known.update(below)
    return eps


def _forward_eps(record: Record, autocast_eps: float) -> float:
    """Spacing at 1 of the coarsest dtype that weights are cast to in the forward pass, as far as it can be seen."""
    dtypes = {b.dtype for b in record.blocks} | forward_dtypes(record.fsdp_modules)
    eps = max(autocast_eps, *(torch.finfo(dtype).eps for dtype in dtypes))
    return max(eps, TF32_EPS) if record.blocks[0].shared.device.type == "cuda" and _tf32_is_allowed() else eps


def _tf32_is_allowed() -> bool:
    """By these switches, which show what the older `allow_tf32` was set to as well; the other way round torch raises."""
    kinds = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None))
    return any(getattr(kind, "fp32_precision", None) == "tf32" for kind in kinds)


def _theta_norm(record: Record) -> Tensor:
    def square(b: Block) -> Tensor:
        partials = torch.zeros(2, 1, dtype=torch.float64, device=b.shared.device)
        b.kernels.squared_norm(SquaredNorm(layout=b.layout, x=b.theta, partials=partials))
        return partials[0].sum().reshape(1)

    return record.shards.totals(record.blocks, square)[0].sqrt()
