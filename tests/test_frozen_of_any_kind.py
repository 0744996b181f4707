"""Frozen parameters beside trained ones, as in a quantized model with adapters: of any dtype and class, as under torch."""

from __future__ import annotations

import copy

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, make, mlp, regression
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

FROZEN = {
    "uint8": lambda: torch.arange(15, dtype=torch.uint8).reshape(5, 3),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(4),
    "quantized": lambda: torch.quantize_per_channel(torch.ones(4, 4), torch.ones(4), torch.zeros(4), 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.ones(4, device="meta"),
    "subclass": lambda: TwoTensor(torch.ones(4), torch.ones(4)),
}


def with_frozen(kind: str) -> nn.Sequential:
    model = mlp()
    model.register_parameter("frozen", nn.Parameter(FROZEN[kind](), requires_grad=False))
    return model


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", FROZEN)
def test_they_are_left_alone(kind, flatten, backend):
    expected, model = mlp(), with_frozen(kind)
    plain = make(expected, backend=backend, flatten=flatten)
    optimizer = make(model, backend=backend, flatten=flatten)
    for _ in range(2):
        plain.step(regression(expected, *batch()))
        optimizer.step(regression(model, *batch()))
    for p, q in zip(list(model.parameters())[1:], expected.parameters(), strict=True):
        assert torch.equal(p, q)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(regression(model, *batch()))


def test_one_made_in_inference_mode_is_left_alone():
    """It has no version that could be asked for."""
    model = mlp()
    with torch.inference_mode():
        model.register_parameter("frozen", nn.Parameter(torch.ones(4), requires_grad=False))
    optimizer = make(model[0].parameters(), model=model)
    for _ in range(2):
        optimizer.step(regression(model, *batch()))
    assert torch.equal(model.frozen, torch.ones(4))


@pytest.mark.parametrize("method", METHODS)
def test_unfrozen_they_are_named(method):
    model = with_frozen("expanded")
    optimizer = make(model, method=method)
    optimizer.step(regression(model, *batch()))
    model.frozen.requires_grad_()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(shape \(4,\).* is expanded"):
        optimizer.step(regression(model, *batch()))
