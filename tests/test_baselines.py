"""The baselines of the benchmarks compute what FusedGAM computes, so that their times compare the same thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import AuthorsGAM, AuthorsSAM, Foreach, Settings
from benchmarks.contestants import fused_gam

BASELINES = {
    "authors' order, accelerated": AuthorsGAM,
    "authors' order, accelerated, zeroing": lambda params, settings: AuthorsGAM(params, settings, zero_and_accumulate=True),
    "authors' order, sam": AuthorsSAM,
    **{f"foreach, {m}": lambda params, s, m=m: Foreach(params, s, m) for m in ("sam", "finite_difference", "accelerated")},
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


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_equals_the_optimizer(name, base):
    theirs, ours = Problem(), Problem()
    s = Settings(base=base, base_options={"lr": 0.05}, rho_prime=0.05, gamma=0.3)
    baseline = BASELINES[name](theirs.params, s)
    optimizer = fused_gam(ours.params, name.split(", ")[1], s)
    for _ in range(10):
        baseline.step(theirs.gradients)
        optimizer.step(ours.loss)
    for a, b in zip(theirs.params, ours.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours.params[0], Problem().params[0])
