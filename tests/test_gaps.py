"""Parameters with other numbers between their elements: compiled backends read storage order, so they must not get them."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, backend_params, make

from gam_fused import backends
from gam_fused.backends import cpp
from gam_fused.backends.operands import Restore
from gam_fused.backends.tensor_lists import Layout, TensorList

CUTS = {
    "columns": lambda t: t[:, ::2],
    "rows": lambda t: t[::3],
    "both, transposed": lambda t: t[1::2, ::3].t(),
    "one column": lambda t: t[:, 3],
}
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "foreign": (torch.optim.Adagrad, {}),
}


def train(p: torch.nn.Parameter, method: str, base: str, backend: str, last: float = 1.0) -> None:
    """Two steps, then one whose loss is `last` times too large."""
    kind, options = BASES[base]
    factors, count = [1.0, 1.0, last], torch.arange(1.0, 1 + p.numel(), dtype=p.dtype).view(p.shape)
    optimizer = make([p], kind, method, lr=0.05, backend=backend, **options)
    for factor in factors:
        optimizer.step(lambda factor=factor: ((p - 1).pow(4) / count + p.sin()).sum() * factor)


@pytest.mark.parametrize("backend", [*backend_params(("cpp", "torch", "reference")), "auto"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_neighbours_keep_their_bits_and_the_parameter_is_updated(method, base, cut, backend):
    """Whether the last step is made or skipped."""
    for last in (1.0, float("nan")):
        storage = torch.randn(10, 8, dtype=torch.float64)
        mine = CUTS[cut](storage)
        inside = CUTS[cut](torch.arange(80).view(10, 8)).reshape(-1)
        before, dense = storage.clone(), torch.nn.Parameter(mine.clone(memory_format=torch.contiguous_format))
        p = torch.nn.Parameter(mine)
        assert p.data_ptr() == mine.data_ptr()
        train(p, method, base, backend, last)
        train(dense, method, base, "reference", last)
        outside = torch.ones(80, dtype=torch.bool)
        outside[inside] = False
        assert torch.equal(storage.view(-1)[outside], before.view(-1)[outside])
        assert not torch.equal(mine, CUTS[cut](before))
        torch.testing.assert_close(mine, dense.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", CUTS)
def test_a_layer_with_gaps_beside_one_without(cut):
    """Each goes to the backend that serves it."""
    storage = torch.randn(10, 8)
    gaps, plain = torch.nn.Parameter(CUTS[cut](storage)), torch.nn.Parameter(torch.randn(5))
    optimizer = make([gaps, plain])
    before = storage.clone()
    optimizer.step(lambda: gaps.square().sum() * plain.square().sum())
    kept = CUTS[cut](torch.zeros(10, 8, dtype=torch.bool).fill_(True)).shape.numel()
    assert int((storage == before).sum()) >= 80 - kept
    assert not torch.equal(gaps.detach(), CUTS[cut](before))
    chosen = {block.dense: block.kernels for block in optimizer.session.plan.blocks}
    assert chosen[False] is backends._BACKENDS["torch"][0]


@pytest.mark.skipif(bool(cpp.reason()), reason=cpp.reason() or "built")
@pytest.mark.parametrize("cut", CUTS)
def test_a_compiled_backend_that_is_given_one_refuses_it(cut):
    """Before it writes anything."""
    storage = torch.zeros(10, 8)
    theta = CUTS[cut](storage)
    lists = {"theta": TensorList([theta]), "backup": TensorList([torch.ones(theta.shape)])}
    record = Restore(layout=Layout([theta.numel()], [0], [True]), **lists)
    with pytest.raises(ValueError, match=r"theta\[0\] has shape .*it has gaps or overlaps"):
        cpp.restore_(record)
    assert not storage.any()
