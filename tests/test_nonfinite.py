"""Contract, point 5: a gradient that is not finite, in any pass and any parameter, skips the step and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import (
    EVERY_PASS,
    METHODS,
    PASSES,
    backend_params,
    batch,
    closure_of,
    frozen_without_counters,
    make,
    mlp,
    regression,
    same,
    trainer,
    weights,
)  # fmt: skip

BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "foreign": (torch.optim.NAdam, {}),
}
BAD = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class Task:
    """A model of three groups, one of them unperturbed, whose gradient is made not finite in one pass of a step."""

    def __init__(self, method, base="sgd", backend="auto", **options):
        self.model = mlp()
        kind, base_options = BASES[base]
        groups = [
            {"params": [self.model[0].weight]},
            {"params": [self.model[0].bias, self.model[2].weight], "rho": 0.2},
            {"params": [self.model[2].bias], "perturb": False},
        ]
        self.parameters = {"first": self.model[0].weight, "perturbed": self.model[0].bias, "unperturbed": self.model[2].bias}
        self.optimizer = make(groups, kind, method, backend=backend, **base_options, **options)
        self.method, self.loss_fn = method, regression(self.model, *batch())
        self.count, self.bad, self.value, self.target = 0, None, 0.0, None

    def closure(self):
        k, self.count = self.count, self.count + 1
        self.optimizer.zero_grad()
        loss = self.loss_fn()
        if k == self.bad and self.method == "exact":
            loss = loss + (self.parameters[self.target].flatten()[0] * self.value)
        if self.method != "exact":
            loss.backward()
            if k == self.bad:
                self.parameters[self.target].grad.view(-1)[-1] = self.value
        return loss

    def step(self, bad=None, value=0.0, target="perturbed"):
        self.count, self.bad, self.value, self.target = 0, bad, value, target
        return self.optimizer.step(self.closure)

    def frozen(self):
        return frozen_without_counters(self.optimizer)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("target", ["perturbed", "unperturbed"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_a_bad_step_leaves_no_trace(method, bad, base, target, value):
    task, twin = Task(method, base), Task(method, base)
    task.step(), twin.step()
    before = task.frozen()
    task.step(bad, BAD[value], target)
    same(task.frozen(), before)
    assert int(task.optimizer.skipped_steps) == 1
    task.step(), twin.step()
    task.step(), twin.step()
    same(task.frozen(), twin.frozen())
    assert int(task.optimizer.skipped_steps) == 1


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("target", ["first", "unperturbed"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_a_bad_first_step_leaves_no_trace(method, bad, base, target, backend):
    """The hard case: no state exists yet, and SGD's first momentum ignores the dampening."""
    task, twin = Task(method, base, backend), Task(method, base, backend)
    before = task.frozen()
    task.step(bad, float("inf"), target)
    same(task.frozen(), before)
    task.step(bad, float("nan"), target)
    same(task.frozen(), before)
    for _ in range(3):
        task.step(), twin.step()
    same(task.frozen(), twin.frozen())
    assert int(task.optimizer.skipped_steps) == 2


@pytest.mark.parametrize("base", ["sgd", "foreign"])
@pytest.mark.parametrize("method", METHODS)
def test_passes_after_the_bad_one_run_at_finite_weights(method, base):
    task = Task(method, base)
    seen = []
    inner = task.loss_fn

    def watched():
        seen.append(all(bool(torch.isfinite(p).all()) for p in task.model.parameters()))
        return inner()

    task.loss_fn = watched
    task.step(0, float("nan"), "first")
    assert len(seen) == PASSES[method]
    assert all(seen)


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0.1}, {"adaptive": True}, {"flatten": True}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize(("method", "bad"), EVERY_PASS)
def test_with_options(method, bad, options):
    task, twin = Task(method, **options), Task(method, **options)
    task.step(), twin.step()
    before = task.frozen()
    task.step(bad, float("nan"), "unperturbed")
    task.step(bad, float("inf"), "first")
    same(task.frozen(), before)
    assert int(task.optimizer.skipped_steps) == 2
    task.step(), twin.step()
    same(task.frozen(), twin.frozen())


def test_an_off_step_is_guarded_too():
    task = Task("finite_difference", interval=2)
    task.step()
    before = task.frozen()
    task.step(0, float("nan"), "unperturbed")
    assert task.count == 1
    same(task.frozen(), before)
    assert int(task.optimizer.skipped_steps) == 1


