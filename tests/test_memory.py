"""Scratch of a step beyond plain SGD-momentum's theta, gradient and momentum: docs/design.md, section 4, measured."""

from __future__ import annotations

import weakref

import pytest
import torch
from gam_helpers import make, mlp

from benchmarks.clock import Clock
from gam_fused import FusedGAM

N = 1 << 20
PLAIN = 2  # gradient and momentum, in units of N; theta was there before


def peak_of_first_step(method: str, dtype: torch.dtype, max_ratio: float | None) -> float:
    """Largest amount of memory that a first step holds beyond what was there before, in tensors of N elements."""
    parameter = torch.nn.Parameter(torch.randn(N, dtype=dtype))
    optimizer = FusedGAM([parameter], torch.optim.SGD, lr=0.1, momentum=0.9, method=method, max_ratio=max_ratio)
    factor = torch.rand(N, dtype=dtype)

    def closure() -> float:
        parameter.grad = factor * parameter.detach()
        return 0.0

    return Clock(torch.device("cpu")).peak(lambda: optimizer.step(closure)) / (dtype.itemsize * N)


@pytest.mark.parametrize(
    ("method", "max_ratio", "scratch"),
    [("sam", None, 1), ("finite_difference", None, 2), ("finite_difference", 0.1, 3), ("accelerated", None, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scratch_is_what_the_design_says(method, max_ratio, scratch, dtype):
    assert peak_of_first_step(method, dtype, max_ratio) == pytest.approx(PLAIN + scratch, abs=0.1)


def test_the_batch_is_not_kept_until_the_next_step():
    model = mlp()
    optimizer = make(model.parameters())
    x = torch.ones(4, 3)
    gone = weakref.ref(x)
    optimizer.step(lambda x=x: model(x).square().sum())
    del x
    assert gone() is None
    assert optimizer.diagnostics()["loss"] > 0
