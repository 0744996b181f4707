"""Lists of tensors as one vector: norms, random directions, weights moved along them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss, gradient or curvature that is not finite where it has to be."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of `dtype` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_positive(**values: float) -> None:
    """ValueError naming the first argument that is not finite and above zero."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value}")


def check_finite(value: float) -> None:
    """NotFiniteError unless a loss or a norm at the present weights is a number."""
    if not math.isfinite(value):
        raise NotFiniteError(f"the objective is not finite at the present weights: {value}")


def norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm over all elements of all tensors, added up in float64."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def generator(seed: int) -> torch.Generator:
    """A separate CPU generator: results do not depend on the device, and the global random state is untouched."""
    return torch.Generator("cpu").manual_seed(seed)


def random_direction(params: Sequence[Tensor], random: torch.Generator) -> list[Tensor]:
    """Standard normal numbers shaped like `params`."""
    return [torch.randn(p.shape, generator=random, dtype=torch.float64, device="cpu").to(p.device, p.dtype) for p in params]


def move_to(params: Sequence[Tensor], base: Sequence[Tensor], *steps: tuple[float, Sequence[Tensor]]) -> None:
    """params <- base + sum of coefficient * direction over `steps`."""
    with torch.no_grad():
        for i, (p, b) in enumerate(zip(params, base, strict=True)):
            p.copy_(b)
            for coefficient, direction in steps:
                p.add_(direction[i], alpha=coefficient)
