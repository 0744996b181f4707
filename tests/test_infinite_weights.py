"""Weights that are infinite (masks), or as large as their dtype holds, as torch treats them: what does not move stays."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, DTYPES, get_backend
from float64_gam import Gam64
from gam_helpers import METHODS, make
from test_rounding import tables

from gam_fused.backends.math import lists as foreach_lists
from gam_fused.backends.operands import CombinedUpdate, Perturb, SquaredNorm
from gam_fused.backends.tensor_lists import EMPTY, Layout, TensorList
from gam_fused.constants import Algorithm, Flag

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
backend_names = pytest.mark.parametrize("backend_name", [*BACKENDS, "reference"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Ordinary, infinite and huge weights; only the first two and the last of each group of seven have a gradient."""
    largest = torch.finfo(dtype).max
    return torch.tensor([0.3, -0.2, torch.inf, -torch.inf, largest, -largest, 0.1] * 9, dtype=dtype)


def gradients(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([0.5, -0.25, 0.0, 0.0, 0.0, -0.0, 1.0] * 9, dtype=dtype)


UPDATES = {
    "sgd": (SGD, {}),
    "sgd-maximize": (SGD, {"maximize": True}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (ADAM, {}),
    "adam-amsgrad": (ADAM, {"amsgrad": True, "maximize": True}),
    "adamw": (ADAMW, {}),
    "adamw-amsgrad": (ADAMW, {"amsgrad": True, "maximize": True}),
}


class Pair:
    """The kernel `combined_update_` and torch's optimizer, whose numbers are rounded to storage after each step."""

    def __init__(self, backend_name: str, kind: type, options: dict, dtype: torch.dtype):
        self.backend, self.dtype, adam = get_backend(backend_name), dtype, kind is not SGD
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.plain = torch.nn.Parameter(weights(dtype).to(self.compute))
        self.optimizer = kind([self.plain], lr=options.pop("lr", 0.125), **options)
        group = self.optimizer.param_groups[0]
        flags = Flag.NESTEROV * group.get("nesterov", False) | Flag.MAXIMIZE * group["maximize"]
        flags |= Flag.AMSGRAD * group.get("amsgrad", False) | Flag.DECOUPLED * (kind is ADAMW)
        columns = {"DIRECTION_LAST": 1.0, "FLAGS": flags, "LR": group["lr"], "WEIGHT_DECAY": group["weight_decay"]}
        if adam:
            columns |= {"BETA1": group["betas"][0], "BETA2": group["betas"][1], "EPS": group["eps"]}
        else:
            columns |= {"MOMENTUM": group["momentum"], "DAMPENING": group["dampening"]}
        self.coefficients, self.control = tables(**columns)
        self.algorithm = Algorithm.ADAM if adam else Algorithm.SGD
        self.theta = TensorList([weights(dtype)])
        used = (adam or bool(group["momentum"]), adam, bool(flags & Flag.AMSGRAD))
        names = [name for name, there in zip(("state1", "state2", "state3"), used, strict=True) if there]
        self.state = {name: TensorList([torch.zeros_like(weights(dtype))]) for name in names}
        self.steps = TensorList([torch.tensor(0.0)])

    def step(self) -> None:
        gradient, size = gradients(self.dtype), self.plain.numel()
        layout, sums = Layout([size], [0], [True]), torch.zeros(1, dtype=torch.float64)
        partials = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        tables_ = {"coefficients": self.coefficients, "partials": partials, "control": self.control, "direction": sums}
        lists = {"theta": self.theta, "last": TensorList([gradient]), "steps": self.steps} | self.state
        self.backend.combined_update_(CombinedUpdate(layout=layout, **lists, **tables_, algorithm=self.algorithm))
        self.plain.grad = gradient.to(self.compute)
        self.optimizer.step()
        for kept in (self.plain.data, *self.optimizer.state[self.plain].values()):
            if isinstance(kept, torch.Tensor) and kept.dim():
                kept.copy_(kept.to(self.dtype))

    def check(self) -> None:
        state = self.optimizer.state[self.plain]
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.algorithm == Algorithm.ADAM else ("momentum_buffer",)
        wanted = [self.plain.data, *[state[name] for name in names if state.get(name) is not None]]
        actual = [self.theta.tensors[0], *[lst.tensors[0] for lst in self.state.values()]]
        eps = torch.finfo(self.dtype).eps
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a.to(self.compute), b, rtol=4 * eps, atol=4 * eps, equal_nan=True)


@backend_names
@dtypes
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_torchs(backend_name, update, weight_decay, dtype):
    kind, options = UPDATES[update]
    pair = Pair(backend_name, kind, {**options, "weight_decay": weight_decay}, dtype)
    for _ in range(3):
        pair.step()
        pair.check()
    assert torch.equal(pair.theta.tensors[0].isnan(), pair.plain.isnan())
    if weight_decay == 0.0 or kind is ADAMW:
        assert torch.equal(pair.theta.tensors[0][3::7], weights(dtype)[3::7])


@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_torchs_where_the_host_reads_no_scalars(monkeypatch, update):
    monkeypatch.setattr(foreach_lists, "on_host", lambda t: False)
    test_updates_are_torchs("torch", update, 0.0, torch.float32)
    test_updates_are_torchs("torch", update, 0.01, torch.float32)
    test_lr_0_moves_nothing("torch", update, torch.float32)


@backend_names
@dtypes
@pytest.mark.parametrize("update", UPDATES)
def test_lr_0_moves_nothing(backend_name, update, dtype):
    kind, options = UPDATES[update]
    pair = Pair(backend_name, kind, {**options, "weight_decay": 0.01, "lr": 0.0}, dtype)
    for _ in range(2):
        pair.step()
    assert torch.equal(pair.theta.tensors[0], weights(dtype))


def perturb(backend_name: str, theta, x, y=None, *, base=None, total=1.0, radius=0.125, adaptive=False) -> float:
    """theta <- base + radius * (x - y) / sqrt(total), without xi. Returns the realised length, squared."""
    layout, (coefficients, control) = Layout([theta.numel()], [0], [True]), tables(RADIUS_1=radius)
    partials, realised = torch.tensor([[total], [0.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    lists = {name: TensorList([t]) for name, t in {"theta": theta, "base": base, "x": x, "y": y}.items() if t is not None}
    tables_ = {"coefficients": coefficients, "partials": partials, "control": control, "realised": realised}
    get_backend(backend_name).perturb_(Perturb(layout=layout, **lists, **tables_, ascent=1, adaptive=adaptive))
    return realised.item()


@backend_names
@dtypes
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("from_base", [False, True])
def test_ascents_leave_what_has_no_gradient(backend_name, from_base, adaptive, dtype):
    base, theta, ordinary = weights(dtype), weights(dtype), torch.arange(63) % 7
    ordinary = (ordinary < 2) | (ordinary == 6)
    start = base if from_base else None
    realised = perturb(backend_name, theta, gradients(dtype), gradients(dtype) * 0, base=start, adaptive=adaptive)
    assert torch.equal(theta[~ordinary], base[~ordinary])
    assert not torch.equal(theta[ordinary], base[ordinary])
    assert realised == pytest.approx((theta[ordinary].double() - base[ordinary].double()).square().sum().item(), rel=1e-5)


@backend_names
@dtypes
@pytest.mark.parametrize("radius", [0.125, 0.0])
def test_nothing_moves_along_a_zero_gradient_without_xi(backend_name, radius, dtype):
    """|x| + xi = 0: neither radius / 0 nor 0 / 0 reaches a weight."""
    theta = weights(dtype)
    assert perturb(backend_name, theta, gradients(dtype), gradients(dtype), total=0.0, radius=radius) == 0
    assert torch.equal(theta, weights(dtype))


@backend_names
def test_gradients_close_to_zero_leave_elements_without_gradient(backend_name):
    """A scale that float32 could not hold, times 0."""
    theta, tiny = weights(torch.float32), gradients(torch.float32) * 1e-44
    perturb(backend_name, theta, tiny, total=tiny.double().square().sum().item())
    assert torch.equal(theta[3::7], weights(torch.float32)[3::7])
    assert theta[::7].isfinite().all()


@backend_names
@dtypes
@pytest.mark.parametrize("difference", [False, True])
def test_adaptive_norms_pass_over_what_has_no_gradient(backend_name, difference, dtype):
    x, weight, partials = gradients(dtype), weights(dtype), torch.zeros(2, 1, dtype=torch.float64)
    lists = {"x": TensorList([x]), "y": TensorList([x * 0]) if difference else EMPTY, "weight": TensorList([weight])}
    norm = SquaredNorm(layout=Layout([63], [0], [True]), **lists, partials=partials)
    get_backend(backend_name).squared_norm(norm)
    wanted = torch.where(x == 0, 0.0, x.double() * weight.double()).square().sum().item()
    assert partials.sum().item() == pytest.approx(wanted, rel=1e-2 if dtype.itemsize == 2 else 1e-6)
    # Where an infinite weight has a gradient the norm is not finite, and the step is skipped.
    x[3] = 1.0
    get_backend(backend_name).squared_norm(norm)
    assert not partials.isfinite().all()


def masked_loss(theta: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(theta, 0)[0]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "reference"])
@pytest.mark.parametrize("options", [{}, {"xi": 0.0}, {"max_grad_norm": 0.05}], ids=["plain", "xi-0", "clipped"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [SGD, ADAM, ADAMW, torch.optim.RMSprop])
@pytest.mark.parametrize("method", METHODS)
def test_steps_with_a_forbidden_transition(method, base, adaptive, options, backend):
    """A logit of -inf has the gradient 0: steps are those without it."""
    ends = []
    for row in ([0.3, -torch.inf, 0.1], [0.3, 0.1]):
        theta = torch.nn.Parameter(torch.tensor(row, dtype=torch.float64))
        optimizer = make([theta], base, method, lr=0.1, adaptive=adaptive, backend=backend, **options)
        for _ in range(3):
            optimizer.step(lambda theta=theta: masked_loss(theta))
        assert int(optimizer.skipped_steps) == 0
        ends.append(theta.detach())
    assert ends[0][1] == -torch.inf
    torch.testing.assert_close(ends[0][[0, 2]], ends[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_whole_steps_in_float64_agree(method, adaptive, base):
    kind = {"sgd": SGD, "adam": ADAM, "adamw": ADAMW}[base]
    start = torch.tensor([0.3, -torch.inf, 0.1], dtype=torch.float64)
    theta = torch.nn.Parameter(start.clone())
    optimizer = make([theta], kind, method, lr=0.1, adaptive=adaptive)
    settings = {k: getattr(optimizer, k) for k in ("rho_prime", "alpha", "beta", "gamma") if hasattr(optimizer, k)}
    group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "eps" if base == "sgd" else "")}
    exact = Gam64([{"params": [start], **group}], method=method, base=base, adaptive=adaptive, **settings)
    for _ in range(3):
        optimizer.step(lambda: masked_loss(theta))
        exact.step(lambda params, k: masked_loss(params[0]))
    torch.testing.assert_close(theta.detach(), exact.theta[0], rtol=1e-9, atol=1e-12)
