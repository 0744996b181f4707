"""How many numbers a step reads and writes per parameter, from the operands of the kernels that it launches."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import batch, make, mlp, regression

from gam_fused.backends.operands import KERNELS

FIRST = "finite_difference"


def moved(name, o) -> int:
    """Lists of N numbers that one launch reads and writes, each once."""
    there = {field: len(getattr(o, field)) > 0 for field in KERNELS[name].lists}
    if name == "perturb_":
        return 2 + there["x"] + there["y"] + 2 * there["folded"] + there["backup"]  # from theta or a base, to theta
    if name == "combined_update_":
        state = there["state1"] + there["state2"] + there["state3"]
        return 2 + there["g1"] + there["last"] + there["folded"] + 2 * state
    return sum(there.values())


@pytest.mark.parametrize(
    ("options", "per_parameter"),
    [
        ({"method": "sam"}, 11),
        ({"method": FIRST, "max_ratio": None}, 24),
        ({"method": FIRST, "max_ratio": 0.5}, 25),  # Algorithm 2's sums and update, but nothing is folded on the way
        ({"method": "accelerated"}, 27),
        ({"method": FIRST, "max_ratio": None, "flatness_fraction": 0.5}, 25),  # h_loss is read once more, by the guard
        ({"method": FIRST, "max_ratio": 0.5, "flatness_fraction": 0.5}, 25),
        ({"method": "sam", "flatness_fraction": 0.5}, 15),  # g0 - q0 is folded, guarded and added
    ],
)
def test_reads_and_writes_of_a_step(monkeypatch, options, per_parameter):
    model, data = mlp(), batch(8)
    optimizer = make(model.parameters(), momentum=0.9, **options)
    step = lambda: optimizer.step(lambda b: regression(model, *b)(), data)  # noqa: E731
    step()
    counts = []
    (block,) = optimizer.session.plan.blocks
    for name in KERNELS:
        kernel = getattr(block.kernels, name)
        monkeypatch.setattr(block.kernels, name, lambda o, n=name, k=kernel: (counts.append(moved(n, o)), k(o)))
    step()
    assert sum(counts) == per_parameter, counts
    assert torch.isfinite(next(model.parameters())).all()
