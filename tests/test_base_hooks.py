"""Step hooks of the base optimizer's own, and failures in it or in them."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from gam_helpers import (
    METHODS,
    backend_params,
    batch,
    close,
    freeze,
    make,
    mixed_net,
    mlp,
    regression,
    same,
    trainer,
    weights,
)
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gam_fused import FusedGAM, FusedSAM

BASES = [SGD, AdamW, RMSprop]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES, ids=lambda b: b.__name__)
def test_hooks_of_the_base_see_the_direction_once_per_step(base, method, backend):
    """At the unperturbed weights before the update, at the new ones after it."""
    model, seen = mlp(torch.float64), []
    options = {"lr": 0.01, "backend": backend, **({"momentum": 0.0} if base is SGD else {})}
    optimizer, closure = trainer(method, model, regression(model, *batch(dtype=torch.float64)), base, **options)
    bare = copy.deepcopy(model)

    def note(*_):
        seen.append([weights(optimizer), [p.grad.clone() for p in model.parameters()]])

    optimizer.base_optimizer.register_step_pre_hook(note)
    optimizer.base_optimizer.register_step_post_hook(note)
    before = weights(optimizer)
    optimizer.step(closure)
    (at_first, d), (at_end, _) = seen
    same(at_first, before)
    same(at_end, weights(optimizer))
    norm = torch.stack([g.square().sum() for g in d]).sum().sqrt()
    assert norm.item() == pytest.approx(optimizer.diagnostics()["direction_norm"].item(), rel=1e-9)
    if base is SGD:
        for p, q, g in zip(model.parameters(), bare.parameters(), d, strict=True):
            torch.testing.assert_close(p, q - 0.01 * g)


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.__name__)
def test_hooks_that_come_and_go_change_only_rounding(base):
    """Steps with and without the kernels' own update share the state."""
    models = mlp(torch.float64), mlp(torch.float64)
    optimizers = [make(m.parameters(), base, lr=0.01) for m in models]
    hook = None
    for i in range(6):
        if i == 2:
            hook = optimizers[0].base_optimizer.register_step_post_hook(lambda *_: None)
        if i == 4:
            hook.remove()
        for m, o in zip(models, optimizers, strict=True):
            o.step(regression(m, *batch(dtype=torch.float64, seed=i)))
            o.state_dict()
    close(list(models[0].parameters()), [p.detach() for p in models[1].parameters()], 1e-12)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for key, value in optimizers[1].state[q].items():
            torch.testing.assert_close(optimizers[0].state[p][key], value)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("base", BASES, ids=lambda b: b.__name__)
def test_a_step_that_was_put_over_the_bases_own_is_called(base, scheduled):
    """As gradient centralisation is patched in: it finds the direction in `p.grad`."""
    (patched, closure), (plain, plain_closure) = (
        trainer("sam", model, regression(model, *batch(dtype=torch.float64)), base, lr=0.01)
        for model in (mlp(torch.float64), mlp(torch.float64))
    )

    def halve(inner, *_):
        for p in inner.param_groups[0]["params"]:
            p.grad.mul_(0.5)

    def step(inner):
        halve(inner)
        type(inner).step(inner)

    inner = patched.base_optimizer
    inner.step = types.MethodType(step, inner)
    plain.base_optimizer.register_step_pre_hook(halve)
    if scheduled:
        StepLR(inner, 1)
    for _ in range(3):
        patched.step(closure)
        plain.step(plain_closure)
    same(weights(patched), weights(plain))


def test_a_scheduler_of_the_base_leaves_it_fused():
    optimizer = make(mlp(), SGD)
    StepLR(optimizer.base_optimizer, 1)
    assert optimizer.session.fused_now is not None


def test_a_hook_that_clips_the_direction():
    model = mlp()
    optimizer = FusedSAM(model.parameters(), SGD, lr=1.0)
    optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None
    )
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(regression(model, *batch()))
    moved = torch.stack([(p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)]).sum().sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_skipped_step_calls_no_hook_of_the_base():
    model, calls = mlp(), []
    optimizer = make(model.parameters())
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = weights(optimizer)
    optimizer.step(lambda: regression(model, *batch())() * float("nan"))
    assert not calls
    same(weights(optimizer), before)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.__name__)
