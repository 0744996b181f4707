"""The skip decision: a step of which a gradient was not finite moves nothing and is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.constants import Control


def stays(total: Tensor, ascent: int, control: Tensor) -> Tensor:
    """0-d: whether an ascent stays at its base, as its reduction or that of one before it was not finite; noted for those
    after it. The first ascent forgets the step before."""
    bad = ~torch.isfinite(total).all()
    if ascent > 0:
        bad = bad | (control[Control.FOUND_INF] != 0)
    control[Control.FOUND_INF] = bad.to(control.dtype)
    return bad


def close_step(partials: Tensor, control: Tensor) -> Tensor:
    """0-d: whether the update is skipped. Counts the step."""
    skip = (control[Control.FOUND_INF] != 0) | ~torch.isfinite(partials.sum(1)).all()
    control[Control.LAST_SKIPPED] = skip.to(control.dtype)
    control[Control.SKIPPED].add_(skip)
    control[Control.NOISE_STEP].add_(1)
    return skip
