"""A closure that gives a parameter other memory: kernels never follow the gradient of it."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, PASSES, backend_params, bits, make
from torch import nn

OTHER = {"smaller": (3,), "as small": (3, 2), "larger": (50, 4)}


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("method", "k"), [(method, k) for method in METHODS for k in range(PASSES[method])])
@pytest.mark.parametrize("shape", OTHER.values(), ids=OTHER.keys())
def test_gradients_of_other_memory_are_not_read(monkeypatch, method, k, backend, shape):
    """A kernel reads as many elements as the parameter had before the step: of fewer, it would read past the end."""
    monkeypatch.setattr("gam_fused.backends.checks.ALWAYS", False)  # as users run it
    p = nn.Parameter(torch.ones(20, 4))
    optimizer, calls = make([p], method=method, backend=backend, lr=0.01), []

    def closure():
        calls.append(1)
        if len(calls) == 2 * PASSES[method] + k + 1:
            p.data = torch.ones(shape)
        return (p.square() + p.sin()).sum()

    for _ in range(2):
        optimizer.step(closure)
    before = bits(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(.*other memory"):
        optimizer.step(closure)
    assert torch.equal(bits(p), before)
