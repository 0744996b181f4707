"""The baselines of the benchmarks compute what FusedGAM computes, so that their times compare the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import AuthorsGAM, ForeachGAM, Settings
from benchmarks.shapes import resnet50
from gam_fused import FusedGAM

SETTINGS = Settings(lr=0.05, gamma=0.3)
BASELINES = {
    "authors": AuthorsGAM,
    "authors-zeroing": lambda params, settings: AuthorsGAM(params, settings, zero_and_accumulate=True),
    "foreach": ForeachGAM,
}


class Problem:
    """A small loss in float64 with curvature in every direction."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in (3, 5)]
        self.matrix = torch.randn(8, 8, generator=generator, dtype=torch.float64)

    def loss(self) -> torch.Tensor:
        return (self.matrix @ torch.cat(self.params)).sin().square().sum()

    def gradients(self) -> list[torch.Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(self.loss(), self.params))


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_equals_accelerated(name):
    theirs, ours = Problem(), Problem()
    s = SETTINGS
    baseline = BASELINES[name](theirs.params, s)
    optimizer = FusedGAM(
        ours.params,
        torch.optim.SGD,
        method="accelerated",
        rho=s.rho,
        rho_prime=s.rho_prime,
        alpha=s.alpha,
        beta=(1.0, 1 - s.beta),
        gamma=s.gamma,
        lr=s.lr,
        momentum=s.momentum,
        weight_decay=s.weight_decay,
    )
    for _ in range(10):
        baseline.step(theirs.gradients)
        optimizer.step(ours.loss)
    for a, b in zip(theirs.params, ours.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours.params[0], Problem().params[0])


def test_resnet50_shapes_are_those_of_the_design():
    shapes = resnet50()
    assert len(shapes) == 161
    assert sum(torch.Size(s).numel() for s in shapes) == 25_557_032
