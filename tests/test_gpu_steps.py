"""Whole steps of every backend on a GPU: against the reference, kernels and memory per step, no waiting, loss scaling."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from gam_helpers import SETTINGS, batch, bits, close, make, mlp, regression, trainer
from on_gpu import CUDA, gpu_backends
from torch import Tensor

from benchmarks.clock import launched
from gam_fused import FusedGAM

pytestmark = pytest.mark.gpu

BASES: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adagrad, not fused": (torch.optim.Adagrad, {}),
}


def on_gpu(method: str, backend_name: str, base: type = torch.optim.SGD, dtype=torch.float32, device=CUDA, **options):
    """A small network on the device, its optimizer and closure."""
    model = mlp(dtype).to(device)
    x, y = (t.to(device) for t in batch(dtype=dtype))
    return model, *trainer(method, model, regression(model, x, y), base, backend=backend_name, **options)


@gpu_backends()
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", SETTINGS)
def test_whole_steps_equal_the_reference(backend_name, method, base):
    results = []
    for name in (backend_name, "reference"):
        model, optimizer, closure = on_gpu(method, name, BASES[base][0], torch.float64, max_grad_norm=0.5, **BASES[base][1])
        for _ in range(5):
            optimizer.step(closure)
        results.append([p.detach() for p in model.parameters()])
    close(*results, tolerance=1e-9)


@gpu_backends()
@pytest.mark.parametrize("method", ["sam", "finite_difference", "accelerated"])
def test_the_same_bits_in_every_run(backend_name, method):
    runs = []
    for _ in range(2):
        model, optimizer, closure = on_gpu(method, backend_name, torch.optim.AdamW)
        for _ in range(5):
            optimizer.step(closure)
        runs.append([bits(p) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Prepared:
    """Parameters and gradients handed over ready-made: what a step then launches is the optimizer's own."""

    def __init__(self, counts: dict[torch.dtype, int]):
        self.params = [
            torch.nn.Parameter(torch.ones(50 + i, dtype=dtype, device=CUDA)) for dtype, n in counts.items() for i in range(n)
        ]
        self.ready: list[list[Tensor]] = []

    def fill(self) -> None:
        self.ready = [[torch.full_like(p, 0.01 * (k + 1)) for p in self.params] for k in range(4)]
        torch.cuda.synchronize()

    def closure(self) -> float:
        for p, g in zip(self.params, self.ready.pop(), strict=True):
            p.grad = g
        return 0.0


def launched_by_a_step(problem: Prepared, optimizer: FusedGAM) -> dict[str, list[str]]:
    for _ in range(3):  # state, tables and the look at precision belong to the first steps
        problem.fill()
        optimizer.step(problem.closure)
    problem.fill()
    return launched(lambda: optimizer.step(problem.closure))


@gpu_backends("cuda", "triton")
@pytest.mark.parametrize(("method", "kernels"), [("sam", 4), ("finite_difference", 8), ("accelerated", 8)])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_kernels_per_step(backend_name, method, kernels, base):
    problem = Prepared({torch.float32: 400})
    kind, options = BASES[base]
    seen = launched_by_a_step(problem, make(problem.params, kind, method, backend=backend_name, **options))["kernel"]
    assert 0 < len(seen) <= kernels, seen


@gpu_backends("cuda", "triton")
def test_kernels_per_step_of_two_dtypes(backend_name):
    """Two lists for every kernel, which is twice the kernels."""
    problem = Prepared({torch.float32: 200, torch.float64: 200})
    seen = launched_by_a_step(problem, make(problem.params, backend=backend_name))["kernel"]
    assert 0 < len(seen) <= 16, seen


@gpu_backends("cuda", "triton")
@pytest.mark.parametrize(
    ("method", "max_ratio", "scratch"),
    [("sam", None, 1), ("finite_difference", None, 2), ("finite_difference", 0.1, 3), ("accelerated", None, 3)],
)
def test_scratch_is_what_the_design_says(backend_name, method, max_ratio, scratch):
    """The largest allocation of a first step beyond plain SGD-momentum's gradient and momentum, in copies of the model."""
    count = 1 << 23
    parameter = torch.nn.Parameter(torch.randn(count, device=CUDA))
    factor = torch.rand(count, device=CUDA)
    options = {"method": method, "max_ratio": max_ratio, "backend": backend_name}
    optimizer = FusedGAM([parameter], torch.optim.SGD, lr=0.1, momentum=0.9, **options)

    def closure() -> float:
        parameter.grad = factor * parameter.detach()
        return 0.0

    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gc.disable()
    try:
        optimizer.step(closure)
    finally:
        gc.enable()
    assert (torch.cuda.max_memory_allocated() - before) / (4 * count) == pytest.approx(2 + scratch, abs=0.1)


@gpu_backends()
@pytest.mark.parametrize("method", ["sam", "finite_difference", "accelerated"])
@pytest.mark.parametrize("kind_of_lr", ["number", "tensor"])
def test_a_step_never_waits_for_the_device(backend_name, method, kind_of_lr):
    """Schedules of lr and rho, skipped steps and a loss scale included."""
    lr = 0.1 if kind_of_lr == "number" else torch.tensor(0.1, device=CUDA)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    model, optimizer, _ = on_gpu(method, backend_name, torch.optim.AdamW, lr=lr, grad_scaler=scaler)
    x, y = (t.to(CUDA) for t in batch())
    factor = torch.ones((), device=CUDA)

    def closure() -> Tensor:
        return (model(x) - y).square().mean() * factor

    optimizer.step(closure)
    scaler.update()
    group = optimizer.param_groups[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, value in enumerate((1.0, float("inf"), 1.0, float("nan"), 1.0)):
            factor.fill_(value)
            group["rho"] = 0.05 * (number + 1)
            if kind_of_lr == "number":
                group["lr"] = 0.1 / (number + 2)
            else:
                group["lr"].mul_(0.5)
            optimizer.step(closure)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 2
    assert all(p.isfinite().all() for p in model.parameters())


@gpu_backends()
def test_float16_with_a_scaler(backend_name):
    """A scale too large skips the step, bit for bit; the scaler lowers it; then steps are those of the reference."""
    results = []
    for name in (backend_name, "reference"):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, backoff_factor=2.0**-52)
        model, optimizer, _ = on_gpu("finite_difference", name, grad_scaler=scaler)
        x, y = (t.to(CUDA) for t in batch())

        def closure(model=model, x=x, y=y) -> Tensor:
            with torch.autocast("cuda", torch.float16):
                return torch.nn.functional.mse_loss(model(x).float(), y)

        before = [bits(p) for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the finite difference's probe")  # eleven bits are few for it
            optimizer.step(closure)
            scaler.update()
            assert optimizer.skipped_steps == 1
            assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
            assert scaler.get_scale() == 2.0**8
            for _ in range(3):
                optimizer.step(closure)
                scaler.update()
        assert optimizer.skipped_steps == 1
        assert scaler.get_scale() == 2.0**8
        assert not any(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
        results.append([p.detach().double() for p in model.parameters()])
    close(*results, tolerance=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@gpu_backends()
def test_parameters_on_another_device_than_the_current_one(backend_name):
    results = []
    for device in (CUDA, torch.device("cuda", 1)):
        model, optimizer, closure = on_gpu("accelerated", backend_name, device=device)
        for _ in range(3):
            optimizer.step(closure)
        results.append([p.detach().cpu().double() for p in model.parameters()])
    close(*results, tolerance=1e-5)
