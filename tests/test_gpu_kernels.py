"""Every kernel of every backend on a GPU: precision, same bits, sizes beyond 32 bits, CUDA graphs, many addresses."""

from __future__ import annotations

from dataclasses import fields

import large
import pytest
import torch
from cases import DTYPES, SHAPES, Problem, assert_as_precise_as_torch, assert_same_bits, get_backend
from on_gpu import CUDA, OnDevice, gpu_backends
from test_kernels import KERNELS, reference, torch_error
from test_operators import record

from gam_fused.backends.operands import KERNELS as OPERATORS
from gam_fused.backends.operands import Restore, SquaredNorm
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.constants import Flag

pytestmark = pytest.mark.gpu


def check(backend_name: str, kernel: str, kind: str, dtype: torch.dtype, **options) -> dict:
    actual = KERNELS[kernel](OnDevice(backend_name), Problem(kind, dtype, dtype, **options))
    exact = KERNELS[kernel](reference, Problem(kind, torch.float64, dtype, **options))
    assert_as_precise_as_torch(actual, exact, torch_error(kernel, kind, dtype, tuple(options.items())), dtype)
    return actual


@gpu_backends()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_precision_and_the_same_bits_twice(backend_name, kind, dtype):
    """The second time with lists that last, whose addresses reach the kernels another way."""
    for kernel, run in KERNELS.items():
        actual = check(backend_name, kernel, kind, dtype)
        assert_same_bits(run(OnDevice(backend_name, lasting=True), Problem(kind, dtype, dtype)), actual)


@gpu_backends()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_the_kernels(backend_name, dtype):
    for options in ({"loss_scale": 1024.0}, {"max_norm": 0.5}, {"missing": False}):
        for kernel in KERNELS:
            check(backend_name, kernel, "chunk edges", dtype, **options)


@gpu_backends()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_the_base_optimizers(backend_name, dtype):
    for steps in (0.0, 3.0):
        for flags in (Flag.MAXIMIZE, Flag.NESTEROV, Flag.NESTEROV | Flag.MAXIMIZE):
            check(backend_name, "sgd momentum", "chunk edges", dtype, flags=flags, steps_so_far=steps)
        for flags in (Flag.MAXIMIZE, Flag.AMSGRAD, Flag.DECOUPLED, Flag.AMSGRAD | Flag.DECOUPLED):
            check(backend_name, "adam", "chunk edges", dtype, flags=flags, steps_so_far=steps)


@gpu_backends()
def test_more_elements_than_32_bits_count(backend_name):
    needed = 2 * large.BYTES if backend_name != "torch" else 40 * large.COUNT
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    large.check(get_backend(backend_name), CUDA)


@gpu_backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend_name, name, dtype):
    """Of the operators on CPU tensors, and on traced ones of CUDA: test_operators.py."""
    device = OnDevice(backend_name)
    kept, operands = {}, record(name, Problem("empty tensors", dtype, dtype))
    moved = type(operands)(**{f.name: device._moved(getattr(operands, f.name), kept) for f in fields(operands)})
    operator = getattr(torch.ops.gam_fused, name).default
    torch.library.opcheck(operator, device.backend._arguments(OPERATORS[name], moved))


@gpu_backends()
@pytest.mark.parametrize("count", [2, 2500], ids=["few addresses", "more addresses than a launch carries"])
def test_kernels_in_a_graph_run_on_what_the_lists_hold_then(backend_name, count):
    """Lists made, and first sent to the device, under capture: their addresses must outlive both."""
    backend, sizes = get_backend(backend_name), [5000 - i for i in range(count)]
    layout = Layout(sizes, [0] * count, [True] * count)
    theta = TensorList([torch.zeros(n, device=CUDA) for n in sizes], lasting=True)
    source = [torch.ones(n, device=CUDA) for n in sizes]
    partials = torch.zeros(2, 1, dtype=torch.float64, device=CUDA)
    zeros = [torch.zeros(n, device=CUDA) for n in sizes]
    backend.restore_(Restore(layout=layout, theta=theta, backup=TensorList(source)))
    backend.squared_norm(SquaredNorm(layout=layout, x=TensorList(source), y=TensorList(zeros), partials=partials))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = TensorList([t * 2 for t in source])
        backend.squared_norm(SquaredNorm(layout=layout, x=x, y=TensorList(zeros), partials=partials))
        backend.restore_(Restore(layout=layout, theta=theta, backup=x))
        del x
    for value in (1.0, 3.0):
        for t in source:
            t.fill_(value)
        torch.empty(1 << 20, device=CUDA).fill_(float("nan"))  # what was freed is used again
        graph.replay()
        assert partials[0].sum().item() == pytest.approx(4 * value**2 * sum(sizes), rel=1e-12)
        assert all((t == 2 * value).all() for t in theta.tensors)
    # Outside again: not from tables that only a replay fills.
    backend.restore_(Restore(layout=layout, theta=theta, backup=TensorList(source)))
    assert all((t == 3.0).all() for t in theta.tensors)
