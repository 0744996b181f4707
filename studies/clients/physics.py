"""A physics-informed network: u'' = -pi^2 sin(pi x) on [-1, 1], u(-1) = u(1) = 0. The solution is sin(pi x)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

POINTS = 64


def net(width: int = 32) -> nn.Module:
    """[n, 1] -> [n, 1]: four linear layers."""
    hidden = [nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def grid() -> Tensor:
    """The points [n, 1] that the network is trained and judged on."""
    return torch.linspace(-1, 1, POINTS).unsqueeze(1)


def batches(seed: int) -> Iterator[Tensor]:
    """The whole grid every time, in another order, so that a part of a batch covers the interval as well."""
    random, points = torch.Generator().manual_seed(seed), grid()
    while True:
        yield points[torch.randperm(POINTS, generator=random)]


@torch.enable_grad()  # when it is judged too
def loss(model: nn.Module, points: Tensor) -> Tensor:
    """Mean squares of the equation's residual and of the boundary's."""
    x = points.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    residual = curvature + math.pi**2 * torch.sin(math.pi * x)
    return residual.square().mean() + model(x.new_tensor([[-1.0], [1.0]])).square().mean()
