"""The baselines of the benchmarks compute what FusedGAM computes, so that their times compare the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import Settings
from benchmarks.contestants import AUTHORS, BASELINES, fused_gam

CASES = [
    (by, method)
    for by in BASELINES
    for method in ("sam", "accelerated", "finite_difference")
    if (by, method) != (AUTHORS, "finite_difference")  # the authors published no code for it
]


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


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize(("by", "method"), CASES)
def test_baseline_equals_the_optimizer(by, method, base):
    theirs, ours = Problem(), Problem()
    s = Settings(base=base, base_options={"lr": 0.05}, rho_prime=0.05, gamma=0.3)
    baseline = BASELINES[by](theirs.params, s, method)
    optimizer = fused_gam(ours.params, method, s)
    for _ in range(10):
        baseline.step(theirs.gradients)
        optimizer.step(ours.loss)
    for a, b in zip(theirs.params, ours.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours.params[0], Problem().params[0])
