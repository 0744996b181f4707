"""The flatness measures against exact answers: quadratics with a known Hessian, a small network's dense Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gam_fused import flatness

MEASURES = {
    "hessian_eigenvalues": lambda loss, params: flatness.hessian_eigenvalues(loss, params, k=2),
    "hessian_trace": lambda loss, params: flatness.hessian_trace(loss, params, samples=3).estimate,
    "zeroth_order_flatness": lambda loss, params: flatness.zeroth_order_flatness(loss, params, 0.1, steps=3),
    "first_order_flatness": lambda loss, params: flatness.first_order_flatness(loss, params, 0.1, steps=3),
    "loss_landscape": lambda loss, params: flatness.loss_landscape(loss, params, points=3),
    "local_minima_density": lambda loss, params: flatness.local_minima_density(loss, params, 3).minima,
}


def quadratic(spectrum, dtype=torch.float64, at_minimum=True):
    """0.5 (theta - m)' H (theta - m) over two tensors, H with the given eigenvalues."""
    n = len(spectrum)
    random = torch.Generator().manual_seed(7)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))
    hessian = (q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.T).to(dtype)
    centre = torch.randn(n, generator=random, dtype=torch.float64).to(dtype)
    start = centre if at_minimum else centre + 0.3 * q[:, 0].to(dtype)
    params = [start[:1].clone().view(1, 1).requires_grad_(), start[1:].clone().requires_grad_()]

    def loss():
        offset = torch.cat([p.reshape(-1) for p in params]) - centre
        return 0.5 * offset @ hessian @ offset

    return loss, params


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def minimum():
    """The network at a strict local minimum: weights are decayed, and Newton's method ends where the gradient does."""
    model, plain = network()
    params = list(model.parameters())

    def loss():
        return plain() + 0.02 * sum(p.square().sum() for p in params)

    optimizer = torch.optim.LBFGS(
        params, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    assert torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)]).norm() < 1e-8
    assert torch.linalg.eigvalsh(dense_hessian(model, loss))[0] > 1e-3
    return model, loss


def dense_hessian(model, loss_fn):
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, params, retain_graph=True)]) for g in flat]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        ([9.0, 4.0, 1.0, 0.5, 0.1], 1),
        ([5.0, 5.0, 5.0, 1.0, -8.0], 4),  # a multiple eigenvalue, and one larger in magnitude that must not win
        ([0.0, 0.0, -1.0], 3),
        ([-3.0, -2.0], 1),
    ],
)
def test_eigenvalues_of_a_quadratic(spectrum, k):
    loss, params = quadratic(spectrum)
    values = flatness.hessian_eigenvalues(loss, params, k, tolerance=1e-8)
    expected = torch.tensor(sorted(spectrum, reverse=True)[:k], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)


def test_eigenvalues_of_a_large_spectrum_in_single_precision():
    spectrum = torch.logspace(2, -3, 300).tolist()
    loss, params = quadratic(spectrum, dtype=torch.float32)
    values = flatness.hessian_eigenvalues(loss, params, 3)
    torch.testing.assert_close(values.tolist(), sorted(spectrum, reverse=True)[:3], rtol=1e-4, atol=0.0)


