"""The bound on the flatness term: what it promises, what it reports, what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from float64_gam import Gam64
from gam_helpers import SETTINGS, backend_params, batch, bits, closure_of, functional_loss, make, mlp, regression, same
from torch import nn

from gam_fused import FusedGAM, FusedSAM

METHODS = ("finite_difference", "exact", "gradient_penalty")
INFINITE = float("inf")


def random_net(seed: int) -> nn.Sequential:
    """Weights so large that gradients turn within the radius."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def waves(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss with concave parts, where a descent makes gradients longer."""
    return torch.sin(3 * (out - y)).mean()


def direction(optimizer, model, closure) -> torch.Tensor:
    """d of one step, from what plain SGD with lr 1 makes of it."""
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer.step(closure)
    return before - nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("oracle", ["loss", "sam"])
@pytest.mark.parametrize("method", METHODS)
def test_every_direction_descends(method, oracle, backend):
    """<d, h_loss> >= (1 - max_ratio) |h_loss|^2, and the unbounded direction does not always."""
    broken = 0
    for seed in range(30):
        model, (x, y) = random_net(seed), batch(dtype=torch.float64, seed=seed)
        options = {"rho": 0.5, "alpha": 5.0, "oracle": oracle, "sam_rho": 0.3 if oracle == "sam" else None, "lr": 1.0}
        options |= {"rho_prime": 0.05, "momentum": 0.0}
        settings = {"rho_prime": 0.05, "alpha": 5.0, "oracle": oracle, "sam_rho": 0.3}
        float64 = Gam64([{"params": list(model.parameters()), "rho": 0.5}], method=method, **settings)
        float64.direction(functional_loss(model, x, y, waves))
        h_loss = torch.cat([t.flatten() for t in float64.minus])
        for max_ratio in (0.1, 0.9, None):
            twin = copy.deepcopy(model)
            optimizer = make(twin.parameters(), method=method, backend=backend, **options, max_ratio=max_ratio)
            d = direction(optimizer, twin, closure_of(optimizer, lambda m=twin, x=x, y=y: waves(m(x), y)))
            least = (1 - (max_ratio or 0.9)) * h_loss.square().sum()
            if max_ratio is None:
                broken += int(d @ h_loss < least)
            else:
                assert d @ h_loss >= least * (1 - 1e-9) - 1e-12, (seed, max_ratio)
    assert broken, "the networks are too tame for the test"


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("method", METHODS)
def test_diagnostics_of_the_bound(method, backend):
    model, (x, y) = mlp(torch.float64), batch(dtype=torch.float64)
    for alpha, max_ratio in ((0.7, 1e-3), (0.7, 1e3), (INFINITE, 0.5), (0.7, 0.0)):
        optimizer = make(model.parameters(), method=method, backend=backend, alpha=alpha, max_ratio=max_ratio)
        settings = {k: v for k, v in SETTINGS[method].items() if k != "rho"} | {"alpha": alpha, "max_ratio": max_ratio}
        float64 = Gam64([{"params": list(model.parameters()), "rho": SETTINGS[method]["rho"]}], method=method, **settings)
        float64.direction(functional_loss(model, x, y))
        optimizer.step(closure_of(optimizer, regression(model, x, y)))
        seen = optimizer.diagnostics()
        norms = [math.sqrt(float64.dot(v, v)) for v in (float64.plus, float64.minus)]
        ratio = max_ratio if alpha == INFINITE else alpha * norms[0] / norms[1]
        assert seen["ratio"].item() == pytest.approx(ratio, rel=1e-6, abs=1e-12)
        assert seen["bounded"].item() == (alpha == INFINITE or ratio > max_ratio)
        assert seen["cosine"].item() == pytest.approx(float64.dot(float64.plus, float64.minus) / math.prod(norms), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_scale_is_no_part_of_the_ratio(method):
    """xi is added to norms of gradients, not of scaled ones."""
    models = mlp(torch.float64), mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cpu", init_scale=1024.0)), strict=True):
        optimizer = make(
            model.parameters(), method=method, alpha=INFINITE, max_ratio=0.5, xi=0.1, grad_scaler=scaler, model=model
        )
        for _ in range(3):
            optimizer.step(regression(model, x, y))
            if scaler:
                scaler.update()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_bound_there_is_nothing_to_report(method):
    model = mlp()
    optimizer = make(model.parameters(), method=method, max_ratio=None)
    optimizer.step(closure_of(optimizer, regression(model, *batch())))
    assert not {"ratio", "bounded"} & set(optimizer.diagnostics())


def test_a_bound_that_a_schedule_lifts():
    """As a number, to None and back: as optimizers that were made with each."""
    for_each = {r: mlp(torch.float64) for r in (0.01, 0.5, None)}
    model, (x, y) = mlp(torch.float64), batch(dtype=torch.float64)
    optimizer = make(model.parameters(), alpha=INFINITE, max_ratio=0.01, momentum=0.0)
    for max_ratio, twin in for_each.items():
        same_start = make(twin.parameters(), max_ratio=max_ratio, momentum=0.0, alpha=3.0 if max_ratio is None else INFINITE)
        twin.load_state_dict(model.state_dict())
        optimizer.alpha, optimizer.max_ratio = (3.0, None) if max_ratio is None else (INFINITE, max_ratio)
        for o, net in ((optimizer, model), (same_start, twin)):
            o.step(closure_of(o, regression(net, x, y)))
        same(list(map(bits, model.parameters())), list(map(bits, twin.parameters())))


def test_checkpoints_hold_the_bound_and_the_part():
    model = mlp()
    optimizer = make(model.parameters(), max_ratio=0.25, flatness_fraction=0.5)
    optimizer.step(lambda b: regression(model, *b)(), batch())
    state = optimizer.state_dict()
    other = make(model.parameters(), max_ratio=None)
    other.load_state_dict(copy.deepcopy(state))
    assert (other.max_ratio, other.flatness_fraction) == (0.25, 0.5)
    older = copy.deepcopy(state)
    for name in ("max_ratio", "flatness_fraction"):
        del older["param_groups"][0]["gam"][name]
    third = make(model.parameters(), max_ratio=0.125)
    third.load_state_dict(older)
    assert (third.max_ratio, third.flatness_fraction) == (0.125, 1.0)
    unbounded = make(model.parameters(), max_ratio=None).state_dict()
    third.load_state_dict(unbounded)
    assert third.max_ratio is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sam", "max_ratio": 0.5}, r"max_ratio=0.5 .*method='sam'.*is for 'exact', 'finite_difference'"),
        ({"method": "accelerated", "max_ratio": 0.5}, r"max_ratio=0.5 .*method='accelerated'"),
        ({"max_ratio": -0.1}, r"max_ratio=-0.1 must be at least 0"),
        ({"max_ratio": float("nan")}, r"max_ratio=nan must be finite"),
        ({"max_ratio": INFINITE}, r"max_ratio=inf must be finite"),
        ({"alpha": INFINITE, "max_ratio": None}, r"alpha=inf must be finite"),
        ({"method": "gsam", "alpha": INFINITE}, r"alpha=inf must be finite"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        FusedGAM(mlp(), lr=0.1, **options)


def test_a_word_is_no_bound():
    with pytest.raises(TypeError, match="max_ratio must be a number"):
        FusedGAM(mlp(), lr=0.1, max_ratio="none")


def test_the_method_may_change_to_one_without_a_bound():
    model, (x, y) = mlp(), batch()
    optimizer = make(model.parameters(), alpha=0.5, max_ratio=0.5, momentum=0.0)
    optimizer.method = "sam"
    twin = mlp()
    sam = FusedSAM(twin, rho=SETTINGS["finite_difference"]["rho"], lr=0.1)
    optimizer.step(regression(model, x, y))
    sam.step(regression(twin, x, y))
    same(list(map(bits, model.parameters())), list(map(bits, twin.parameters())))


@pytest.mark.parametrize("backend", backend_params())
def test_an_infinite_alpha_and_no_curvature_move_nothing_but_the_loss(backend):
    """A linear loss has no h_norm: the weight of it grows to its limit, and 0 stays 0."""
    p = nn.Parameter(torch.ones(3))
    for xi in (1e-12, 0.0):
        optimizer = FusedGAM([p], lr=0.5, alpha=INFINITE, max_ratio=0.9, xi=xi, backend=backend)
        before = p.detach().clone()
        optimizer.step(lambda: p.sum())
        assert torch.equal(p.detach(), before - 0.5)
        assert optimizer.skipped_steps == 0


class OwnSGD(torch.optim.SGD):
    """Not fused: it finds d in `p.grad`, in the memory of the last gradient."""


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize(
    "oracle", [{}, {"oracle": "sam"}, {"oracle": "sam", "sam_rho": 0.2}], ids=["loss", "sam", "sam-0.2"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_is_not_fused_gets_the_same_direction(method, oracle, fraction, backend):
    data = batch(16, dtype=torch.float64)
    for bound in ({"max_ratio": None}, {"max_ratio": 0.05}, {"max_ratio": 0.5, "alpha": INFINITE}):
        models = mlp(torch.float64), mlp(torch.float64)
        for model, base in zip(models, (torch.optim.SGD, OwnSGD), strict=True):
            options = {"lr": 0.1, "momentum": 0.9, "flatness_fraction": fraction, **oracle, **bound}
            optimizer = make(model.parameters(), base, method, backend=backend, **options)
            for _ in range(3):
                optimizer.step(lambda b, m=model: regression(m, *b)(), data)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
