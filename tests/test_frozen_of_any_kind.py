"""Frozen parameters beside trained ones, as in a quantized model with adapters: of any dtype and class, as under torch."""

from __future__ import annotations

import copy

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, make, mlp, regression, same, snapshot
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


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_one_made_in_inference_mode_is_left_alone(own, flatten):
    """It has no version that could be asked for."""
    model = mlp()
    with torch.inference_mode():
        model.register_parameter("frozen", nn.Parameter(torch.ones(4), requires_grad=False))
    optimizer = make(model if own else model[0].parameters(), model=model, flatten=flatten)
    for _ in range(2):
        optimizer.step(regression(model, *batch()))
    assert torch.equal(model.frozen, torch.ones(4))


BUFFERS = {
    **FROZEN,
    "plain": lambda: torch.eye(3),
    "empty": lambda: torch.empty(0, 3),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "BSR": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "conjugate": lambda: torch.eye(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.eye(3, dtype=torch.complex64).conj().imag,
    "quantized, 4 bits": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.quint4x2),
}
IGNORED = ["Sparse invariant checks", "Sparse CSR tensor support", "The PyTorch API of nested", "torch.quantize_per_tensor"]


@pytest.mark.filterwarnings(*(f"ignore:{told}:UserWarning" for told in IGNORED))
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_any_kind_are_left_alone(kind, mode, backend):
    expected, model = mlp(), mlp()
    with mode():
        model.register_buffer("made", BUFFERS[kind]())
    plain, optimizer = make(expected, backend=backend), make(model, backend=backend)
    before = str(model.made)
    for _ in range(2):
        plain.step(regression(expected, *batch()))
        optimizer.step(regression(model, *batch()))
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    assert str(model.made) == before


@pytest.mark.filterwarnings(*(f"ignore:{told}:UserWarning" for told in IGNORED))
@pytest.mark.parametrize("method", METHODS)
def test_a_buffer_that_cannot_be_copied_must_not_change(method):
    model = mlp()
    model.register_buffer("made", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    optimizer = make(model, method=method)
    before = snapshot(optimizer)

    def closure():
        model.made.mul_(2)
        return regression(model, *batch())()

    with pytest.raises(RuntimeError, match=r"wrote to a buffer of model= \(torch.float32, nested\) that torch cannot copy"):
        optimizer.step(closure)
    same(snapshot(optimizer), before)


@pytest.mark.parametrize("method", METHODS)
def test_unfrozen_they_are_named(method):
    model = with_frozen("expanded")
    optimizer = make(model, method=method)
    optimizer.step(regression(model, *batch()))
    model.frozen.requires_grad_()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(shape \(4,\).* is expanded"):
        optimizer.step(regression(model, *batch()))
