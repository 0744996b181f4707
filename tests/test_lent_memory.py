"""Gradients and losses in memory that the next pass takes back without a word, as CUDA graphs of torch.compile do."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from gam_helpers import METHODS, batch, make, mlp, same, weights

from gam_fused import torch_private
from gam_fused.memory import gradients
from gam_fused.step import closures
from gam_fused.transaction import other_gradients

FIRST_ORDER = [m for m in METHODS if m != "exact"]


class Graph:
    """A forward and backward that gives its results in the same memory every time, each time as new tensors."""

    def __init__(self, model, x, y):
        self.model, self.x, self.y = model, x, y
        self._memory: dict[int, np.ndarray] = {}

    def lend(self, place: int, t: torch.Tensor) -> torch.Tensor:
        memory = self._memory.setdefault(place, np.zeros(t.shape, dtype=np.float32))
        memory[...] = t.detach().numpy()
        return torch.from_numpy(memory)

    def __call__(self):
        out = self.model(self.x)
        loss, params = (out - self.y).square().mean(), list(self.model.parameters())
        for i, (p, g) in enumerate(zip(params, torch.autograd.grad(loss, params), strict=True)):
            p.grad = self.lend(i, g)
        return self.lend(-1, loss), self.lend(-2, out)


@pytest.fixture
def graphs(monkeypatch):
    for module in (gradients, closures, other_gradients):
        monkeypatch.setattr(module, "runs_cuda_graphs", lambda device: True)


def plain_closure(model, x, y):
    def closure():
        model.zero_grad()
        out = model(x)
        loss = (out - y).square().mean()
        loss.backward()
        return loss, out

    return closure


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_steps_are_those_of_memory_that_stays(graphs, method, base):
    ends = []
    for kind in (Graph, plain_closure):
        model = mlp()
        optimizer = make(model.parameters(), base, method, lr=0.05, backend="torch")
        closure = kind(model, *batch())
        returned = [optimizer.step(closure) for _ in range(3)]
        told = optimizer.diagnostics()
        ends.append([*weights(optimizer), *(t for pair in returned[-1:] for t in pair), told["loss"], *_sharpness(told)])
    same(*ends)


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_gradients_for_another_optimizer_are_those_of_pass_1(graphs, method):
    """And stay so when the graph runs again, which `zero_grad` of the other optimizer may come after."""
    model, (x, y) = mlp(), batch()
    others = list(model[2].parameters())
    optimizer, closure = make(model[0].parameters(), method=method, model=model), Graph(model, x, y)
    expected = torch.autograd.grad((model(x) - y).square().mean(), others)
    optimizer.step(closure)
    kept = [p.grad for p in others]
    closure()
    same(kept, list(expected))


def _sharpness(told):
    return [told["sharpness"]] if "sharpness" in told else []


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_a_loss_in_a_static_tensor_is_that_of_pass_1(method):
    """`torch.cuda.make_graphed_callables` hands out `static.detach()`."""
    model, (x, y) = mlp(), batch()
    optimizer, static = make(model.parameters(), method=method), torch.zeros(())

    def closure():
        loss = (model(x) - y).square().mean()
        loss.backward()
        static.copy_(loss.detach())
        return static.detach()

    expected = (model(x) - y).square().mean().detach()
    returned = optimizer.step(closure)
    assert torch.equal(returned, expected)
    assert optimizer.diagnostics()["loss"] == expected.double()
    if method in ("finite_difference", "sam"):
        assert optimizer.diagnostics()["sharpness"] > 0


def test_who_runs_cuda_graphs(monkeypatch):
    cuda, manager = torch.device("cuda", 1), object()
    trees: ModuleType | SimpleNamespace = SimpleNamespace(
        get_manager=lambda index, create_if_none_exists: manager if index == 1 and not create_if_none_exists else None
    )
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    assert torch_private.runs_cuda_graphs(cuda)
    assert not torch_private.runs_cuda_graphs(torch.device("cuda", 0))
    assert not torch_private.runs_cuda_graphs(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", SimpleNamespace())
    assert torch_private.runs_cuda_graphs(cuda), "a torch that cannot be asked: rather a copy too many"
    monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees")
    assert not torch_private.runs_cuda_graphs(cuda)


def test_torch_still_says_who_runs_cuda_graphs():
    trees = pytest.importorskip("torch._inductor.cudagraph_trees", reason="this torch has no inductor")
    assert "create_if_none_exists" in inspect.signature(trees.get_manager).parameters
    assert trees.get_manager(0, create_if_none_exists=False) is None


def test_a_loss_without_a_memory_that_could_be_asked_for():
    assert closures.kept(torch.ones(1).to_sparse()).is_sparse
