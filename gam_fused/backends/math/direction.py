"""The direction d: h_loss + alpha h_norm (Algorithm 1, line 10), or Algorithm 2's h+ - gamma (h- minus its projection).

`c` is a row of the coefficient table.
"""

from __future__ import annotations

from typing import Any

import torch

from gam_fused.backends.math.lists import Scalar, Tensors, add_scaled_, operand, scale_
from gam_fused.constants import Column


def h_plus(c: Any, g1: Any, last: Any) -> Any:
    """DIRECTION_G1 g1 + DIRECTION_LAST last."""
    return c[Column.DIRECTION_G1] * g1 + c[Column.DIRECTION_LAST] * last


def direction(c: Any, g1: Any, last: Any, folded: Any, *, plus_scale: float, unscale: float) -> Any:
    """d = unscale (plus_scale h+ + DIRECTION_FOLDED folded)."""
    return (plus_scale * h_plus(c, g1, last) + c[Column.DIRECTION_FOLDED] * folded) * unscale


def h_plus_lists(c: Scalar, g1: Tensors, last: Tensors, *like: Tensors) -> Tensors:
    """DIRECTION_G1 g1 + DIRECTION_LAST last, in new tensors. like: where to see shapes if both are missing."""
    plus = torch._foreach_mul(operand(last, g1, *like), c[Column.DIRECTION_LAST])
    if g1:
        add_scaled_(plus, operand(g1, last, *like), c[Column.DIRECTION_G1])
    return plus


def direction_lists(
    c: Scalar, g1: Tensors, last: Tensors, folded: Tensors, plus_scale: Scalar, unscale: Scalar, like: Tensors = ()
) -> Tensors:
    """d = unscale (plus_scale h+ + DIRECTION_FOLDED folded), in new tensors; g1 and folded may be empty."""
    d = h_plus_lists(c, g1, last, folded, like)
    scale_(d, plus_scale * unscale)
    if folded:
        add_scaled_(d, operand(folded, last, g1, like), c[Column.DIRECTION_FOLDED] * unscale)
    return d
