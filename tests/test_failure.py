"""Contract, point 4: an exception in any pass restores everything and is raised again."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from unittest.mock import Mock, patch

import pytest
import torch
from gam_helpers import (
    EVERY_PASS,
    METHODS,
    batch,
    closure_of,
    make,
    mixed_net,
    mlp,
    regression,
    same,
    snapshot,
    trainer,
    weights,
)

from gam_fused import torch_private
from gam_fused.backends import foreach

BASES = {
    "sgd": (torch.optim.SGD, {"dampening": 0.5, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "foreign": (torch.optim.RMSprop, {}),
}


class Bomb(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("backward failed")


class Task:
    """A model with dropout and batch norm, its optimizer, and a closure that fails in pass `bad` of the step when armed."""

    def __init__(self, method, base="sgd", zero_grad=True, **options):
        self.model = mixed_net()
        self.count, self.bad, self.where, self.error = 0, None, "forward", None
        kind, base_options = BASES[base]
        self.loss_fn = regression(self.model, *batch())
        self.zero_grad, self.method = zero_grad, method
        self.optimizer = make(self.model.parameters(), kind, method, model=self.model, **base_options, **options)
        torch.manual_seed(11)

    def closure(self):
        k, self.count = self.count, self.count + 1
        if self.zero_grad:
            self.optimizer.zero_grad()
        failing = k == self.bad
        if failing and self.where == "before":
            raise self.error
        loss = self.loss_fn()
        if failing and self.where == "forward":
            raise self.error
        if failing and self.where == "inside backward":
            loss = Bomb.apply(loss)
        if self.method != "exact":
            loss.backward()
            if failing and self.where == "backward":
                raise self.error
        return loss

    def step(self, bad=None, where="forward", error=None):
        self.count, self.bad, self.where, self.error = 0, bad, where, error
        return self.optimizer.step(self.closure)


PLACES = ("before", "forward", "backward", "inside backward")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(  # a closure of `exact` does not call backward
    ("method", "bad", "where"),
    [(method, bad, where) for method, bad in EVERY_PASS for where in PLACES if (method, where) != ("exact", "backward")],
)
def test_everything_is_as_before_and_training_goes_on(method, bad, base, where):
    task, twin = Task(method, base), Task(method, base)
    rng = torch.get_rng_state()
    task.step(), task.step()
    before = snapshot(task.optimizer, task.model)
    with pytest.raises(RuntimeError, match=r"bad batch|backward failed"):
        task.step(bad, where, RuntimeError("bad batch"))
    same(snapshot(task.optimizer, task.model), before)
    assert int(task.optimizer.skipped_steps) == 0
    losses = [task.step(), task.step()]
    torch.set_rng_state(rng)
    twin.step(), twin.step()
    same([t.item() for t in losses], [twin.step().item(), twin.step().item()])
    same(snapshot(task.optimizer, task.model), snapshot(twin.optimizer, twin.model))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError], ids=lambda e: e.__name__
)
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_every_kind_of_exception_in_the_first_step(method, bad, error):
    task = Task(method)
    before = snapshot(task.optimizer, task.model)
    with pytest.raises(error):
        task.step(bad, "forward", error("stop"))
    same(snapshot(task.optimizer, task.model), before)
    task.step()
    twin = Task(method)
    twin.step()
    same(weights(task.optimizer), weights(twin.optimizer))


@pytest.mark.parametrize(("method", "bad"), [(m, k) for m, k in EVERY_PASS if m != "exact"])
def test_gradients_left_by_the_failed_pass_are_not_counted(method, bad):
    """The closure never zeroes gradients: what a failed pass left in p.grad must not reach the next step."""
    task, twin = Task(method, zero_grad=False), Task(method, zero_grad=False)
    with pytest.raises(RuntimeError, match="bad batch"):
        task.step(bad, "backward", RuntimeError("bad batch"))
    torch.manual_seed(3)
    task.step()
    torch.manual_seed(3)
    twin.step()
    same(weights(task.optimizer), weights(twin.optimizer))


@pytest.mark.parametrize("oracle_method", ["finite_difference", "exact"])
def test_the_oracles_own_pass_may_fail(oracle_method):
    last = {"finite_difference": 4, "exact": 2}[oracle_method]
    for bad in range(last + 1):
        task = Task(oracle_method, oracle="sam", sam_rho=0.3)
        task.step()
        before = snapshot(task.optimizer, task.model)
        with pytest.raises(RuntimeError, match="bad batch"):
            task.step(bad, "forward", RuntimeError("bad batch"))
        same(snapshot(task.optimizer, task.model), before, f"pass {bad}")


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_several_dtypes_return(method):
    model = mlp()
    model[2].double()
    x, y = batch()
    count = iter(range(100))

    def fails():
        if next(count) == 1:
            raise RuntimeError("bad batch")
        return (model[2](model[1](model[0](x)).double()) - y).square().mean()

    optimizer, closure = trainer(method, model, fails)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="bad batch"):
        optimizer.step(closure)
    same(snapshot(optimizer), before)


@pytest.fixture
def interrupts():
    """Python's own handler: a process started in the background of a shell inherits that interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("base", ["sgd", "foreign"])
