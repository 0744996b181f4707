"""The Triton room on a GPU: verbs and whole steps against the reference, compilations, synchronisation, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, SHAPES
from gam_helpers import SETTINGS, batch, close, mlp, regression, trainer
from test_verbs import VERBS, Problem, assert_as_precise_as_torch, assert_same_bits, reference, torch_error
from torch import Tensor

from gam_fused import FusedGAM, available_backends, rooms
from gam_fused.rooms import triton as room
from gam_fused.tensor_lists import EMPTY, Layout, TensorList

WHY = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else available_backends()["triton"] or ("TRITON_INTERPRET is set: nothing runs on the GPU" if room.INTERPRETED else "")
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY or "there")]

CUDA = torch.device("cuda", 0)


class OnGpu:
    """The Triton room for operands on the CPU: they go to the GPU, and what the verb wrote comes back."""

    def __getattr__(self, verb: str) -> Any:
        def call(layout: Layout, *args: Any) -> None:
            copies: dict[int, Tensor] = {}
            there = [self._moved(a, copies) for a in args]
            getattr(room, verb)(layout, *there)
            for here, gpu in zip(args, there, strict=True):
                for a, b in zip(self._tensors(here), self._tensors(gpu), strict=True):
                    if a is not None:
                        a.copy_(b)

        return call

    def _moved(self, value: Any, copies: dict[int, Tensor]) -> Any:
        if isinstance(value, TensorList):
            return TensorList([None if t is None else copies.setdefault(id(t), self._copy(t)) for t in value.tensors])
        if isinstance(value, Tensor):
            return copies.setdefault(id(value), self._copy(value))
        return value

    @staticmethod
    def _copy(t: Tensor) -> Tensor:
        """On the GPU with the same strides, as far from a 16-byte mark as on the CPU."""
        shift = t.data_ptr() % 16 // t.element_size()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        buffer = torch.empty(extent + shift, dtype=t.dtype, device=CUDA)
        return buffer.as_strided(t.shape, t.stride(), shift).copy_(t)

    @staticmethod
    def _tensors(value: Any) -> list:
        return value.tensors if isinstance(value, TensorList) else [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_verbs(kind, dtype):
    for verb, run in VERBS.items():
        actual = run(OnGpu(), Problem(kind, dtype, dtype))
        exact = run(reference, Problem(kind, torch.float64, dtype))
        assert_as_precise_as_torch(actual, exact, torch_error(verb, kind, dtype, ()), dtype)
        assert_same_bits(run(OnGpu(), Problem(kind, dtype, dtype)), actual)


def train(backend: str, method: str, base: type, dtype: torch.dtype, steps: int = 5, **options: Any) -> list[Tensor]:
    model = mlp(dtype).to(CUDA)
    x, y = (t.to(CUDA) for t in batch(dtype=dtype))
    optimizer, closure = trainer(method, model, regression(model, x, y), base, backend=backend, **options)
    for _ in range(steps):
        optimizer.step(closure)
    return [p.detach().double() for p in model.parameters()]


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_whole_steps_equal_the_reference(method, base):
    runs = [train(backend, method, base, torch.float64, max_grad_norm=0.5) for backend in ("triton", "reference")]
    close(*runs, tolerance=1e-9)


def test_auto_takes_a_compiled_room():
    there = available_backends()
    assert rooms.room("auto", CUDA) is (room if there.get("cuda", "not built") else rooms._ROOMS["cuda"][0])


def test_nothing_is_compiled_after_the_first_step():
    def compiled() -> int:
        return sum(len(caches[0]) for kernel in room.kernels().values() for caches in kernel.device_caches.values())

    model = mlp().to(CUDA)
    x, y = (t.to(CUDA) for t in batch())
    optimizer, closure = trainer("finite_difference", model, regression(model, x, y), backend="triton")
    optimizer.step(closure)
    first = compiled()
    for step in range(99):
        for group in optimizer.param_groups:
            group["lr"], group["rho"] = 1.0 / (step + 2), 0.01 * (step + 1)
        optimizer.step(closure)
    assert compiled() == first > 0


def test_a_step_never_waits_for_the_device():
    model = mlp().to(CUDA)
    x, y = (t.to(CUDA) for t in batch())
    optimizer, closure = trainer("accelerated", model, regression(model, x, y), torch.optim.AdamW, backend="triton")
    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (0.1, 0.05, 0.01):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_verbs_in_a_graph_run_on_what_the_lists_hold_then():
    """Lists made, and first sent to the device, under capture: their addresses must outlive both."""
    layout = Layout([5000, 3], [0, 0], [True, True])
    theta = TensorList([torch.zeros(5000, device=CUDA), torch.zeros(3, device=CUDA)], lasting=True)
    source = [torch.ones(5000, device=CUDA), torch.ones(3, device=CUDA)]
    partials = torch.zeros(2, layout.chunks, dtype=torch.float64, device=CUDA)
    room.restore_(layout, theta, TensorList(source))
    room.squared_norm(layout, TensorList(source), EMPTY, EMPTY, partials)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = TensorList([t * 2 for t in source])
        room.squared_norm(layout, x, EMPTY, EMPTY, partials)
        room.restore_(layout, theta, x)
        del x
    for value in (1.0, 3.0):
        for t in source:
            t.fill_(value)
        torch.empty(1 << 20, device=CUDA).fill_(float("nan"))  # what was freed is used again
        graph.replay()
        assert partials[0].sum().item() == 4 * value**2 * 5003
        assert all((t == 2 * value).all() for t in theta.tensors)
    room.restore_(layout, theta, TensorList(source))  # outside again: not from tables that only a replay fills
    assert all((t == 3.0).all() for t in theta.tensors)


def test_a_gradient_list_that_lies_where_the_last_one_lay_is_not_sent_again(monkeypatch):
    sent = []
    monkeypatch.setattr(room, "upload", lambda host, device: sent.append(host) or host.to(device))
    layout = Layout([5000], [0], [True])
    gradients = [torch.ones(5000, device=CUDA)]
    partials = torch.zeros(2, layout.chunks, dtype=torch.float64, device=CUDA)
    for _ in range(3):
        room.squared_norm(layout, TensorList(gradients), EMPTY, EMPTY, partials)
    assert len(sent) == 1
    room.squared_norm(layout, TensorList([g.clone() for g in gradients]), EMPTY, EMPTY, partials)
    assert len(sent) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_on_another_device_than_the_current_one():
    model = mlp().to("cuda:1")
    x, y = (t.to("cuda:1") for t in batch())
    optimizer = FusedGAM(model.parameters(), lr=0.1, backend="triton")
    optimizer.step(lambda: (model(x) - y).square().mean())
    assert all(p.isfinite().all() for p in model.parameters())