def test_a_linear_loss_has_no_curvature():
    weight = torch.ones(3, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    assert flatness.hessian_eigenvalues(lambda: weight.sum(), [weight, unused]).tolist() == [0.0]
    assert flatness.hessian_trace(lambda: weight.sum(), [weight, unused]).estimate == 0.0


def test_the_spectrum_of_a_network_is_that_of_its_dense_hessian():
    model, loss = network()
    dense = dense_hessian(model, loss)
    expected = torch.linalg.eigvalsh(dense).flip(0)[:4]
    torch.testing.assert_close(flatness.hessian_eigenvalues(loss, model.parameters(), 4, tolerance=1e-7), expected)
    trace, error = flatness.hessian_trace(loss, model.parameters(), samples=400)
    assert 0 < error < 0.1 * dense.trace()
    assert abs(trace - dense.trace()) < 4 * error


def test_the_trace_of_a_diagonal_hessian_is_exact():
    scale = torch.tensor([1.0, -2.0, 4.0])
    weight = torch.zeros(3, requires_grad=True)
    trace, error = flatness.hessian_trace(lambda: (scale * weight**2).sum(), [weight], samples=2)
    assert (trace.item(), error.item()) == (6.0, 0.0)


def test_flatness_at_the_minimum_of_a_quadratic():
    """There R0 = rho^2 lambda_max / 2 and R1 = rho^2 lambda_max (Lemma 4.1)."""
    loss, params = quadratic([9.0, 4.0, 1.0, 0.5])
    rho = 0.2
    zeroth = flatness.zeroth_order_flatness(loss, params, rho, steps=40)
    first = flatness.first_order_flatness(loss, params, rho, steps=40)
    assert math.isclose(zeroth, rho**2 * 9.0 / 2, rel_tol=1e-6)
    assert math.isclose(first, rho**2 * 9.0, rel_tol=1e-6)


def test_flatness_away_from_a_minimum_finds_the_far_side_of_the_ball():
    loss, params = quadratic([9.0, 4.0, 1.0, 0.5], at_minimum=False)  # 0.3 along the steepest eigenvector
    rho = 0.2
    zeroth = flatness.zeroth_order_flatness(loss, params, rho)
    first = flatness.first_order_flatness(loss, params, rho)
    assert math.isclose(zeroth, 9.0 / 2 * (0.5**2 - 0.3**2), rel_tol=1e-6)
    assert math.isclose(first, rho * 9.0 * 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.2, 0.5, 2.0])
@pytest.mark.parametrize("at_minimum", [False, True])
def test_first_order_flatness_bounds_zeroth_order_flatness(rho, at_minimum):
    """Proposition 4.2, R0 <= R1; and its step, L(theta') - L(theta) <= rho max |grad L|, at any point of the ball."""
    model, loss = minimum() if at_minimum else network()
    params = list(model.parameters())
    zeroth = flatness.zeroth_order_flatness(loss, params, rho)
    first = flatness.first_order_flatness(loss, params, rho)
    assert 0 < zeroth <= first
    base = loss().item()
    for seed in range(5):
        torch.manual_seed(seed)
        noise = [torch.randn_like(p) for p in params]
        length = torch.stack([n.square().sum() for n in noise]).sum().sqrt()
        with torch.no_grad():
            torch._foreach_add_(params, noise, alpha=rho / length.item())
        grads = torch.autograd.grad(loss(), params)
        assert loss().item() - base <= first
        assert rho * torch.cat([g.flatten() for g in grads]).norm() <= first
        with torch.no_grad():
            torch._foreach_sub_(params, noise, alpha=rho / length.item())


def test_at_a_minimum_the_largest_eigenvalue_is_first_order_flatness_over_rho_squared():
    """Lemma 4.1, equation (4), up to the third order that it leaves out: the deviation falls as fast as rho."""
    model, loss = minimum()
    largest = torch.linalg.eigvalsh(dense_hessian(model, loss))[-1]
    torch.testing.assert_close(flatness.hessian_eigenvalues(loss, model, tolerance=1e-8)[0], largest)
    deviations = []
    for rho in (1e-1, 1e-2, 1e-3):
        first = flatness.first_order_flatness(loss, model, rho, steps=150, step_size=5.0)
        deviations.append(abs(float(first / rho**2 / largest) - 1))
    assert deviations[0] < 0.05
    assert deviations[1] < 0.15 * deviations[0]
    assert deviations[2] < 0.15 * deviations[1]


