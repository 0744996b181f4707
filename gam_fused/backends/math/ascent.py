"""Ascents: lines 6 and 7 of Algorithm 1, with the gradients of appendix D."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gam_fused.constants import Column, Control


def ascent_scales(
    coefficients: Tensor, total: Tensor, control: Tensor, ascent: int, sqrt: Callable[[Tensor], Tensor] = torch.sqrt
) -> Tensor:
    """radius / (|x| + xi) of each group, for gradients that are LOSS_SCALE times too large; `total[0]`: their squares' sum.

    Along a zero gradient nothing moves, whatever xi: 0 in place of a division by zero, and a bound float32 can hold.
    """
    norm = sqrt(total[0]) / control[Control.LOSS_SCALE] + control[Control.EPS]
    scale = coefficients[:, Column.RADIUS_0 + ascent] / norm / control[Control.LOSS_SCALE]
    return torch.where(norm > 0, scale, 0.0).clamp(-3e38, 3e38)