@pytest.mark.parametrize("own", [False, True])
def test_global_hooks_are_called_once_for_fused_gam(base, own):
    model, calls = mlp(), []
    optimizer = make(model.parameters(), base, lr=0.01)
    if own:
        optimizer.base_optimizer.register_step_post_hook(lambda opt, *_: calls.append(("own", opt)))
    hooks = [
        register_optimizer_step_pre_hook(lambda opt, *_: calls.append(("pre", opt))),
        register_optimizer_step_post_hook(lambda opt, *_: calls.append(("post", opt))),
    ]
    try:
        optimizer.step(regression(model, *batch()))
        other = SGD(mlp().parameters(), lr=0.1)
        other.step()
    finally:
        for hook in hooks:
            hook.remove()
    expected = [("pre", optimizer), *([("own", optimizer.base_optimizer)] if own else []), ("post", optimizer)]
    assert calls == [*expected, ("pre", other), ("post", other)]


class RaisesAfter(RMSprop):
    def step(self, closure=None):
        super().step()
        raise MemoryError


class RaisesBetween(torch.optim.Optimizer):
    """Updates its first parameter, and then fails."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        p = self.param_groups[0]["params"][0]
        self.state[p]["updates"] = self.state[p].get("updates", 0) + 1
        p.sub_(p.grad)
        raise MemoryError


class RaisesBefore(SGD):
    def step(self, closure=None):
        raise MemoryError


def hooked(params):
    base = AdamW(params, lr=0.1)

    def fails(*_):
        raise MemoryError

    base.register_step_post_hook(fails)
    return base


@pytest.mark.parametrize("base", [RaisesAfter, RaisesBetween, RaisesBefore, hooked], ids=lambda b: b.__name__)
def test_weights_and_state_of_a_base_that_fails_go_together(base):
    """Each parameter and its state are both as before, or both after, and the error says so."""
    model = mlp()
    optimizer = FusedGAM(model.parameters(), base)
    before = weights(optimizer)
    with pytest.raises(MemoryError) as caught:
        optimizer.step(regression(model, *batch()))
    if sys.version_info >= (3, 11):
        assert "as it left them" in caught.value.__notes__[0]
    for p, old in zip(model.parameters(), before, strict=True):
        assert bool(optimizer.state.get(p)) == (not torch.equal(freeze(p), old))
        assert p.grad is None


class RaisesAfterDrawing(SGD):
    def step(self, closure=None):
        torch.rand(3)
        raise MemoryError


@pytest.mark.parametrize("base", [RaisesAfter, RaisesBefore, RaisesAfterDrawing, hooked], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_buffers_and_generators_after_a_base_that_fails_are_those_of_torch(method, base):
    """One pass has moved them, and the base may have drawn; the step is not counted, and a next one goes on from there."""
    model, twin = mixed_net(), mixed_net()
    optimizer = make(model.parameters(), lambda params: base(params), method, model=model)
    plain = base(twin.parameters())

    def torchs_own(loss_fn):
        loss_fn().backward()
        plain.step()

    found = []
    for step, net in ((torchs_own, twin), (optimizer.step, model)):
        torch.manual_seed(3)
        for _ in range(1 if base in (RaisesAfter, hooked) else 2):  # their weights differ then, as directions do
            with pytest.raises(MemoryError):
                step(regression(net, *batch()))
        found.append([freeze(dict(net.named_buffers())), torch.get_rng_state()])
    same(*found)
    assert (optimizer.session.steps_taken, optimizer.skipped_steps) == (0, 0)


def test_a_scheduler_of_the_base_does_not_warn(recwarn):
    for base in (SGD, RMSprop):
        model = mlp()
        optimizer = make(model.parameters(), base)
        schedulers = StepLR(optimizer.base_optimizer, 1, gamma=0.5), StepLR(optimizer, 1, gamma=0.5)
        for _ in range(2):
            optimizer.step(regression(model, *batch()))
            for scheduler in schedulers:
                scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    assert not [str(w.message) for w in recwarn if "lr_scheduler" in str(w.message)]


def test_state_of_a_skipped_step_is_not_the_first_momentum_of_one_with_hooks():
    """The skipped, fused step made a momentum of zeros; torch, which would have made none, starts with d itself."""
    model, twin = mlp(torch.float64), mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = make(model.parameters(), SGD, "finite_difference", alpha=0.0, **options)
    optimizer.step(lambda: regression(model, x, y)() * float("nan"))
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    plain = SGD(twin.parameters(), **options)
    for _ in range(2):
        optimizer.step(regression(model, x, y))
        plain.zero_grad()
        regression(twin, x, y)().backward()
        plain.step()
    close(list(model.parameters()), [p.detach() for p in twin.parameters()], 1e-12)
