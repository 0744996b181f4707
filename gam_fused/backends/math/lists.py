"""Arithmetic of the torch backend: lists of tensors in compute precision (float32 for storage up to 32 bits, else float64).

On the CPU a kernel reads its scalars once. Elsewhere they stay 0-d tensors, so that the host waits for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = Any  # a list or tuple of tensors: torch._foreach_* take either and return one or the other
Scalar = Any  # a float on the CPU, a 0-d tensor elsewhere


def on_host(t: Tensor) -> bool:
    """Whether the host can read `t` without waiting for a device."""
    return t.device.type == "cpu"


def scalars(t: Tensor) -> Any:
    """`t` to be indexed down to scalars."""
    return t.tolist() if on_host(t) else t


def is_compute(t: Tensor) -> bool:
    return t.dtype in (torch.float32, torch.float64)


def up(tensors: Tensors) -> Tensors:
    return [t if is_compute(t) else t.float() for t in tensors]


def operand(tensors: Tensors, *like: Tensors) -> Tensors:
    """The tensors in compute precision, zeros where one is missing; of its shape then the one in `like` that is not."""
    if any(t is None for t in tensors):
        columns = zip(tensors, *(other for other in like if other), strict=True)
        tensors = [c[0] if c[0] is not None else torch.zeros_like(next(t for t in c if t is not None)) for c in columns]
    return up(tensors)


def difference(x: Tensors, y: Tensors) -> Tensors:
    return torch._foreach_sub(operand(x, y), operand(y, x)) if y else operand(x)


def times(steps: Tensors, factors: Tensors) -> Tensors:
    """steps * factors; 0 where a step is 0, though its factor (a weight) may be infinite."""
    return [torch.where(s == 0, s, s * f) for s, f in zip(steps, factors, strict=True)]


def change_of(to: Tensors, origin: Tensors) -> Tensors:
    """to - origin, where infinite weights that stay have not moved: both ends are cut to finite numbers."""
    most = torch.finfo(to[0].dtype).max
    ends = (torch._foreach_clamp_max(torch._foreach_clamp_min(values, -most), most) for values in (to, origin))
    return torch._foreach_sub(*ends)


def add_scaled_(targets: Tensors, values: Tensors, c: Scalar) -> None:
    """targets += c * values."""
    if isinstance(c, float):
        torch._foreach_add_(targets, values, alpha=c)
    else:
        torch._foreach_add_(targets, torch._foreach_mul(values, c))


def add_scalar_(targets: Tensors, c: Scalar) -> None:
    if isinstance(c, float):
        torch._foreach_add_(targets, c)
    else:  # given to `torch._foreach_add_`, a 0-d tensor is asked for its number
        torch.ops.aten._foreach_add_.Tensor(targets, c)


def scale_(targets: Tensors, c: Scalar) -> None:
    if not isinstance(c, float) or c != 1.0:
        torch._foreach_mul_(targets, c)


def select(condition: Scalar, a: Tensors, b: Tensors) -> Tensors:
    """`a` where the condition holds (one for all tensors, or one for each), else `b`; never copies of both."""
    if isinstance(condition, bool):
        return a if condition else b
    conditions = condition if isinstance(condition, (list, tuple)) else [condition] * len(a)
    return [
        (p if c else q) if isinstance(c, bool) else torch.where(c, p, q) for c, p, q in zip(conditions, a, b, strict=True)
    ]


def sum_of_squares(values: Tensors) -> Tensor:
    """0-d float64; squares are float64 too, so they neither overflow nor vanish."""
    if on_host(values[0]):
        norm: Tensor = torch.linalg.vector_norm(_flat(values))
        return norm.square()
    norms = torch._foreach_norm([v for v in values if v.numel()] or [values[0].new_zeros(1)], dtype=torch.float64)
    return torch.stack(norms).square().sum()


def dot(left: Tensors, right: Tensors) -> Tensor:
    """0-d float64."""
    if on_host(left[0]):
        return _flat(left).mul(_flat(right)).sum()
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]).sum()


def _flat(values: Tensors) -> Tensor:
    """All elements in one float64 vector."""
    rows = [v if v.dim() == 1 else v.reshape(-1) for v in values]
    return (torch.cat(rows) if len(rows) > 1 else rows[0]).double()


def workspace(targets: Tensors) -> Tensors:
    """What to compute new values of `targets` in, in compute precision, for `commit`: themselves where that is safe.

    On the CPU nothing that is to be skipped gets as far as computing; elsewhere only the device knows.
    """
    if on_host(targets[0]):
        return up(targets)
    return up(targets) if not is_compute(targets[0]) else torch._foreach_mul(targets, 1)