@pytest.mark.parametrize("at_minimum", [False, True])
def test_the_one_step_estimates_are_what_the_paper_writes(at_minimum):
    """L(theta + rho g/|g|) - L(theta), and equation (7): rho |grad L(theta + rho f/|f|)|, f = grad |grad L|."""
    model, loss = minimum() if at_minimum else network()
    params, rho = list(model.parameters()), 0.1
    g = torch.autograd.grad(loss(), params, create_graph=True)
    size = torch.cat([t.flatten() for t in g]).norm()
    f = torch.autograd.grad(size, params)
    expected = []
    for direction in (g, f):
        direction = [d.detach() for d in direction]
        scale = rho / torch.cat([d.flatten() for d in direction]).norm().item()
        before = [p.detach().clone() for p in params]
        base = loss().item()
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=scale)
        there = torch.autograd.grad(loss(), params)
        norm = torch.cat([t.flatten() for t in there]).norm().item()
        expected.append(loss().item() - base if direction[0].equal(g[0].detach()) else rho * norm)
        with torch.no_grad():
            torch._foreach_copy_(params, before)
    found = flatness.zeroth_order_estimate(loss, model, rho), flatness.first_order_estimate(loss, model, rho)
    assert [f.item() for f in found] == pytest.approx(expected, rel=1e-9, abs=1e-13)
    assert found[0] <= flatness.zeroth_order_flatness(loss, model, rho, steps=40)
    assert found[1] <= flatness.first_order_flatness(loss, model, rho, steps=40)


def test_the_estimates_where_the_gradient_vanishes():
    weight = torch.zeros(3, requires_grad=True)
    assert flatness.zeroth_order_estimate(lambda: weight.square().sum(), [weight]) == 0.0
    assert flatness.first_order_estimate(lambda: weight.square().sum(), [weight]) == 0.0
    assert flatness.first_order_estimate(lambda: 2 * weight.sum(), [weight], 0.5) == pytest.approx(12**0.5 / 2)


def test_restarts_find_what_the_first_ascent_misses():
    """Two hills within the ball: from theta the lower one is climbed, from a random point the higher."""
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    low, high = torch.tensor([0.5, 0.0]), torch.tensor([-0.6, 0.6])

    def loss():
        return torch.exp(-20 * (weight - low).square().sum()) + 5 * torch.exp(-20 * (weight - high).square().sum())

    alone, more = (flatness.zeroth_order_flatness(loss, [weight], 1.0, step_size=0.1, restarts=n) for n in (0, 8))
    assert alone < 1.2
    assert more > 4.5


def test_points_that_are_not_finite_are_passed_over():
    weight = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    found = flatness.zeroth_order_flatness(lambda: torch.log(weight).sum(), [weight], 1.0, restarts=6, step_size=0.3)
    assert math.isclose(found, math.log(3.0), rel_tol=1e-9)
    with pytest.raises(ValueError, match="not finite at the present weights"):
        flatness.zeroth_order_flatness(lambda: torch.log(weight - 1).sum(), [weight], 1.0)
    with pytest.raises(ValueError, match="not finite at the present weights"):
        flatness.first_order_estimate(lambda: torch.log(weight - 1).sum() + weight.sum() * math.inf, [weight], 1.0)


def test_sharded_parameters_are_refused_by_name():
    from torch.distributed.tensor import DTensor, Replicate

    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        weight = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
        with pytest.raises(TypeError, match="must not be sharded"):
            flatness.hessian_trace(lambda: weight.sum(), [weight])
    finally:
        torch.distributed.destroy_process_group()


def test_landscape_along_given_directions_is_the_loss_there():
    loss, params = quadratic([2.0, 1.0])
    u = [torch.ones_like(params[0]), torch.zeros_like(params[1])]
    v = [torch.zeros_like(params[0]), torch.ones_like(params[1])]
    grid = flatness.loss_landscape(loss, params, [u, v], radius=0.5, points=5)
    assert grid.shape == (5, 5)
    assert grid[2, 2] == loss()
    with torch.no_grad():
        params[0] += 0.5
        params[1] -= 0.25
    torch.testing.assert_close(grid[4, 1], loss().detach())


