"""Contract, point 7, and closures: a step returns the unperturbed loss, takes gradients and leaves none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gam_helpers import METHODS, PASSES, batch, closure_of, make, mlp, regression, same, snapshot, trainer, weights

from gam_fused import FusedGAM

FIRST_ORDER = [m for m in METHODS if m != "exact"]
BASES = {"sgd": torch.optim.SGD, "foreign": torch.optim.RMSprop}


def trained(closure_factory, method="finite_difference", base="sgd", steps=3, **options):
    """Weights after some steps with the closure that `closure_factory(optimizer, model, loss_fn)` makes."""
    model = mlp()
    optimizer = make(model.parameters(), BASES[base], method, lr=0.05, **options)
    closure = closure_factory(optimizer, model, regression(model, *batch()))
    for _ in range(steps):
        optimizer.step(closure)
    return weights(optimizer)


def ordinary(optimizer, model, loss_fn):
    return closure_of(optimizer, loss_fn, backward=optimizer.method != "exact")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_returns_the_loss_of_pass_1_and_leaves_no_gradient(method, base):
    model = mlp()
    loss_fn = regression(model, *batch())
    optimizer, closure = trainer(method, model, loss_fn, BASES[base], lr=0.05)
    for _ in range(3):
        expected = loss_fn().detach()
        loss = optimizer.step(closure)
        assert torch.equal(loss.detach(), expected)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_interval_off_steps_return_their_loss_and_leave_no_gradient(method):
    model = mlp()
    loss_fn = regression(model, *batch())
    optimizer, closure = trainer(method, model, loss_fn, interval=2)
    for _ in range(4):
        expected = loss_fn().detach()
        assert torch.equal(optimizer.step(closure).detach(), expected)
        assert all(p.grad is None for p in model.parameters())


def without_backward(optimizer, model, loss_fn):
    return loss_fn


def without_zero_grad(optimizer, model, loss_fn):
    def closure():
        loss = loss_fn()
        loss.backward()
        return loss

    return closure


def zeroing_in_place(optimizer, model, loss_fn):
    def closure():
        optimizer.zero_grad(set_to_none=False)
        return without_zero_grad(optimizer, model, loss_fn)()

    return closure


def zeroing_only(optimizer, model, loss_fn):
    return closure_of(optimizer, loss_fn, backward=False)


def returning_nothing(optimizer, model, loss_fn):
    def closure():
        without_zero_grad(optimizer, model, loss_fn)()

    return closure


def in_two_backwards(optimizer, model, loss_fn):
    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        (0.5 * loss).backward(retain_graph=True)
        (0.5 * loss).backward()
        return loss

    return closure


def by_autograd_grad(optimizer, model, loss_fn):
    def closure():
        loss = loss_fn()
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        return loss

    return closure


def in_a_flat_buffer(optimizer, model, loss_fn):
    """The same views of one buffer of the user's, overwritten in each pass, as DDP's block views are."""
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params))

    def closure():
        loss = loss_fn()
        start = 0
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = flat[start : start + p.numel()].view_as(p)
            p.grad.copy_(g)
            start += p.numel()
        return loss

    return closure


def in_static_tensors(optimizer, model, loss_fn):
    """Gradients of their own storage that the user holds and overwrites, as CUDA graphs do."""
    params = list(model.parameters())
    static = [torch.zeros_like(p) for p in params]

    def closure():
        loss = loss_fn()
        for p, s, g in zip(params, static, torch.autograd.grad(loss, params), strict=True):
            p.grad = s.copy_(g)
        return loss

    return closure


def accumulating_in_views(optimizer, model, loss_fn):
    """backward() accumulates into views that the user has put in place and zeroed."""
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params))
    views = [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]

    def closure():
        flat.zero_()
        for p, v in zip(params, views, strict=True):
            p.grad = v
        loss = loss_fn()
        loss.backward()
        return loss

    return closure


CLOSURES = [
    without_backward,
    without_zero_grad,
    zeroing_in_place,
    zeroing_only,
    returning_nothing,
    in_two_backwards,
    by_autograd_grad,
    in_a_flat_buffer,
    in_static_tensors,
    accumulating_in_views,
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("closure_factory", CLOSURES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_every_kind_of_closure_gives_the_same_step(method, closure_factory, base):
    same(trained(closure_factory, method, base), trained(ordinary, method, base))


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_without_backward_serves_every_method(method):
    same(trained(without_backward, method), trained(ordinary, method))


def test_exact_refuses_a_closure_that_calls_backward():
    model = mlp()
    optimizer = make(model.parameters(), method="exact")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"exact(.|\n)*backward|backward(.|\n)*exact"):
        optimizer.step(without_zero_grad(optimizer, model, regression(model, *batch())))
    same(snapshot(optimizer), before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_gradients_that_the_user_keeps_are_not_changed(method, base):
    kept = []

    def keeping(optimizer, model, loss_fn):
        def closure():
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            kept.extend((p.grad, p.grad.clone()) for p in model.parameters())
            return loss

        return closure

    trained(keeping, method, base)
    assert len(kept) == 3 * PASSES[method] * 4
    assert all(torch.equal(mine, copy) for mine, copy in kept)


@pytest.mark.parametrize(  # a closure of `exact` does not call backward
    ("method", "closure_factory"),
    [(m, c) for m in METHODS for c in (without_zero_grad, without_backward, returning_nothing)
     if m != "exact" or c is without_backward],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_stale_gradients_are_not_counted(method, closure_factory):
    results = []
    for stale in (False, True):
        model = mlp()
        optimizer = make(model.parameters(), method=method)
        closure = closure_factory(optimizer, model, regression(model, *batch()))
        for _ in range(2):
            if stale:
                for p in model.parameters():
                    p.grad = torch.full_like(p, 100.0)
            optimizer.step(closure)
        results.append(weights(optimizer))
    same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_inside_no_grad(method):
    def under_no_grad(optimizer, model, loss_fn):
        step, inner = optimizer.step, ordinary(optimizer, model, loss_fn)

        def quiet(closure):
            with torch.no_grad():
                return step(closure)

        optimizer.step = quiet
        return inner

    same(trained(under_no_grad, method), trained(ordinary, method))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_the_returned_loss_holds_no_graph(method):
    model = mlp()
    optimizer, closure = trainer(method, model, regression(model, *batch()))
    assert not optimizer.step(closure).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_autograd_expands_or_shares(method):
    """Gradients of a sum are one number, expanded; those of a + b are one tensor."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    expected = [t.detach() - 0.1 for t in (a, b, c)]
    optimizer = make([a, b, c], method=method, momentum=0.0)
    optimizer.step(lambda: (a + b).sum() + c.sum())
    for t, e in zip((a, b, c), expected, strict=True):
        torch.testing.assert_close(t.detach(), e)


