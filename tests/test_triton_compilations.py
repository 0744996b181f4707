"""What the Triton backend hands to the device, and how often it compiles, with a driver that launches nothing.

Kernels are compiled for real; arguments are recorded in place of being run. So no GPU is needed.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gam_helpers import SETTINGS
from torch import nn

from gam_fused import FusedGAM, backends
from gam_fused.backends import triton as module
from gam_fused.backends.operands import Restore, SquaredNorm
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.backends.triton import backend

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install --no-deps triton==3.7.1")
pytestmark = pytest.mark.skipif(module.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")


class RecordingDriver:
    """An H100 on which launches are noted down: `compiled` has a name per compilation, `launches` the arguments."""

    def __init__(self):
        self.compiled: list[str] = []
        self.launches: list[tuple] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 999  # a number of its own: Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return name, name, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        self.compiled.append(metadata.name)
        return lambda *args, **kwargs: self.launches.append(args)


@pytest.fixture
def driver(monkeypatch):
    active = RecordingDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", active)  # its own reset asks for a GPU
    for kernel in module.kernels().values():
        kernel.device_caches.pop(active.get_current_device(), None)
    monkeypatch.setattr(backend, "prepared", {})
    monkeypatch.setattr(backend, "reason", lambda: "")
    monkeypatch.setitem(backends._BACKENDS, "triton", (backend, ("cpu",)))
    return active


def train(widths: list[int], steps: int, method: str, base=torch.optim.SGD, dtype=torch.float32, **options) -> None:
    """Steps in which learning rate, momentum, weight decay and rho all change from step to step."""
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)]).to(dtype)
    groups = [{"params": [p], "rho": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = FusedGAM(groups, base, lr=0.1, method=method, backend="triton", **SETTINGS[method], **options)
    x = torch.randn(4, widths[0], dtype=dtype)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 / (step + 1)
            group["rho"] = 0.01 * (step + 1)
            group["weight_decay"] = 0.001 * step
        optimizer.step(lambda: model(x).square().mean())


def _what(argument):
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def test_prepared_launches_hand_over_the_same(driver):
    """What is launched again goes past Triton's own look at each argument, and differs in nothing."""
    layout = Layout([5000, 3], [0, 0], [True, True])
    x, partials = TensorList([torch.zeros(5000), torch.ones(3)], lasting=True), torch.zeros(2, 1, dtype=torch.float64)
    for _ in range(2):
        backend.squared_norm(SquaredNorm(layout=layout, x=x, partials=partials))
    assert len(backend.prepared) == 1
    first, again = (
        [_what(a) for a in launch if a is None or isinstance(a, (int, torch.Tensor))] for launch in driver.launches
    )
    assert first == again
    assert [len(launch) for launch in driver.launches] == [len(driver.launches[0])] * 2


@pytest.mark.parametrize(("method", "launches"), [("sam", 4), ("finite_difference", 8), ("accelerated", 8)])
def test_nothing_is_compiled_after_the_first_step_and_a_kernel_is_one_launch(driver, method, launches):
    train([3, 5, 2], 1, method, momentum=0.9)
    first = len(driver.compiled)
    assert 0 < first <= launches
    assert len(driver.launches) == launches
    train([3, 5, 2], 100, method, momentum=0.9)
    train([1, 1], 2, method, momentum=0.9)  # two tensors of one element
    train([16, 64, 64, 64, 16], 2, method, momentum=0.9)  # several chunks
    assert driver.compiled[first:] == []


def test_each_kind_of_update_is_compiled_once(driver):
    for _ in range(2):
        train([3, 2], 2, "finite_difference", torch.optim.AdamW)
        train([3, 2], 2, "finite_difference", torch.optim.Adam, amsgrad=True)
        train([3, 2], 2, "finite_difference", torch.optim.AdamW, dtype=torch.float64)
    assert driver.compiled.count("combined_update_kernel") == 3
    assert len(driver.compiled) == 2 * 5 + 3  # per dtype: norms of a vector and of a difference, three ascents


def test_a_program_per_chunk(driver):
    layout = Layout([5_000_000, 3], [0, 0], [True, True])
    x = TensorList([torch.zeros(5_000_000), None])
    partials = torch.zeros(2, 1, dtype=torch.float64)
    backend.squared_norm(SquaredNorm(layout=layout, x=x, partials=partials))
    (launch,) = driver.launches
    assert launch[0] == layout.chunks > 1024
    assert [a.tolist() for a in launch if isinstance(a, torch.Tensor)][2] == [x.tensors[0].data_ptr(), 0]


def test_autograd_sees_that_weights_changed(driver):
    weight = torch.randn(4, requires_grad=True)
    loss = (weight * weight).sum()
    lists = {"theta": TensorList([weight.detach()]), "backup": TensorList([torch.randn(4)])}
    backend.restore_(Restore(layout=Layout([4], [0], [True]), **lists))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_dtypes_are_named(driver):
    layout = Layout([4], [0], [True])
    integers = TensorList([torch.zeros(4, dtype=torch.int32)])
    with pytest.raises(TypeError, match=r"not torch\.int32; use backend='torch'"):
        backend.squared_norm(SquaredNorm(layout=layout, x=integers, partials=torch.zeros(2, 1, dtype=torch.float64)))