def test_random_landscapes_are_filter_normalised():
    """A loss of |filter - its start|^2 / |filter|^2 is 1 at distance 1 for every filter, and biases do not move."""
    weight = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    origin, fixed = weight.detach().clone(), bias.detach().clone()

    def loss():
        lengths = (weight - origin).flatten(1).norm(dim=1) / origin.flatten(1).norm(dim=1)
        return lengths.square().mean() + (bias - fixed).abs().sum()

    torch.testing.assert_close(
        flatness.loss_landscape(loss, [weight, bias], 1, points=3), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    )


def test_density_counts_minima_and_maxima_between_the_ends():
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    density = flatness.local_minima_density(lambda: torch.cos(weight * 2 * math.pi / 0.04).sum(), [weight], 4)
    assert density.minima.tolist() == [2] * 4  # at 0.02 and 0.06; 0.10 is the last point
    assert density.maxima.tolist() == [2] * 4  # at 0.04 and 0.08; 0 is the first


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_but_the_result_is_left_behind(name):
    model, loss = network()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    first = MEASURES[name](loss, model.parameters())
    with torch.no_grad():  # an outer no_grad must not change the answer
        second = MEASURES[name](loss, model.parameters())
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)
        assert torch.equal(p.grad, torch.full_like(p, 2.0))


@pytest.mark.parametrize("name", [n for n in MEASURES if not n.startswith("hessian")])
def test_weights_come_back_when_the_loss_raises(name):
    model, loss = network()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of data")
        return loss()

    with pytest.raises(RuntimeError, match="out of data"):
        MEASURES[name](failing, model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", MEASURES)
def test_bad_input_is_named(name):
    measure = MEASURES[name]
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="empty"):
        measure(lambda: weight.sum(), [])
    with pytest.raises(ValueError, match="requires_grad=False"):
        measure(lambda: weight.sum(), [torch.ones(3)])
    with pytest.raises(TypeError, match="str"):
        measure(lambda: weight.sum(), ["weight"])
    with pytest.raises(ValueError, match=r"0-d.*\(3,\)"):
        measure(lambda: weight, [weight])


@pytest.mark.parametrize("name", [n for n in MEASURES if n not in ("loss_landscape", "local_minima_density")])
def test_activation_checkpointing_that_hides_parameters_is_refused(name):
    """Reentrant: only backward() reaches what lies inside, and its Hessian would be taken for 0."""
    layers = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(reentrant):
        return layers[2](checkpoint(layers[:2], x, use_reentrant=reentrant)).square().mean()

    def value(loss):
        torch.manual_seed(0)  # for random vectors
        return torch.as_tensor(MEASURES[name](loss, layers.parameters()))

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        value(lambda: loss(True))
    expected = value(lambda: layers(x).square().mean())
    torch.testing.assert_close(value(lambda: loss(False)), expected, rtol=1e-9, atol=0)


def test_bad_numbers_are_named():
    loss, params = quadratic([2.0, 1.0])
    with pytest.raises(ValueError, match="between 1 and the number of elements, 2, got 3"):
        flatness.hessian_eigenvalues(loss, params, 3)
    with pytest.raises(ValueError, match="samples must be at least 2"):
        flatness.hessian_trace(loss, params, 1)
    for measure in (flatness.zeroth_order_flatness, flatness.first_order_flatness):
        with pytest.raises(ValueError, match="rho must be finite and > 0, got nan"):
            measure(loss, params, math.nan)
    with pytest.raises(ValueError, match="at least two steps"):
        flatness.local_minima_density(loss, params, step=0.1)
    with pytest.raises(ValueError, match="shaped like params"):
        flatness.loss_landscape(loss, params, [[torch.ones(3)]])
    with pytest.raises(ValueError, match="directions must be 1 or 2"):
        flatness.loss_landscape(loss, params, 3)
    with pytest.raises(ValueError, match="not finite"):
        flatness.hessian_eigenvalues(lambda: params[0].sum() ** 2 * math.inf, params)


def test_an_unconverged_eigenvalue_warns():
    loss, params = quadratic(torch.linspace(1, 2, 50).tolist())
    with pytest.warns(RuntimeWarning, match="raise max_iterations"):
        flatness.hessian_eigenvalues(loss, params, max_iterations=2)