def test_an_expanded_gradient_that_the_user_sets():
    a = torch.ones(3, 4, requires_grad=True)
    optimizer = make([a], momentum=0.0)

    def closure():
        a.grad = torch.ones(()).expand(3, 4)
        return (a.detach() * 1).sum()

    optimizer.step(closure)
    torch.testing.assert_close(a.detach(), torch.full((3, 4), 0.9))


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping"])
@pytest.mark.parametrize(  # a closure of `exact` does not call backward
    ("method", "backward"), [(m, backward) for m in METHODS for backward in (False, True) if m != "exact" or not backward]
)
def test_a_closure_may_return_more_than_the_loss(method, backward, kind):
    """What it returned at the unperturbed weights comes back, detached: accuracies logged from it are those of pass 1."""
    model, (x, y) = mlp(), batch()
    optimizer = make(model.parameters(), method=method)
    expected = model(x).detach()

    def closure():
        out = model(x)
        loss = (out - y).square().mean()
        if backward:
            loss.backward()
        return {"tuple": (loss, {"out": out}), "list": [loss, out], "mapping": {"loss": loss, "out": out}}[kind]

    result = optimizer.step(closure)
    out = {"tuple": lambda: result[1]["out"], "list": lambda: result[1], "mapping": lambda: result["out"]}[kind]()
    loss = result["loss"] if kind == "mapping" else result[0]
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert not loss.requires_grad
    assert optimizer.diagnostics()["loss"].item() == pytest.approx(loss.item())
    assert type(result) is {"tuple": tuple, "list": list, "mapping": dict}[kind]


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_computed_outside_of_the_closure_is_explained(method):
    model = mlp()
    optimizer = make(model.parameters(), method=method)
    loss = regression(model, *batch())().detach()
    with pytest.raises(RuntimeError, match="outside of the closure"):
        optimizer.step(lambda: loss)


def test_a_module_gives_its_parameters_and_itself():
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))
    optimizer = FusedGAM(model, torch.optim.SGD, lr=0.1)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    optimizer.step(regression(model, *batch()))
    assert int(model[1].num_batches_tracked) == 1
    instance = FusedGAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    instance.step(regression(model, *batch()))
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs torch with Tensor.grad_dtype")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_gradients_may_have_a_dtype_of_their_own(base, hooked):
    """`p.grad_dtype`: the direction that a base optimizer finds in `p.grad` is of that dtype."""
    model, found = mlp(torch.bfloat16), []
    for p in model.parameters():
        p.grad_dtype = torch.float32
    optimizer = make(model, BASES[base], lr=0.05)
    if hooked:
        optimizer.base_optimizer.register_step_pre_hook(lambda base, *_: found.extend(p.grad for p in model.parameters()))
    before = weights(optimizer)
    optimizer.step(regression(model, *batch(dtype=torch.bfloat16)))
    assert not any(map(torch.equal, weights(optimizer), before))
    assert [g.dtype for g in found] == [torch.float32] * 4 * hooked


@pytest.mark.parametrize("number", [np.float32, np.float64, float])
def test_a_loss_of_numpy_is_in_the_diagnostics(number):
    model = mlp()
    optimizer = make(model)
    loss_fn = regression(model, *batch())
    expected = loss_fn().item()

    def closure():
        loss = loss_fn()
        loss.backward()
        return number(loss.item())

    loss = optimizer.step(closure)
    assert type(loss) is number
    assert optimizer.diagnostics()["loss"].item() == pytest.approx(expected)
    assert optimizer.diagnostics()["sharpness"].isfinite()
