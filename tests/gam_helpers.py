"""What the contract tests share: tiny networks, settings of every method, closures, bit-exact snapshots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gam_fused
from gam_fused import FusedGAM

METHODS = ("sam", "finite_difference", "accelerated", "exact", "gradient_penalty", "gsam")
PASSES = {"sam": 2, "finite_difference": 4, "accelerated": 4, "exact": 2, "gradient_penalty": 2, "gsam": 2}
SETTINGS = {
    "sam": {"rho": 0.1},
    "finite_difference": {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.7, "max_ratio": None},
    "accelerated": {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.3, "beta": 0.6, "gamma": 0.2},
    "exact": {"rho": 0.1, "alpha": 0.7, "max_ratio": None},
    "gradient_penalty": {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.7, "max_ratio": None},
    "gsam": {"rho": 0.1, "alpha": 0.3},
}
EVERY_PASS = [(method, k) for method in METHODS for k in range(PASSES[method])]
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def backend_params(names: Sequence[str] = ("reference", "torch", "cpp")) -> list:
    """The backends as pytest parameters; one that is not there is skipped with its own reason."""
    there = gam_fused.available_backends()
    skip = {name: f"backend {name}: {there.get(name, 'unknown to this version')}" for name in names if there.get(name, "?")}
    return [pytest.param(n, marks=pytest.mark.skipif(n in skip, reason=skip.get(n, ""))) for n in names]


def make(params, base=torch.optim.SGD, method: str = "finite_difference", **options) -> FusedGAM:
    """FusedGAM with the settings of `method`; SGD gets momentum and all get lr = 0.1 unless said otherwise."""
    if base is torch.optim.SGD and "momentum" not in options:
        options = {"momentum": 0.9, **options}
    if isinstance(base, type):
        options = {"lr": 0.1, **options}
    if base is torch.optim.RMSprop:  # it has an alpha, too
        options = {"base_kwargs": {"alpha": 0.99}, **options}
    return FusedGAM(params, base, method=method, **{**SETTINGS[method], **options})


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def batch_norm_net(dtype: torch.dtype = torch.float32, momentum: float | None = 0.1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).to(dtype)


def mixed_net(seed: int = 0) -> nn.Sequential:
    """Dropout and batch norm: everything that a step has to keep in order besides the weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))


def batch(n: int = 8, features: Sequence[int] = (3,), outputs: int = 2, dtype=torch.float32, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *features, generator=generator, dtype=torch.float64)
    y = torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def regression(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: (model(x) - y).square().mean()


def closure_of(optimizer: torch.optim.Optimizer, loss_fn: Callable[[], Tensor], backward: bool | None = None):
    """A closure that calls backward, as torch has it; for `exact` one that leaves that to the optimizer."""
    if backward is None:
        backward = getattr(optimizer, "method", None) != "exact"

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        if backward:
            loss.backward()
        return loss

    return closure


def trainer(method: str, model: nn.Module, loss_fn: Callable[[], Tensor], base=torch.optim.SGD, **options):
    """An optimizer of `model` and the closure for it."""
    options.setdefault("model", model)
    params = options.pop("params", None)
    optimizer = make(list(model.parameters()) if params is None else params, base, method, **options)
    return optimizer, closure_of(optimizer, loss_fn, backward=method != "exact")


def functional_loss(model: nn.Module, x: Tensor, y: Tensor, criterion=None):
    """The loss of `model` as a function of the list of its parameters, for `Gam64`; buffers stay as they are."""
    model = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters()]
    criterion = criterion or nn.functional.mse_loss

    def loss_fn(params: Sequence[Tensor], k: int) -> Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return criterion(functional_call(model, {**dict(zip(names, params, strict=True)), **buffers}, (x.double(),)), y)

    return loss_fn


def bits(t: Tensor) -> Tensor:
    """A copy of the bits of `t`: tells -0.0 from 0.0, and knows that NaN is NaN."""
    t = t.detach().clone(memory_format=torch.contiguous_format)
    return t.view(_INTEGER[t.element_size()]) if t.is_floating_point() else t


def freeze(value):
    """A copy in which tensors are replaced by their bits."""
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {k: freeze(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [freeze(v) for v in value]
    return copy.deepcopy(value)


def same(a, b, where: str = "") -> None:
    """Both frozen values are equal, bit for bit."""
    assert type(a) is type(b), f"{where}: {type(a).__name__} against {type(b).__name__}"
    if isinstance(a, dict):
        assert set(a) == set(b), f"{where}: keys {list(a)} against {list(b)}"
        for k in a:
            same(a[k], b[k], f"{where}[{k}]")
    elif isinstance(a, list):
        assert len(a) == len(b), f"{where}: {len(a)} against {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert torch.equal(a, b), f"{where}: {(a != b).sum().item()} of {a.numel()} elements differ"
    else:
        assert a == b, f"{where}: {a} against {b}"


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [bits(p) for group in optimizer.param_groups for p in group["params"]]


def frozen_without_counters(optimizer: torch.optim.Optimizer) -> dict:
    """Weights and state, frozen, without the counters, which tell of skipped steps."""
    state = freeze(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["gam"]
    return {"weights": weights(optimizer), "state": state}


def snapshot(optimizer: torch.optim.Optimizer, model: nn.Module | None = None, rng: bool = True) -> dict:
    """Everything that a step may change, frozen."""
    return {
        "weights": weights(optimizer),
        "state": freeze(optimizer.state_dict()),
        "buffers": freeze(dict(model.named_buffers())) if model is not None else {},
        "rng": torch.get_rng_state() if rng else 0,
    }


def close(params: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str = "weights") -> None:
    """Every tensor within `tolerance` of the expected one, relative to its norm."""
    for i, (p, t) in enumerate(zip(params, expected, strict=True)):
        error = (p.detach().double() - t).norm().item()
        assert error <= tolerance * max(t.norm().item(), 1e-3), f"{what} {i}: error {error:.3g}, norm {t.norm():.3g}"


def tables_are_rectangular(markdown: str) -> bool:
    """Whether there are tables and every row of each has as many cells as its header."""
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith("|")]
    return bool(tables) and all(len({line.count("|") for line in lines}) == 1 for lines in tables)


class Struck(torch.autograd.Function):
    """Calls `strike("inside backward")` of a training in the middle of backward, when later layers have their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, training: Any) -> Tensor:
        ctx.training = training
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.training.strike("inside backward")
        return grad, None