@pytest.mark.parametrize("oracle_method", ["finite_difference", "exact"])
def test_the_oracles_own_pass_is_guarded(oracle_method):
    for bad in range({"finite_difference": 5, "exact": 3}[oracle_method]):
        for target in ("perturbed", "unperturbed"):
            task = Task(oracle_method, oracle="sam", sam_rho=0.3)
            task.step()
            before = task.frozen()
            task.step(bad, float("inf"), target)
            same(task.frozen(), before, f"pass {bad}, {target}")
            assert int(task.optimizer.skipped_steps) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_of_zero_is_not_an_overflow(method):
    model = mlp()
    optimizer, closure = trainer(method, model, lambda: 0.0 * regression(model, *batch())(), momentum=0.0)
    before = weights(optimizer)
    loss = optimizer.step(closure)
    assert loss.item() == 0.0
    assert int(optimizer.skipped_steps) == 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    same(weights(optimizer), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_with_finite_gradients_is_no_reason_to_skip(method):
    model = mlp()
    optimizer, closure = trainer(method, model, lambda: regression(model, *batch())() + float("inf"))
    assert optimizer.step(closure).item() == float("inf")
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_squares_out_of_range_of_fp32_do_not_skip(method, scale):
    """Gradients whose squares leave fp32: the direction of the ascents is still the same."""
    tame, wild = mlp(), mlp()
    x, y = batch()
    results = []
    for model, factor, lr in ((tame, 1.0, 0.1), (wild, scale, 0.1 / scale)):
        loss_fn = regression(model, x, y)
        optimizer, closure = trainer(method, model, lambda loss_fn=loss_fn, factor=factor: loss_fn() * factor, lr=lr, xi=0.0)
        optimizer.step(closure)
        assert int(optimizer.skipped_steps) == 0
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(  # a closure of `exact` does not call backward
    ("method", "backward"), [(m, backward) for m in METHODS for backward in (False, True) if m != "exact" or not backward]
)
def test_grad_scaler_scales_and_backs_off(method, backward):
    plain, scaled = mlp(), mlp()
    x, y = batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    reference, closure = trainer(method, plain, regression(plain, x, y))
    optimizer = make(scaled.parameters(), method=method, grad_scaler=scaler)
    loss_fn, spoil = regression(scaled, x, y), [1.0]

    def scaled_closure():
        optimizer.zero_grad()
        loss = loss_fn() * spoil[0]
        if backward:
            scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        expected = reference.step(closure).item()
        assert optimizer.step(scaled_closure).item() == pytest.approx(expected, rel=1e-5)
        scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before, spoil[0] = weights(optimizer), float("inf")
    optimizer.step(scaled_closure)
    scaler.update()
    same(weights(optimizer), before)
    assert int(optimizer.skipped_steps) == 1
    assert scaler.get_scale() == 512.0
    closure_of(optimizer, loss_fn, backward=False)


def test_a_plain_step_after_a_skipped_one_is_made():
    model = mlp()
    optimizer = make(model.parameters(), interval=2, model=model)
    loss_fn = regression(model, *batch())
    calls = []

    def second_pass_is_infinite():
        calls.append(1)
        return loss_fn() * (float("inf") if len(calls) == 2 else 1.0)

    before = weights(optimizer)
    optimizer.step(second_pass_is_infinite)
    same(weights(optimizer), before)
    optimizer.step(loss_fn)
    assert not all(torch.equal(a, b) for a, b in zip(weights(optimizer), before, strict=True))
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("change", ["a new group", "a frozen parameter", "perturb"])
def test_counts_go_on_where_the_groups_change(change):
    model, other = mlp(), torch.nn.Parameter(torch.ones(2))
    optimizer = make(model.parameters(), model=model)
    optimizer.step(lambda: regression(model, *batch())() * float("nan"))
    optimizer.step(regression(model, *batch()))
    if change == "a new group":
        optimizer.add_param_group({"params": [other]})
    elif change == "a frozen parameter":
        model[0].bias.requires_grad_(False)
    else:
        optimizer.param_groups[0]["perturb"] = False
    optimizer.step(regression(model, *batch()))
    assert optimizer.skipped_steps == 1
    assert optimizer.state_dict()["param_groups"][0]["gam"]["noise_step"] == 3
