"""What is known of the direction before elements are visited: Algorithm 2's projection of h- on h+, or the bound on the
flatness term; and the clipping of d."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gam_fused.constants import Column, Control

Sqrt = Callable[[Tensor], Tensor]
_BOUND = 1e30  # where alpha is infinite: a number that float32 can hold


def direction_scale(
    coefficients: Tensor, partials: Tensor, control: Tensor, sqrt: Sqrt = torch.sqrt
) -> tuple[Tensor, Tensor]:
    """0-d: plus_scale, the weight of h+ in d, and the factor that undoes the loss scale and clips |d|."""
    total, row = partials.sum(1), coefficients[0]
    minus = row[Column.DIRECTION_FOLDED]
    if len(total) == 6:
        projecting = 1 - minus * torch.where(total[0] > 0, total[2] / total[0], 0)
        plus_scale = torch.where(row[Column.MAX_RATIO] > 0, bounded_scale(row, total, control, sqrt), projecting)
        pp, mp, mm = total.view(3, 2).sum(1)
        squared = plus_scale * plus_scale * pp + 2 * plus_scale * minus * mp + minus * minus * mm
    else:
        plus_scale, squared = torch.ones_like(minus), total.sum()
    norm = sqrt(squared.clamp(min=0)) / control[Control.LOSS_SCALE]
    max_norm = control[Control.MAX_NORM]
    clip = torch.where(max_norm > 0, (max_norm / (norm + 1e-6)).clamp(max=1), 1)
    return plus_scale, clip / control[Control.LOSS_SCALE]


def bounded_scale(row: Tensor, total: Tensor, control: Tensor, sqrt: Sqrt = torch.sqrt) -> Tensor:
    """0-d: alpha' = min(alpha, max_ratio |h_loss| / (|h_norm| + xi)), with h- = h_loss and h+ = h_norm.

    Args:
        row: of the coefficient table, the first. total: six sums.
    """
    norm = sqrt(total[0]) / control[Control.LOSS_SCALE] + control[Control.EPS]
    bound = row[Column.MAX_RATIO] * (sqrt(total[4]) / control[Control.LOSS_SCALE]) / norm
    return torch.minimum(row[Column.ALPHA], torch.where(norm > 0, bound, _BOUND)).clamp(max=_BOUND)
