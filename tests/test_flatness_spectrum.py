"""Eigenvalues, trace and spectral density against dense Hessians in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_flatness import dense_hessian, quadratic
from torch import nn

from gam_fused import flatness

PROBES = {"hutchinson": 60, "hutch++": 60}


@pytest.fixture(scope="module")
def digits():
    """A network of 379 parameters that has learnt something, its loss and the eigenvalues of its Hessian, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    x = torch.randn(60, 8, dtype=torch.float64)
    y = torch.sin(x.sum(dim=1, keepdim=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss():
        return nn.functional.mse_loss(model(x), y)

    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return model, loss, torch.linalg.eigvalsh(dense_hessian(model, loss)).flip(0)


@pytest.mark.parametrize("k", [1, 10, 50])
def test_the_largest_eigenvalues_are_those_of_the_dense_hessian(digits, k):
    model, loss, exact = digits
    found = flatness.hessian_eigenvalues(loss, model, k, tolerance=1e-6)
    torch.testing.assert_close(found, exact[:k], rtol=1e-9, atol=0.0)
    coarse = flatness.hessian_eigenvalues(loss, model, k)
    torch.testing.assert_close(coarse, exact[:k], rtol=1e-3, atol=0.0)


def test_a_basis_of_few_vectors_is_restarted(digits):
    """More products than vectors are kept: at k = 1 that is 42 of them."""
    model, loss, exact = digits
    done = []
    found = flatness.hessian_eigenvalues(loss, model, 1, tolerance=1e-14, progress=lambda n, _: done.append(n))
    torch.testing.assert_close(found, exact[:1], rtol=1e-12, atol=0.0)
    loss, params = quadratic(torch.linspace(0, 1, 400).tolist())
    found = flatness.hessian_eigenvalues(
        loss, params, 1, tolerance=1e-6, max_iterations=300, progress=lambda n, _: done.append(n)
    )
    assert done[-1] > 42
    torch.testing.assert_close(found.item(), 1.0, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("copies", [2, 5])
def test_multiple_eigenvalues_are_listed_as_often_as_they_occur(copies):
    spectrum = [7.0] * copies + [3.0] * copies + torch.linspace(0, 1, 200).tolist()
    loss, params = quadratic(spectrum)
    k = 2 * copies
    values = flatness.hessian_eigenvalues(loss, params, k)
    torch.testing.assert_close(values.tolist(), spectrum[:k], rtol=1e-5, atol=0.0)


def test_all_eigenvalues_of_a_small_hessian():
    spectrum = [3.0, 2.0, 0.0, -1.0, -1.0, -5.0]
    loss, params = quadratic(spectrum)
    values = flatness.hessian_eigenvalues(loss, params, len(spectrum))
    torch.testing.assert_close(values.tolist(), spectrum, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("method", PROBES)
def test_the_error_of_the_trace_is_what_it_says(digits, method):
    """Over many seeds, deviations are as large as the errors claim, and their mean is zero."""
    model, loss, exact = digits
    trace, z = exact.sum(), []
    for seed in range(30):
        estimate, error = flatness.hessian_trace(loss, model, PROBES[method], method=method, seed=seed)
        z.append(float((estimate - trace) / error))
    z = torch.tensor(z)
    assert z.mean().abs() < 4 / len(z) ** 0.5
    assert 0.6 < z.std() < 1.6


def test_hutch_plus_plus_is_more_accurate_where_few_eigenvalues_are_large(digits):
    model, loss, exact = digits
    errors = {
        method: sum(
            (flatness.hessian_trace(loss, model, n, method=method, seed=s).estimate - exact.sum()).square()
            for s in range(10)
        )
        for method, n in PROBES.items()
    }
    assert errors["hutch++"] < errors["hutchinson"] / 4


def test_hutch_plus_plus_is_exact_where_its_basis_spans_everything():
    loss, params = quadratic([3.0, 1.0, -2.0])
    trace, error = flatness.hessian_trace(loss, params, 12, method="hutch++")
    torch.testing.assert_close((trace.item(), error.item()), (2.0, 0.0), rtol=0.0, atol=1e-12)


def test_the_density_has_the_moments_and_ends_of_the_spectrum(digits):
    model, loss, exact = digits
    nodes, weights = flatness.spectral_density(loss, model, probes=30, steps=60)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(30, dtype=torch.float64))
    assert (weights >= 0).all()
    for power in (1, 2, 3):
        moments = (weights * nodes**power).sum(dim=1)
        assert (moments.mean() - (exact**power).mean()).abs() < 4 * moments.std() / 30**0.5
    torch.testing.assert_close(nodes.max(dim=1).values, exact[:1].expand(30), rtol=1e-8, atol=0.0)
    assert (nodes >= exact[-1] - 1e-9 * exact[0]).all()


def test_the_density_of_few_eigenvalues_is_exact():
    loss, params = quadratic([2.0, 2.0, -1.0])
    result = flatness.spectral_density(loss, params, probes=3, steps=10)
    assert ((result.weights > 1e-12).sum(dim=1) == 2).all()
    real = result.weights > 1e-12
    torch.testing.assert_close(result.nodes[real].sort().values, torch.tensor([-1.0] * 3 + [2.0] * 3, dtype=torch.float64))
    at = torch.linspace(-4, 5, 9001, dtype=torch.float64)
    heights = result.density(at, 0.2)
    assert math.isclose(torch.trapezoid(heights, at), 1.0, rel_tol=1e-6)
    share = float(result.weights[result.nodes > 0].sum() / 3)
    assert math.isclose(torch.trapezoid(heights[at > 0.5], at[at > 0.5]), share, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_as_accurate_as_their_products(dtype):
    """The quadratic's matrix is rounded to the dtype: its own eigenvalues, in float64, are the reference."""
    loss, params = quadratic(torch.logspace(1, -2, 40).tolist(), dtype=dtype)
    rows = torch.eye(40, dtype=dtype)
    grads = torch.autograd.grad(loss(), params, create_graph=True)
    dense = [
        torch.cat([h.reshape(-1) for h in torch.autograd.grad(grads, params, [r[:1].view(1, 1), r[1:]], retain_graph=True)])
        for r in rows
    ]
    exact = torch.linalg.eigvalsh(torch.stack(dense).double()).flip(0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    found = flatness.hessian_eigenvalues(loss, params, 3, tolerance=tolerance)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact[:3], rtol=tolerance, atol=0.0)
    trace, error = flatness.hessian_trace(loss, params, 100)
    assert abs(trace - exact.sum()) < 4 * error


@pytest.mark.parametrize(
    ("measure", "total"),
    [
        (lambda *a, **k: flatness.hessian_trace(*a, 7, **k), 7),
        (lambda *a, **k: flatness.hessian_trace(*a, 9, method="hutch++", **k), 9),
        (lambda *a, **k: flatness.spectral_density(*a, probes=2, steps=3, **k), 6),
        (lambda *a, **k: flatness.loss_landscape(*a, points=3, **k), 9),
        (lambda *a, **k: flatness.local_minima_density(*a, directions=2, **k), 20),
        (lambda *a, **k: flatness.zeroth_order_flatness(*a, steps=3, restarts=1, **k), 8),
        (lambda *a, **k: flatness.first_order_flatness(*a, steps=3, restarts=0, **k), 4),
    ],
)
def test_progress_is_told_up_to_its_end(measure, total, capsys):
    loss, params = quadratic(torch.linspace(0, 1, 30).tolist(), at_minimum=False)
    seen = []
    measure(loss, params, progress=lambda *state: seen.append(state))
    assert seen == [(i, total) for i in range(1, total + 1)]
    pytest.importorskip("tqdm", reason="progress=True needs tqdm")
    measure(loss, params, progress=True)
    assert str(total) in capsys.readouterr().err


def test_progress_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    loss, params = quadratic([1.0, 2.0])
    with pytest.raises(ImportError, match="pip install tqdm"):
        flatness.hessian_trace(loss, params, progress=True)


def test_bad_numbers_are_named():
    loss, params = quadratic([2.0, 1.0])
    with pytest.raises(ValueError, match=r"method='hutch' is not one of 'hutchinson', 'hutch\+\+'"):
        flatness.hessian_trace(loss, params, method="hutch")
    with pytest.raises(ValueError, match="samples must be at least 6"):
        flatness.hessian_trace(loss, params, 5, method="hutch++")
    with pytest.raises(ValueError, match="probes=0 must be at least 1"):
        flatness.spectral_density(loss, params, probes=0)
    with pytest.raises(ValueError, match="width must be finite and > 0, got 0"):
        flatness.spectral_density(loss, params, probes=1, steps=2).density(torch.zeros(1), 0)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        flatness.hessian_eigenvalues(loss, params, 0)
