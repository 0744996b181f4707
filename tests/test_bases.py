"""The base optimizer: however it is given, FusedGAM is the torch optimizer that schedulers and hooks expect."""

from __future__ import annotations

import functools

import pytest
import torch
from float64_gam import Gam64
from gam_helpers import (
    METHODS,
    SETTINGS,
    backend_params,
    batch,
    bits,
    close,
    closure_of,
    functional_loss,
    make,
    mlp,
    regression,
    same,
    trainer,
    weights,
)
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from gam_fused import FusedGAM

UPDATES = {
    "sgd": (SGD, {"momentum": 0.0}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd-dampening-maximize": (SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "adam": (Adam, {"weight_decay": 0.01}),
    "adam-amsgrad-maximize": (Adam, {"amsgrad": True, "maximize": True}),
    "adam-decoupled": (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "adamw-amsgrad-maximize": (AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
}


def trained(build, steps=4, dtype=torch.float32):
    model = mlp(dtype)
    optimizer = build(model.parameters())
    closure = closure_of(optimizer, regression(model, *batch(dtype=dtype)))
    for _ in range(steps):
        optimizer.step(closure)
    return weights(optimizer)


@pytest.mark.parametrize("base", [SGD, Adam, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_class_factory_and_instance_are_the_same(base):
    by_class = trained(lambda params: FusedGAM(params, base, lr=0.01, weight_decay=0.1))
    for given in (
        functools.partial(base, lr=0.01, weight_decay=0.1),
        lambda params: base(params, lr=0.01, weight_decay=0.1),
    ):
        same(trained(lambda params, given=given: FusedGAM(params, given)), by_class)
    same(trained(lambda params: FusedGAM(None, base(params, lr=0.01, weight_decay=0.1))), by_class)

    def both(params):
        params = list(params)
        return FusedGAM(params, base(params, lr=0.01, weight_decay=0.1))

    same(trained(both), by_class)


@pytest.mark.parametrize("form", ["generator", "named", "groups", "named_groups"])
def test_parameters_in_every_form_of_torch(form):
    model = mlp()
    forms = {
        "generator": lambda: model.parameters(),
        "named": lambda: model.named_parameters(),
        "groups": lambda: [{"params": model[0].parameters()}, {"params": list(model[2].parameters()), "lr": 0.05}],
        "named_groups": lambda: [
            {"params": model[0].named_parameters()},
            {"params": model[2].named_parameters("2"), "rho": 0.3},
        ],
    }
    optimizer = make(forms[form]())
    closure = closure_of(optimizer, regression(model, *batch()))
    first = optimizer.step(closure)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    assert optimizer.step(closure) < first


def test_is_a_torch_optimizer_that_shares_groups_and_state():
    model = mlp()
    optimizer = make([{"params": model[0].parameters()}])

    def shared():
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        assert optimizer.state is optimizer.base_optimizer.state

    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer.base_optimizer) is SGD
    shared()
    optimizer.step(closure_of(optimizer, regression(model, *batch())))
    optimizer.load_state_dict(optimizer.state_dict())
    shared()
    optimizer.__setstate__(optimizer.__getstate__())
    shared()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01, "rho": 0.3})
    shared()
    assert optimizer.param_groups[1]["rho"] == 0.3
    assert optimizer.param_groups[1]["momentum"] == 0.9
    assert optimizer.param_groups[1]["perturb"] is True
    assert optimizer.param_groups[0]["rho"] == SETTINGS["finite_difference"]["rho"]
    optimizer.step(closure_of(optimizer, regression(model, *batch())))


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", UPDATES)
def test_the_fused_update_is_torchs_own(update, dtype, backend):
    """Fed with the same gradients (finite_difference with alpha 0, so d = g0), within rounding of the dtype."""
    base, options = UPDATES[update]
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7), torch.randn(())]
    mine, theirs = ([t.to(dtype).requires_grad_() for t in start] for _ in range(2))
    float64 = [t.detach().to(dtype).double().requires_grad_() for t in start]
    optimizer = FusedGAM(mine, base, alpha=0.0, lr=0.01, backend=backend, **options)
    plain, exact = base(theirs, lr=0.01, **options), base(float64, lr=0.01, **options)
    for _ in range(4):
        grads = [torch.randn_like(t).to(dtype) for t in start]

        def closure(grads=grads):
            for p, g in zip(mine, grads, strict=True):
                p.grad = g.clone()

        optimizer.step(closure)
        for p, q, g in zip(theirs, float64, grads, strict=True):
            p.grad, q.grad = g.clone(), g.double()
        plain.step(), exact.step()
    ulp = torch.finfo(dtype).eps
    for p, q, r in zip(mine, theirs, float64, strict=True):
        error, torchs = (p.detach().double() - r).abs().max(), (q.detach().double() - r).abs().max()
        assert error <= 2 * torchs + ulp * r.abs().max(), f"{error:.3g} against torch's own {torchs:.3g}"


