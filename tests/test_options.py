"""Options and what an optimizer tells: flatten, diagnostics, schedules of rho, the Hessian-vector product on its own."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from gam_helpers import METHODS, batch, bits, closure_of, make, mixed_net, mlp, regression, same, trainer, weights
from torch import nn

from gam_fused import finite_difference_hvp
from gam_fused.backends.tensor_lists import ALIGNMENT
from gam_fused.schedules import ProportionalRho

DOUBLE = torch.float64


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_flatten_changes_no_bit(method, base):
    results = []
    for flatten in (False, True):
        model = mixed_net()
        optimizer, closure = trainer(method, model, regression(model, *batch()), base, flatten=flatten)
        torch.manual_seed(3)
        for _ in range(4):
            optimizer.step(closure)
        results.append(weights(optimizer))
    same(*results)


def lies_flat(model: nn.Module) -> bool:
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return len(storages) == 1 and all((p.data_ptr() - next(iter(storages))) % ALIGNMENT == 0 for p in model.parameters())


def test_flatten_survives_a_change_of_dtype_and_loading():
    model = mlp()
    assert not lies_flat(model)
    optimizer, closure = trainer(
        "finite_difference", model, lambda: model(batch()[0].to(model[0].weight)).square().mean(), flatten=True
    )
    assert lies_flat(model)
    optimizer.step(closure)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    assert lies_flat(model)
    model.double()
    assert not lies_flat(model)
    optimizer.step(closure)
    assert lies_flat(model)
    assert all(p.dtype is DOUBLE for p in model.parameters())


def test_flatten_takes_added_groups_and_empty_parameters_in():
    model = nn.ParameterList([torch.ones(3), torch.empty(0), torch.ones(4)])
    optimizer = make(model, flatten=True)
    optimizer.step(lambda: sum(p.square().sum() for p in model))
    model.append(torch.ones(5))
    optimizer.add_param_group({"params": [model[3]]})
    optimizer.step(lambda: sum(p.square().sum() for p in model))
    assert lies_flat(nn.ParameterList(p for p in model if p.numel()))
    twin = nn.ParameterList([torch.ones(3), torch.empty(0), torch.ones(4)])
    other = make(twin)
    other.step(lambda: sum(p.square().sum() for p in twin))
    twin.append(torch.ones(5))
    other.add_param_group({"params": [twin[3]]})
    other.step(lambda: sum(p.square().sum() for p in twin))
    same(weights(optimizer), weights(other))


def test_flatten_can_be_set_between_steps():
    optimizer, closure = trainer("finite_difference", model := mlp(), regression(model, *batch()))
    optimizer.step(closure)
    assert not lies_flat(model)
    optimizer.flatten = True
    optimizer.step(closure)
    assert lies_flat(model)


def test_a_wrong_setting_is_told_before_memory_moves():
    optimizer, closure = trainer("finite_difference", model := mlp(), regression(model, *batch()))
    optimizer.flatten, optimizer.alpha = True, -1.0
    with pytest.raises(ValueError, match=r"alpha=-1.0"):
        optimizer.step(closure)
    assert not lies_flat(model)


def test_flatten_moves_what_it_has_moved_before():
    """Of what is left in its buffer, where a parameter is taken out of the groups."""
    model = nn.ParameterList([torch.ones(3), torch.ones(4), torch.ones(5)])
    optimizer = make(model, flatten=True)
    optimizer.step(lambda: sum(p.square().sum() for p in model))
    del optimizer.param_groups[0]["params"][1]
    optimizer.step(lambda: sum(p.square().sum() for p in model))
    assert lies_flat(nn.ParameterList([model[0], model[2]]))
    assert not lies_flat(model)


def test_flatten_refuses_what_is_not_its_own():
    whole = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"flatten=True.*parameter 0 of group 0.*shares its storage"):
        make([nn.Parameter(whole[0])], flatten=True)
    with pytest.raises(ValueError, match=r"flatten=True.*gaps"):
        make([nn.Parameter(whole[:, :3])], flatten=True)


@pytest.mark.parametrize("method", METHODS)
def test_diagnostics_against_a_computation_by_hand(method):
    model = mlp(DOUBLE)
    x, y = batch(dtype=DOUBLE)
    optimizer, closure = trainer(method, model, regression(model, x, y), lr=0.0, momentum=0.0)
    theta = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    told = optimizer.diagnostics()
    assert all(isinstance(v, torch.Tensor) and v.dim() == 0 for v in told.values())

    def at(point):
        with torch.no_grad():
            for p, value in zip(model.parameters(), point, strict=True):
                p.copy_(value)
        loss = regression(model, x, y)()
        return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))

    def norm(tensors):
        return math.sqrt(sum(t.square().sum().item() for t in tensors))

    def moved(start, direction, radius):
        return [a + radius * b / norm(direction) for a, b in zip(start, direction, strict=True)]

    loss, g0 = at(theta)
    expected = {"loss": loss, "gradient_norm": norm(g0), "skipped_steps": 0.0}
    rho = optimizer.param_groups[0]["rho"]
    if method != "exact":
        near = optimizer.rho_prime or rho  # sam and gsam have no probe
        loss1, g1 = at(moved(theta, g0, near))
        expected |= {"sharpness": loss1 - loss, "perturbation_0": near}
    if method == "sam":
        expected["direction_norm"] = norm(g1)
    if method in ("finite_difference", "accelerated"):
        f = [b - a for a, b in zip(g0, g1, strict=True)]
        theta2 = moved(theta, f, rho)
        _, g2 = at(theta2)
        _, g3 = at(moved(theta2, g2, near))
        expected |= {"curvature": norm(f) / near, "first_order_flatness": rho * norm(g2)}
        expected |= {"perturbation_1": rho, "perturbation_2": near}
    if method == "finite_difference":
        c = optimizer.alpha * rho / near
        expected["direction_norm"] = norm([a + c * (d - b) for a, b, d in zip(g0, g2, g3, strict=True)])
    if method == "gradient_penalty":
        c = optimizer.alpha * rho / near
        expected["direction_norm"] = norm([a + c * (b - a) for a, b in zip(g0, g1, strict=True)])
    if method == "gsam":
        inner = sum((a * b).sum().item() for a, b in zip(g0, g1, strict=True))
        expected["cosine"] = inner / norm(g0) / norm(g1)
        gap = [a - inner / norm(g1) ** 2 * b for a, b in zip(g0, g1, strict=True)]
        expected["direction_norm"] = norm([b - optimizer.alpha * o for b, o in zip(g1, gap, strict=True)])
    if method == "accelerated":
        plus = [optimizer.alpha * b + (1 - optimizer.alpha) * d for b, d in zip(g1, g3, strict=True)]
        minus = [optimizer.beta * a + (1 - optimizer.beta) * d for a, d in zip(g0, g2, strict=True)]
        inner = sum((a * b).sum().item() for a, b in zip(plus, minus, strict=True))
        expected["cosine"] = inner / norm(plus) / norm(minus)
    for key, value in expected.items():
        assert told[key].item() == pytest.approx(value, rel=1e-7), key
    assert 0 <= told["noise_ratio"].item() < 1e-10


def test_it_prints_what_it_is():
    text = repr(make(mlp().parameters(), lr=0.05, alpha=0.7, backend="torch"))
    assert text.startswith("FusedGAM (method='finite_difference', rho_prime=")
    for part in ("alpha=0.7", "backend='torch'", "lr: 0.05", "rho: "):
        assert part in text
    assert "beta" not in text


def test_diagnostics_before_the_first_step():
    with pytest.raises(RuntimeError, match="none yet"):
        make(mlp().parameters()).diagnostics()


@pytest.mark.parametrize(("rho_prime", "warns"), [(0.0002, True), (0.05, False)])
def test_a_probe_below_the_precision_of_autocast_warns_once(rho_prime, warns):
    model = mlp()
    x, y = batch()

    def loss_fn():
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x) - y).square().mean()

    optimizer, closure = trainer("finite_difference", model, loss_fn, rho_prime=rho_prime)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure)
    said = [w for w in caught if "below the precision" in str(w.message)]
    if sys.version_info >= (3, 12):  # before, warnings cannot skip the frames of a package
        assert all(w.filename == __file__ for w in said)
    assert len(said) == (1 if warns else 0)
    assert (optimizer.diagnostics()["noise_ratio"].item() > 4.0) is warns


def test_rho_follows_the_learning_rate_between_its_bounds():
    model = mlp()
    optimizer = make([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], lr=0.1)
    rho = ProportionalRho(optimizer, max_rho=0.4, min_rho=0.1)
    assert [g["rho"] for g in optimizer.param_groups] == pytest.approx([0.4, 0.4])
    for group, lr in zip(optimizer.param_groups, (0.05, 0.0), strict=True):
        group["lr"] = lr
    rho.step()
    assert [g["rho"] for g in optimizer.param_groups] == pytest.approx([0.25, 0.1])
    optimizer.param_groups[0]["lr"] = 5.0
    rho.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.4)
    other = ProportionalRho(optimizer, max_rho=1.0, max_lr=0.3)
    other.load_state_dict(rho.state_dict())
    optimizer.param_groups[0]["lr"] = 0.05
    other.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.25)


@pytest.mark.parametrize("bounds", [{"max_rho": -0.1}, {"max_rho": 0.1, "min_rho": 0.2}, {"max_rho": math.nan}], ids=str)
def test_bounds_of_rho_are_checked(bounds):
    with pytest.raises(ValueError, match="rho="):
        ProportionalRho(make(mlp().parameters()), **bounds)


def test_finite_difference_hvp_approaches_the_hessian_and_leaves_no_trace():
    model = mixed_net().double()
    params, (x, y) = list(model.parameters()), batch(dtype=DOUBLE)
    model.eval()
    loss_fn = regression(model, x, y)
    gradients = torch.autograd.grad(loss_fn(), params, create_graph=True)
    vector = [torch.randn_like(p) for p in params]
    exact = torch.autograd.grad(gradients, params, grad_outputs=vector)
    before = [bits(p) for p in params]
    for rho_prime, tolerance in ((1e-2, 3e-2), (1e-4, 3e-4)):
        found = finite_difference_hvp(loss_fn, params, vector, rho_prime=rho_prime)
        error = torch.cat([(a - b).flatten() for a, b in zip(found, exact, strict=True)]).norm()
        assert error < tolerance * torch.cat([b.flatten() for b in exact]).norm()
    same([bits(p) for p in params], before)
    assert all(p.grad is None for p in params)


def test_finite_difference_hvp_replays_dropout_and_survives_failure():
    model = mixed_net()
    params, loss_fn = list(model.parameters()), regression(model, *batch())
    vector = [torch.ones_like(p) for p in params]
    torch.manual_seed(0)
    loss_fn()
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(0)
    finite_difference_hvp(loss_fn, params, vector)
    before = [bits(p) for p in params]
    calls = []

    def failing():
        calls.append(0)
        if len(calls) == 2:
            raise MemoryError
        return loss_fn()

    state = torch.get_rng_state()
    assert torch.equal(state, after_one_pass)
    with pytest.raises(MemoryError):
        finite_difference_hvp(failing, params, vector)
    same([bits(p) for p in params], before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="shape"):
        finite_difference_hvp(loss_fn, params, vector[:-1])


def test_parameters_of_every_dtype_and_layout_in_one_optimizer():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 3, 2, 2, generator=generator)
    params = [
        nn.Parameter(dense.clone()),
        nn.Parameter(dense.to(memory_format=torch.channels_last)),
        nn.Parameter(dense.double().transpose(0, 1)),
        nn.Parameter(torch.randn(5, 8, generator=generator)[:, ::2]),
        nn.Parameter(torch.randn(6, generator=generator).bfloat16()),
        nn.Parameter(torch.randn((), generator=generator)),
        nn.Parameter(torch.zeros(0, 3)),
    ]
    pointers = [p.data_ptr() for p in params]
    strides = [p.stride() for p in params]
    for backend in ("auto", "torch", "reference"):
        optimizer = make(params, torch.optim.AdamW, "accelerated", lr=0.01, backend=backend)
        closure = closure_of(optimizer, lambda: sum((p.float() + 0.5).square().sum() for p in params))
        losses = [float(optimizer.step(closure)) for _ in range(20)]
        assert losses[-1] < losses[0]
        assert optimizer.skipped_steps == 0
        for p in params[:-1]:
            assert optimizer.state[p]["exp_avg"].stride() == p.stride() or not p.is_contiguous()
    assert [p.data_ptr() for p in params] == pointers
    assert [p.stride() for p in params] == strides


def test_a_skip_with_several_dtypes_is_counted_once():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=DOUBLE))]
    optimizer = make(params)
    optimizer.step(lambda: params[0].sum() * math.inf + params[1].sum().float())
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in params)


def test_finite_difference_hvp_of_vectors_without_a_direction():
    p = nn.Parameter(torch.ones(3))
    before = p.detach().clone()
    assert finite_difference_hvp(lambda: (p**4).sum(), [], []) == []
    for value, wanted in ((0.0, 0.0), (float("nan"), float("nan")), (float("inf"), float("nan"))):
        (found,) = finite_difference_hvp(lambda: (p**4).sum(), [p], [torch.full((3,), value)])
        torch.testing.assert_close(found, torch.full((3,), wanted), rtol=0, atol=0, equal_nan=True)
        same(p.detach(), before)


ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD
OPTIONS = {
    "finite_difference": {"oracle": "sam", "sam_rho": 0.1, "max_grad_norm": 10.0},
    "accelerated": {"momentum": 0.5},
    "sam": {},
}
SETTINGS = [
    *(("finite_difference", ADAMW, *case) for case in (("rho", 0.4), ("rho_prime", 0.02), ("alpha", 0.3), ("sam_rho", 0.3))),
    *(("finite_difference", ADAMW, *case) for case in (("max_grad_norm", 0.1), ("lr", 0.03), ("lr", torch.tensor(0.03)))),
    *(("finite_difference", ADAMW, *case) for case in (("weight_decay", 0.3), ("betas", [0.5, 0.7]), ("maximize", True))),
    *(("accelerated", SGD, *case) for case in (("beta", 0.9), ("gamma", 0.5), ("momentum", 0.9), ("nesterov", True))),
    *(("accelerated", SGD, *case) for case in (("alpha", (0.5, 0.9)), ("dampening", 0.3))),
    *(("sam", SGD, *case) for case in (("rho", 0.4), ("xi", 0.5), ("method", "finite_difference"))),
]


@pytest.mark.parametrize(("method", "base", "name", "value"), SETTINGS, ids=str)
def test_a_setting_changed_between_steps_acts_in_the_next(method, base, name, value):
    """As if the optimizer had been made with it: what has not changed is not computed anew."""

    def begun(model):
        optimizer, closure = trainer(method, model, regression(model, *batch()), base, **OPTIONS[method])
        if method == "sam":  # what its change of method needs
            optimizer.rho_prime, optimizer.alpha = 0.05, 1.0
        return optimizer, closure

    def change(optimizer):
        if name in optimizer.param_groups[0]:
            optimizer.param_groups[0][name] = value
        else:
            setattr(optimizer, name, value)

    model = mlp()
    optimizer, closure = begun(model)
    for _ in range(2):
        optimizer.step(closure)
    after = []
    for changes in (True, False):
        twin = copy.deepcopy(model)
        other, other_closure = begun(twin)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if changes:
            change(other)
        other.step(other_closure)
        after.append(weights(other))
    change(optimizer)
    optimizer.step(closure)
    same(weights(optimizer), after[0])
    assert any((p != q).any() for p, q in zip(*after, strict=True))


@pytest.mark.parametrize("name", ["lr", "rho", "perturb", "alpha"])
def test_what_equals_a_number_but_is_none_is_refused(name):
    """True == 1.0."""
    model = mlp()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()), lr=1.0, rho=1.0, alpha=1.0)
    optimizer.step(closure)
    value: Any = 1 if name == "perturb" else True
    if name == "alpha":
        optimizer.alpha = value
    else:
        optimizer.param_groups[0][name] = value
    with pytest.raises(TypeError, match=name):
        optimizer.step(closure)


def test_a_setting_changed_in_place_acts_in_the_next_step():
    model = mlp()
    lr, betas = torch.tensor(0.05), [0.9, 0.99]
    optimizer, closure = trainer("sam", model, regression(model, *batch()), torch.optim.AdamW, lr=lr)
    optimizer.param_groups[0]["betas"] = betas
    optimizer.step(closure)
    before = weights(optimizer)
    lr.zero_()
    optimizer.step(closure)
    same(weights(optimizer), before)
    lr.fill_(0.05)
    betas[0] = float("nan")
    with pytest.raises(ValueError, match="beta1 of group 0"):
        optimizer.step(closure)


def test_a_setting_that_comes_back_acts_in_the_next_step():
    """After a tensor, of which nobody can tell whether it has changed."""
    optimizer, closure = trainer("sam", model := mlp(), regression(model, *batch()))
    (group,), moved = optimizer.param_groups, []
    for lr in (0.1, torch.tensor(0.0), 0.1):
        group["lr"], before = lr, weights(optimizer)
        optimizer.step(closure)
        moved.append(any((p != q).any() for p, q in zip(weights(optimizer), before, strict=True)))
    assert moved == [True, False, True]


@pytest.mark.parametrize("spacing", ["above the probe", "below the probe"])
def test_the_noise_ratio_is_that_of_the_estimate(spacing):
    """precision.py: u = 0.72 eps |theta|, noise u/sqrt(6) where u is below the length, sqrt(u length) above."""
    model = mlp()
    length = 1e-9 if spacing == "above the probe" else 0.05
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()), rho_prime=length, lr=0.0)
    optimizer.step(closure)
    theta = math.sqrt(sum(p.double().square().sum().item() for p in model.parameters()))
    u = 0.72 * torch.finfo(torch.float32).eps * theta
    expected = math.sqrt(u / length) if spacing == "above the probe" else u / length / math.sqrt(6.0)
    assert optimizer.diagnostics()["noise_ratio"].item() == pytest.approx(expected, rel=1e-6)


def test_the_noise_ratio_of_bfloat16_weights_is_what_was_stored():
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    start = model.weight.detach().double()
    x = torch.randn(16, 64).to(torch.bfloat16)
    optimizer, _ = trainer("finite_difference", model, lambda: None, rho_prime=0.02, lr=0.0)
    moved = []

    def closure():
        moved.append((model.weight.detach().double() - start).norm().item())
        return model(x).float().square().mean()

    optimizer.step(closure)
    expected = math.sqrt(moved[1] ** 2 - 0.02**2) / 0.02
    assert optimizer.diagnostics()["noise_ratio"].item() == pytest.approx(expected, rel=1e-6)
