"""Contract, point 6: a gradient missing in one pass is zero there; missing in all, it leaves the parameter alone."""

from __future__ import annotations

import copy

import pytest
import torch
from float64_gam import Gam64
from gam_helpers import (
    EVERY_PASS,
    METHODS,
    PASSES,
    SETTINGS,
    backend_params,
    batch,
    close,
    make,
    mlp,
    regression,
    same,
    weights,
)
from torch import nn

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "foreign": (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
}


class Branching:
    """`extra` is used in the passes of `used` only; `twin` likewise, but in a group that is not perturbed."""

    def __init__(self, method, base, used, backend="auto"):
        torch.manual_seed(0)
        self.main = torch.randn(4, dtype=torch.float64).requires_grad_()
        self.extra = torch.randn(3, dtype=torch.float64).requires_grad_()
        self.twin = torch.randn(3, dtype=torch.float64).requires_grad_()
        self.method, self.used, self.count = method, used, 0
        kind, options = BASES[base]
        groups = [{"params": [self.main, self.extra]}, {"params": [self.twin], "perturb": False}]
        self.optimizer = make(groups, kind, method, backend=backend, **options)
        name = base if base != "foreign" else lambda groups: kind(groups, **options)
        settings = dict(SETTINGS[method])
        common = {"rho": settings.pop("rho"), **(options if base != "foreign" else {})}
        self.float64 = Gam64([{**g, **common} for g in groups], method=method, base=name, **settings)

    @staticmethod
    def loss(params, used):
        main, extra, twin = params
        value = (main.cos() * main).sum() + 0.1 * (main**4).sum()
        return value + (extra.sin().sum() * main.sum() + (twin * extra).exp().sum() * 0.1 if used else 0.0)

    def closure(self):
        k, self.count = self.count, self.count + 1
        self.optimizer.zero_grad()
        loss = self.loss((self.main, self.extra, self.twin), k in self.used)
        if self.method != "exact":
            loss.backward()
        return loss

    def step(self):
        self.count = 0
        self.optimizer.step(self.closure)
        self.float64.step(lambda params, k: self.loss(params, k in self.used))


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("only", [True, False], ids=["only_in", "missing_in"])
@pytest.mark.parametrize(("method", "k"), EVERY_PASS)
def test_missing_counts_as_zero(method, k, only, base, backend):
    everywhere = set(range(PASSES[method]))
    task = Branching(method, base, {k} if only else everywhere - {k}, backend)
    for _ in range(3):
        task.step()
    close([task.main, task.extra, task.twin], task.float64.theta, 1e-9)
    assert not task.optimizer.skipped_steps


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_missing_in_every_pass_leaves_the_parameter_alone(method, base, backend):
    task = Branching(method, base, set(), backend)
    before = weights(task.optimizer)
    for _ in range(3):
        task.step()
    after = weights(task.optimizer)
    same(after[1:], before[1:])
    assert not torch.equal(after[0], before[0])
    close([task.main], task.float64.theta[:1], 1e-9)
    state = task.optimizer.state_dict()["state"]
    assert list(state) == [0]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("method", METHODS)
def test_missing_in_every_pass_in_low_precision(method, backend):
    """There gradients are accumulated in a float32 copy; that a copy has a place for it makes no gradient."""
    for kind, options in BASES.values():
        used, unused = nn.Parameter(torch.randn(7).bfloat16()), nn.Parameter(torch.randn(5).bfloat16())
        before = unused.detach().clone()
        optimizer = make([used, unused], kind, method, backend=backend, **options)
        for _ in range(2):
            optimizer.step(lambda used=used: (used.float() ** 2).sum())
        same(unused.detach(), before)
        assert optimizer.state[used]
        assert unused not in optimizer.state


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_state_of_a_parameter_that_pauses_stays(method, base):
    """Used in one step, not in the next: momentum and step count wait, as in torch.optim."""
    everywhere = set(range(PASSES[method]))
    task = Branching(method, base, everywhere)
    for used in (everywhere, set(), everywhere):
        task.used = used
        before = task.optimizer.state_dict()["state"]
        frozen = copy.deepcopy(before.get(1, {}))
        task.step()
        if not used:
            after = task.optimizer.state_dict()["state"][1]
            assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(frozen[key])) for key in frozen)
    close([task.main, task.extra, task.twin], task.float64.theta, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_appears_late(method):
    """No gradient in the first steps, then one: it starts as a fresh parameter would (dampening, bias correction)."""
    for base in BASES:
        task = Branching(method, base, set())
        task.step()
        task.used = set(range(PASSES[method]))
        task.step(), task.step()
        close([task.main, task.extra, task.twin], task.float64.theta, 1e-9, base)


@pytest.mark.parametrize("method", METHODS)
def test_stochastic_depth_and_unused_heads_train(method):
    """Layers that are dropped at random per pass (no replay): no error, weights finite, unused head untouched."""
    model = nn.ModuleList([mlp(), nn.Linear(2, 2), nn.Linear(2, 2)])
    x, y = batch()
    calls = iter(range(1000))

    def loss_fn():
        body = model[0](x)
        return ((model[1](body) if next(calls) % 3 else body) - y).square().mean()

    optimizer = make(model.parameters(), method=method, weight_decay=0.1)
    head = weights(optimizer)[-2:]

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        if method != "exact":
            loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    same(weights(optimizer)[-2:], head)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_only_the_gradient_that_is_there_counts_in_the_norm():
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    model[2].bias.requires_grad_(False)
    optimizer = make(model.parameters(), method="sam", momentum=0.0)
    loss_fn = regression(model, x, y)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(optimizer.diagnostics()["perturbation_0"].item(), 0.1, rtol=1e-9, atol=0)
