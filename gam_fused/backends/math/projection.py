"""Algorithm 2's projection of h- on h+, and the clipping of d: its scalars, known before elements are visited."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gam_fused.constants import Column, Control


def direction_scale(
    coefficients: Tensor, partials: Tensor, control: Tensor, sqrt: Callable[[Tensor], Tensor] = torch.sqrt
) -> tuple[Tensor, Tensor]:
    """0-d: plus_scale of Algorithm 2, and the factor that undoes the loss scale and clips |d|."""
    total, minus = partials.sum(1), coefficients[0, Column.DIRECTION_FOLDED]
    if len(total) == 6:
        plus_scale = 1 - minus * torch.where(total[0] > 0, total[2] / total[0], 0)
        pp, mp, mm = total.view(3, 2).sum(1)
        squared = plus_scale * plus_scale * pp + 2 * plus_scale * minus * mp + minus * minus * mm
    else:
        plus_scale, squared = torch.ones_like(minus), total.sum()
    norm = sqrt(squared.clamp(min=0)) / control[Control.LOSS_SCALE]
    max_norm = control[Control.MAX_NORM]
    clip = torch.where(max_norm > 0, (max_norm / (norm + 1e-6)).clamp(max=1), 1)
    return plus_scale, clip / control[Control.LOSS_SCALE]
