"""Settings that must reduce to a known optimizer, exactly or to rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from float64_gam import Gam64
from gam_helpers import (
    METHODS,
    PASSES,
    SETTINGS,
    batch,
    close,
    closure_of,
    functional_loss,
    make,
    mlp,
    regression,
    same,
    weights,
)

from gam_fused import FusedGAM, FusedSAM

FUSED = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
}
FOREIGN = {
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, alpha=0.99),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.01),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),
    "adamax": functools.partial(torch.optim.Adamax, lr=0.01),
    "radam": functools.partial(torch.optim.RAdam, lr=0.01),
}


class OwnSGD(torch.optim.SGD):
    """A subclass that changes nothing: still not exactly torch.optim.SGD, so it is stepped, not fused."""


class OwnAdam(torch.optim.Adam):
    """Likewise."""


def run(optimizer, model, steps=5, dtype=torch.float64):
    closure = closure_of(optimizer, regression(model, *batch(dtype=dtype)))
    for _ in range(steps):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


def gam(base, method="finite_difference", dtype=torch.float64, **options):
    model = mlp(dtype)
    return run(FusedGAM(model.parameters(), base, **{"method": method, **SETTINGS[method], **options}), model, dtype=dtype)


def plain(base, dtype=torch.float64):
    model = mlp(dtype)
    return run(base(model.parameters()), model, dtype=dtype)


@pytest.mark.parametrize("base", [*FUSED, *FOREIGN])
@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"rho": 0.0}], ids=["alpha-0", "rho-0"])
def test_finite_difference_without_the_flatness_term_is_the_base(base, options):
    kind = {**FUSED, **FOREIGN}[base]
    close(gam(kind, **options), plain(kind), 1e-11)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_0_is_the_base_to_rounding_of_its_dtype(base, dtype):
    for mine, theirs in zip(gam(FUSED[base], dtype=dtype, alpha=0.0), plain(FUSED[base], dtype), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=64 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("base", [*FUSED, *FOREIGN])
def test_exact_with_alpha_0_is_the_base(base):
    kind = {**FUSED, **FOREIGN}[base]
    close(gam(kind, "exact", alpha=0.0), plain(kind), 1e-11)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("adaptive", [False, True])
def test_accelerated_with_alpha_1_and_gamma_0_is_sam_with_radius_rho_prime(base, adaptive):
    mine = gam(FUSED[base], "accelerated", alpha=1.0, gamma=0.0, rho_prime=0.07, adaptive=adaptive)
    close(mine, gam(FUSED[base], "sam", rho=0.07, adaptive=adaptive), 1e-11)


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("sam_rho", [0.05, 0.2])
def test_the_sam_oracle_without_the_flatness_term_is_sam(base, sam_rho):
    mine = gam(FUSED[base], alpha=0.0, oracle="sam", sam_rho=sam_rho)
    close(mine, gam(FUSED[base], "sam", rho=sam_rho), 1e-11)


def test_sam_with_rho_0_is_the_base():
    close(gam(FUSED["sgd"], "sam", rho=0.0), plain(FUSED["sgd"]), 1e-11)


def test_fused_sam_is_fused_gam_with_method_sam():
    model, other = mlp(), mlp()
    first = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    run(first, model, dtype=torch.float32)
    second = make(other.parameters(), method="sam", rho=0.1)
    run(second, other, dtype=torch.float32)
    same(weights(first), weights(second))
    assert isinstance(first, FusedGAM)


def quadratic(n: int = 6):
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float64), torch.randn(n, generator=generator).double()
    return lambda theta: 0.5 * theta @ matrix @ theta - b @ theta


@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": True}, {"maximize": True}, {"oracle": "sam", "sam_rho": 0.3}, {"rho_prime": 1.0}, {"rho_prime": 1e-3}],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
def test_on_a_quadratic_finite_difference_is_exact(options):
    loss_fn, results = quadratic(), []
    for method in ("finite_difference", "exact"):
        theta = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
        mine = {k: v for k, v in options.items() if k != "rho_prime" or method == "finite_difference"}
        optimizer = make([theta], method=method, lr=0.02, **mine)
        for _ in range(10):
            optimizer.step(lambda theta=theta: loss_fn(theta))
        results.append(theta.detach())
    close(results[:1], results[1:], 1e-9)


@pytest.mark.parametrize(
    "second", [{}, {"perturb": False}, {"maximize": True}, {"rho": 0.0}], ids=["own_rho", "cross_term", "saddle", "rho-0"]
)
def test_on_a_quadratic_groups_too(second):
    loss_fn, results = quadratic(), []
    for method in ("finite_difference", "exact"):
        a = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
        b = torch.tensor([1.5, -0.5], dtype=torch.float64).requires_grad_()
        optimizer = make([{"params": [a]}, {"params": [b], "rho": 0.4, **second}], method=method, lr=0.02)
        for _ in range(10):
            optimizer.step(lambda a=a, b=b: loss_fn(torch.cat([a, b])))
        results.append([a.detach(), b.detach()])
    close(*results, 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("own", "fused"), [(OwnSGD, torch.optim.SGD), (OwnAdam, torch.optim.Adam)], ids=["sgd", "adam"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"adaptive": True}], ids=["plain", "clipped", "adaptive"])
def test_a_subclass_that_changes_nothing_equals_the_fused_update(own, fused, method, options):
    extra = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01} if own is OwnSGD else {"weight_decay": 0.01}
    results = []
    for kind in (own, fused):
        model = mlp(torch.float64)
        results.append(run(make(model.parameters(), kind, method, lr=0.05, **extra, **options), model))
    close(*results, 1e-11)


@pytest.mark.parametrize("base", FOREIGN)
@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_base_is_fed_the_direction(base, method):
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    settings = dict(SETTINGS[method])
    groups = [{"params": list(model.parameters()), "rho": settings.pop("rho")}]
    float64 = Gam64(groups, method=method, base=FOREIGN[base], max_grad_norm=0.05, **settings)
    loss_fn = functional_loss(model, x, y)
    optimizer = FusedGAM(model.parameters(), FOREIGN[base], method=method, max_grad_norm=0.05, **SETTINGS[method])
    closure = closure_of(optimizer, regression(model, x, y))
    for _ in range(5):
        optimizer.step(closure)
        float64.step(loss_fn)
    close(list(model.parameters()), float64.theta, 1e-9)


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_interval_counts_passes(method, interval):
    model = mlp()
    optimizer = make(model.parameters(), method=method, interval=interval)
    loss_fn, calls, counts = regression(model, *batch()), [], []
    for _ in range(10):
        calls.clear()
        optimizer.step(lambda: calls.append(1) or loss_fn())
        counts.append(len(calls))
    off = 1
    assert sorted(counts) == sorted([PASSES[method]] * (10 // interval) + [off] * (10 - 10 // interval))
    assert counts[:interval] == counts[interval : 2 * interval] or interval == 1
