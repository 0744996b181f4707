"""Time and memory on a device: by a GPU's own events and counters where it is one, by the host's where it is the CPU.

`wall` and `on_device` are timers for pytest-benchmark (`--benchmark-timer=benchmarks.clock.wall`).
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

HEAD_START = 4_000_000  # cycles, some 2 ms, that the GPU waits while the host launches a kernel
FLUSHED = 256 << 20  # bytes, more than most last-level caches hold


class Moment:
    """A point in the current CUDA stream's work; the difference of two is seconds, and waits for them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def on_device() -> Moment | float:
    """Timer of the device's work: events on a GPU, the host's clock on a CPU."""
    return Moment() if torch.cuda.is_initialized() else time.perf_counter()


def wall() -> float:
    """Timer of the host, once all work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """What pytest-benchmark's one timer does not tell of work on `device`."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self._flush = torch.ones(
            FLUSHED // 4, device=device
        )  # of pages that are there: untouched ones are one page of zeros
        self._sum = torch.zeros((), device=device)

    def flush_caches(self) -> None:
        """Fills the last-level cache with something else, by reading: lines written to would have to be evicted next."""
        torch.sum(self._flush, dim=0, out=self._sum)

    def cold(self) -> None:
        """Flushed caches, and on a GPU a head start for the host."""
        self.flush_caches()
        if self.on_gpu:
            torch.cuda._sleep(HEAD_START)

    def host(self, prepare: Callable[[], object], run: Callable[[], object]) -> float:
        """Seconds until `run` returns, its work done or not, starting from an idle device."""
        prepare()
        start = wall()
        run()
        return time.perf_counter() - start

    def free(self) -> int:
        """Bytes of memory that may still be taken."""
        gc.collect()
        if not self.on_gpu:
            return min(psutil.virtual_memory().available, _left_in_cgroup())
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, run: Callable[[], object]) -> int:
        """The most bytes of tensors that `run` holds at a time, beyond what was there before."""
        gc.collect()
        if not self.on_gpu:
            return _peak_on_cpu(run)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device) - before


def _left_in_cgroup() -> int:
    """Bytes that this process's control group may still take, where it has a limit."""
    limit, current = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    try:
        return int(limit.read_text()) - int(current.read_text())
    except (OSError, ValueError):  # no control groups; "max"
        return sys.maxsize


def _peak_on_cpu(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def traced(run: Callable[[], object], **options: bool) -> list[dict[str, Any]]:
    """The events that the profiler sees in `run`, as it writes them for Chrome."""
    on_gpu = torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, **options) as trace:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def launched(run: Callable[[], object]) -> dict[str, list[str]]:
    """Names of what `run` started, by the profiler's category.

    "kernel", "gpu_memcpy", "gpu_memset": on the GPU. "cpu_op": torch operators, those called by other operators included.
    """
    kinds: dict[str, list[str]] = {"kernel": [], "gpu_memcpy": [], "gpu_memset": [], "cpu_op": []}
    for event in traced(run):
        kinds.get(event.get("cat", ""), []).append(event["name"])
    return kinds


def launches(run: Callable[[], object]) -> dict[str, int]:
    """How many kernels and copies `run` made a GPU do, how many torch operators it called."""
    seen = launched(run)
    counts = {"operators": len(seen["cpu_op"])}
    if torch.cuda.is_initialized():
        counts |= {"kernels": len(seen["kernel"]), "copies": len(seen["gpu_memcpy"]) + len(seen["gpu_memset"])}
    return counts


def backends_on(device: torch.device) -> tuple[str, ...]:
    """Backends to measure there, the compiled ones first."""
    from gam_fused import available_backends

    names = ("cuda", "triton", "torch") if device.type == "cuda" else ("cpp", "torch")
    there = available_backends()
    return tuple(name for name in names if not there[name])