@pytest.mark.parametrize("base", [SGD, Adam, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_tensor_lr(method, base):
    options = {"capturable": False} if base is not SGD else {}
    as_tensor = trained(lambda p: make(p, base, lr=torch.tensor(0.02), **options), 4)
    same(as_tensor, trained(lambda p: make(p, base, lr=torch.tensor(0.02).item(), **options), 4))


def test_a_tensor_lr_changed_in_place_is_seen():
    model = mlp()
    lr = torch.tensor(0.0)
    optimizer = make(model.parameters(), Adam, lr=lr)
    closure = closure_of(optimizer, regression(model, *batch()))
    before = weights(optimizer)
    optimizer.step(closure)
    same(weights(optimizer), before)
    lr.fill_(0.1)
    optimizer.step(closure)
    assert not torch.equal(weights(optimizer)[0], before[0])


SCHEDULERS = {
    "step": lambda o: StepLR(o, 2, gamma=0.1),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "one_cycle": lambda o: OneCycleLR(o, 0.2, total_steps=12),
    "lambda": lambda o: LambdaLR(o, lambda i: 0.7**i),
    "sequential": lambda o: SequentialLR(o, [StepLR(o, 1, 0.5), CosineAnnealingLR(o, 5)], [3]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_schedulers_work_and_keep_working_after_load_state_dict(name, base):
    """The learning rates, and the updates that they cause, against the same schedule on a plain optimizer."""
    model, twin = mlp(torch.float64), mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    kwargs = {"alpha": 0.99} if base is torch.optim.RMSprop else {}  # it has an alpha, too
    optimizer = FusedGAM(model.parameters(), base, alpha=0.0, lr=0.1, base_kwargs=kwargs)
    plain = base(twin.parameters(), lr=0.1)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    for i in range(8):
        optimizer.step(closure_of(optimizer, regression(model, x, y)))
        plain.step(closure_of(plain, regression(twin, x, y)))
        for s in schedulers:
            s.step()
        if i == 3:
            optimizer.load_state_dict(optimizer.state_dict())
            plain.load_state_dict(plain.state_dict())
        assert (
            optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"]
        )
        close(list(model.parameters()), list(twin.parameters()), 1e-10)


def test_reduce_on_plateau():
    model = mlp()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()))
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for loss in (1.0, 1.0, 1.0):
        optimizer.step(closure)
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("base", [SGD, Adam, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_step_hooks_fire_once_per_step(method, base):
    model = mlp()
    optimizer, closure = trainer(method, model, regression(model, *batch()), base, lr=0.01)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for _ in range(3):
        optimizer.step(closure)
    assert calls == ["pre", "post"] * 3


@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_global_step_hooks_see_one_step_of_fused_gam(base):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    model = mlp()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()), base, lr=0.01)
    calls = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: calls.append(opt))
    try:
        optimizer.step(closure)
    finally:
        handle.remove()
    assert calls.count(optimizer) == 1


def test_state_dict_hooks_fire():
    model = mlp()
    optimizer, calls = make(model.parameters()), []
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "loaded"]


def test_zero_grad_and_repr():
    model = mlp()
    optimizer = make(model.parameters())
    regression(model, *batch())().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert "FusedGAM" in repr(optimizer)


def test_a_base_instance_that_has_been_training_goes_on():
    """Its state is kept: the next step continues its momentum."""
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        base.step(closure_of(base, regression(model, x, y)))
    float64 = Gam64([{"params": list(model.parameters()), "rho": 0.1, "lr": 0.1, "momentum": 0.9}], alpha=0.7)
    for p, state in zip(model.parameters(), float64.state, strict=True):
        state["m"] = base.state[p]["momentum_buffer"].clone()
    optimizer = FusedGAM(None, base, **SETTINGS["finite_difference"])
    kept = [bits(base.state[p]["momentum_buffer"]) for p in model.parameters()]
    for _ in range(2):
        optimizer.step(closure_of(optimizer, regression(model, x, y)))
        float64.step(functional_loss(model, x, y))
    close(list(model.parameters()), float64.theta, 1e-9)
    assert all(
        not torch.equal(bits(base.state[p]["momentum_buffer"]), k) for p, k in zip(model.parameters(), kept, strict=True)
    )