def test_an_interrupt_of_the_update_waits_for_the_end_of_the_step(base, monkeypatch):
    """Half an update cannot be undone: all of the step is there before the exception is."""

    def pressed_during(update):
        def run(*arguments):
            signal.raise_signal(signal.SIGINT)
            return update(*arguments)

        return run

    ends = []
    for pressed in (False, True):
        task = Task("finite_difference", base, backend="torch")
        if pressed:
            owner, name = (foreach, "combined_update_") if base == "sgd" else (task.optimizer.base_optimizer, "step")
            monkeypatch.setattr(owner, name, pressed_during(getattr(owner, name)))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt) if pressed else nullcontext():
                task.step()
        ends.append(snapshot(task.optimizer, task.model))
    same(*ends)


class Refuses(torch.optim.SGD):
    """A base optimizer that fails before it does anything."""

    def step(self, closure=None):
        raise RuntimeError("base failed")


@pytest.mark.parametrize("method", METHODS)
def test_a_base_optimizer_that_fails_finds_the_weights_restored(method):
    model = mixed_net()
    optimizer, closure = trainer(method, model, regression(model, *batch()), Refuses, lr=0.1)
    before = weights(optimizer)
    with pytest.raises(RuntimeError, match="base failed"):
        optimizer.step(closure)
    same(weights(optimizer), before)


def test_a_closure_of_another_optimizer_still_works_afterwards():
    """After a failure inside the step, gradients of a plain loop are not blocked or redirected."""
    task = Task("finite_difference")
    with pytest.raises(RuntimeError, match="bad batch"):
        task.step(2, "forward", RuntimeError("bad batch"))
    task.optimizer.zero_grad()
    task.loss_fn().backward()
    assert torch.is_grad_enabled()
    assert all(p.grad is not None for p in task.model.parameters())
    closure_of(task.optimizer, task.loss_fn)()


@pytest.mark.parametrize(("method", "k"), EVERY_PASS)
def test_a_failed_pass_leaves_no_gradient_behind(method, k):
    """Of trained parameters and of frozen ones, which a closure may have given one."""
    model = mlp()
    model[0].bias.requires_grad_(False)
    calls = []

    def loss_fn():
        calls.append(None)
        loss = regression(model, *batch())()
        if len(calls) == k + 1:
            model[2].weight.grad = torch.ones_like(model[2].weight)
            model[0].bias.grad = torch.ones_like(model[0].bias)
            raise ValueError("in the middle of a pass")
        return loss

    optimizer, _ = trainer(method, model, loss_fn)
    with pytest.raises(ValueError, match="in the middle of a pass"):
        optimizer.step(loss_fn)
    assert all(p.grad is None for p in model.parameters())


def test_an_error_of_fsdp_in_the_rollback_comes_beside_the_users_and_leaves_no_gradients():
    model, (x, y) = mlp(), batch()
    optimizer, closure = trainer("finite_difference", model, regression(model, x, y))
    optimizer.step(closure)
    before, module = weights(optimizer), Mock()
    optimizer.session.fsdp_modules = [module]

    def bad():
        closure()
        module.reset_mock()
        raise ValueError("a bad batch")

    with (
        patch.object(torch_private, "drop_pass_of_fsdp", side_effect=AttributeError("of another torch")),
        pytest.raises(AttributeError, match="of another torch") as error,
    ):
        optimizer.step(bad)
    assert "a bad batch" in str(error.value.__context__)
    assert all(p.grad is None for p in model.parameters())
    assert module.reshard.called
    same(weights(optimizer), before)
