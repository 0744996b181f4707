"""A model whose parameters several optimizers train: FusedGAM's passes leave the others' gradients as one pass does."""

from __future__ import annotations

import copy

import pytest
import torch
from gam_helpers import METHODS, PASSES, make
from torch import Tensor, nn

FIRST_ORDER = [method for method in METHODS if method != "exact"]  # it asks autograd for gradients of its own alone


class Embedded(nn.Module):
    """An embedding and a head, for an optimizer each."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 2)

    def loss(self) -> Tensor:
        return self.head(torch.tanh(self.embedding(torch.tensor([0, 3, 3, 5])))).square().mean()


def after_one_pass(model: Embedded) -> Tensor:
    """The embedding's gradient of one ordinary pass, on a copy."""
    other = copy.deepcopy(model)
    other.loss().backward()
    return dense(other)


def dense(model: Embedded) -> Tensor:
    gradient = model.embedding.weight.grad
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_gradients_of_another_optimizer_are_those_of_one_pass(method, sparse, base):
    model = Embedded(sparse)
    optimizer = make(model.head.parameters(), base, method, model=model)
    other = (torch.optim.SparseAdam if sparse else torch.optim.Adam)(model.embedding.parameters(), lr=0.1)
    for _ in range(3):
        expected = after_one_pass(model)
        optimizer.step(model.loss)
        assert torch.equal(dense(model), expected)
        other.step()
        other.zero_grad()


def test_they_are_added_to_what_was_there():
    model = Embedded()
    optimizer = make(model.head.parameters(), model=model)
    expected = torch.zeros_like(model.embedding.weight)
    for _ in range(3):
        expected = expected + after_one_pass(model)
        optimizer.step(model.loss)
        assert torch.equal(dense(model), expected)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("k", range(PASSES["finite_difference"]))
def test_a_step_that_fails_leaves_none_where_there_was_none(k, there):
    """One that was there has what the first pass added to it."""
    model, passes = Embedded(), []
    optimizer = make(model.head.parameters(), model=model)
    expected = 2 * after_one_pass(model)

    def closure():
        loss = model.loss()
        loss.backward()
        passes.append(k)
        if len(passes) > k:
            raise ValueError("boom")
        return loss

    if there:
        model.loss().backward()
    with pytest.raises(ValueError, match="boom"):
        optimizer.step(closure)
    if there:
        assert torch.equal(dense(model), expected)
    else:
        assert model.embedding.weight.grad is None


def test_gradients_in_memory_that_every_pass_writes_to_are_copied():
    """And come back where others look for them, such as one buffer of all gradients."""
    model = Embedded()
    bucket = torch.zeros(2, model.embedding.weight.numel())
    optimizer = make(model.head.parameters(), model=model)

    def closure():
        loss = model.loss()
        loss.backward()
        bucket[0].copy_(model.embedding.weight.grad.flatten())
        model.embedding.weight.grad = bucket[0].view_as(model.embedding.weight)
        return loss

    expected = after_one_pass(model)
    optimizer.step(closure)
    assert torch.equal(dense(model), expected)
    assert dense(model).data_ptr() == bucket.data_ptr()


def test_gradients_that_lie_in_a_buffer_of_the_users_stay_there():
    model = Embedded()
    buffer = torch.zeros(model.embedding.weight.numel())
    model.embedding.weight.grad = buffer.view_as(model.embedding.weight)
    optimizer = make(model.head.parameters(), model=model)
    for _ in range(2):
        buffer.zero_()
        expected = after_one_pass(model)
        optimizer.step(model.loss)
        assert torch.equal(buffer.view_as(expected), expected)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_parameters_that_the_first_pass_makes():
    """Of a lazy module, or unfrozen by the closure: in the step that makes them, and later."""
    for makes in ("lazy", "unfrozen"):
        model = Embedded()
        model.tail = nn.LazyLinear(3) if makes == "lazy" else nn.Linear(2, 3).requires_grad_(False)

        def loss(model=model, makes=makes):
            embedded = torch.tanh(model.embedding(torch.tensor([0, 3, 3, 5])))
            model.tail.requires_grad_() if makes == "unfrozen" else None
            return model.tail(model.head(embedded)).square().mean()

        optimizer = make(model.head.parameters(), model=model)
        for _ in range(3):
            torch.manual_seed(3)  # the lazy module's weights
            other = copy.deepcopy(model)
            loss(other).backward()
            torch.manual_seed(3)
            optimizer.step(loss)
            assert torch.equal(model.tail.weight.grad, other.tail.weight.grad), makes
            model.tail.zero_grad()


def test_a_parameter_reached_by_later_passes_alone_gets_no_gradient():
    model, passes = Embedded(), []
    optimizer = make(model.head.parameters(), model=model)

    def closure():
        passes.append(0)
        embedded = model.embedding(torch.tensor([1, 2]))
        return model.head(embedded if len(passes) > 1 else embedded.detach()).square().mean()

    optimizer.step(closure)
    assert model.embedding.weight.grad is None
