"""Every kernel in every backend, beside a triad (CPU) or a copy (GPU) of the same size in the same blocks.

Before each timing the last-level cache is filled with something else. On a GPU the time is that of the device's events, the
host having a head start of some 2 ms, and host time and launches are told beside it: a row whose host time is longer is not
the kernel's.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, Plan, blocks_of
from benchmarks.clock import Clock, backends_on, launches
from benchmarks.contestants import triad
from benchmarks.kernels import KERNELS, Operands
from gam_fused import backends

YARDSTICK, PRODUCT = "yardstick", "matrix product, float32"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
M = 10**6
ON_GPU = [(25 * M, 16), (M, 1), (M, 2000), (250 * M, 16), (25 * M, 1), (25 * M, 2000), (1000 * M, 16)]
ON_CPU = [(25 * M, 160), (M, 1), (M, 2000), (100 * M, 160), (25 * M, 1), (25 * M, 2000), (1000 * M, 160)]


def cases(plan: Plan) -> list[Case]:
    """Backend by backend, as Triton compiles and torch takes long; the important sizes first, in both dtypes."""
    sizes = [(20_000, 10)] if plan.rehearse else ON_GPU if plan.device.type == "cuda" else ON_CPU
    result = blocks_of(PRODUCT, {PRODUCT: None}, plan)
    for backend in backends_on(plan.device):
        for elements, tensors in sizes:
            for dtype in DTYPES:
                names = {YARDSTICK: (elements, tensors, dtype, None, None)}
                names |= {f"{v}, {backend}": (elements, tensors, dtype, v, backend) for v in KERNELS}
                result += blocks_of(f"{elements} elements in {tensors} tensors, {dtype}, {backend}", names, plan)
    return result


def bench_kernel(benchmark: Any, case: Case, plan: Plan, clock: Clock) -> None:
    rounds = 2 if plan.rehearse else 20 if clock.on_gpu else 7
    if case.cell == PRODUCT:
        _matrix_product(benchmark, case, plan, rounds)
        return
    elements, tensors, dtype, kernel, backend = case.what
    if (size := (elements, tensors, dtype)) not in _held:
        _held.clear()
        needed = _bytes_needed(elements, DTYPES[dtype], slow="torch" in case.cell)
        if needed > (free := clock.free()):
            pytest.skip(f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
        _held[size] = Operands(elements, tensors, DTYPES[dtype], plan.device)
    facts: dict[str, Any] = {}
    if kernel is None:
        run, moved = _yardstick(elements, DTYPES[dtype], plan.device)
    else:
        o = _held[size]
        run, moved = (lambda: KERNELS[kernel].run(backends._BACKENDS[backend][0], o)), o.moved(KERNELS[kernel])
        facts = {"kernel": kernel, "backend": backend, "flops": KERNELS[kernel].flops * o.elements}
        run()  # Triton compiles
        if case.block == 0 and dtype == "float32" and elements <= M:  # the profiler takes long to start
            facts |= launches(run)
        if clock.on_gpu:
            facts["host_ms"] = 1e3 * statistics.median(clock.host(lambda: None, run) for _ in range(5))
    facts |= {"elements": elements, "tensors": tensors, "dtype": dtype, "bytes": moved}
    benchmark.extra_info.update(facts)
    benchmark.pedantic(run, setup=clock.cold, rounds=rounds, warmup_rounds=1)


def _matrix_product(benchmark: Any, case: Case, plan: Plan, rounds: int) -> None:
    """The arithmetic this device does in a second, for the roofline."""
    n = 256 if plan.rehearse else 2048
    a, b = (torch.ones(n, n, device=plan.device) for _ in range(2))
    facts = {"flops": 2 * n**3, "bytes": 12 * n * n}
    benchmark.extra_info.update(facts)
    benchmark.pedantic(torch.mm, args=(a, b), rounds=rounds, warmup_rounds=1)


_held: dict[tuple[int, int, str], Operands] = {}  # of one size, which all contestants of a cell share


def _yardstick(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    """A triad on a CPU, a copy on a GPU, of as many bytes an operand as the kernels have."""
    if device.type == "cpu":
        size = elements * dtype.itemsize // 4
        return triad(size, device), 12 * size
    source, target = (torch.ones(elements, dtype=dtype, device=device) for _ in range(2))
    return (lambda: target.copy_(source)), 2 * source.nbytes


def _bytes_needed(elements: int, dtype: torch.dtype, *, slow: bool) -> int:
    """Of the operands and the yardstick, and of what the torch backend makes on the way."""
    return elements * (8 * dtype.itemsize + 4 + (24 if slow else 0)) + (512 << 20)
