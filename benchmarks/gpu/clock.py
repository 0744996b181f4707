"""Time on a device: by its own events where it is a GPU, by the host's clock where it is the CPU."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

HEAD_START = 40_000_000  # cycles, some 20 ms, that the GPU waits while the host launches


class Clock:
    """Seconds that work takes on `device`. Every method takes (prepare, run), of which `run` alone is timed."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if self.on_gpu else None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def kernel(self, prepare: Callable[[], object], run: Callable[[], object]) -> float:
        """One launch or a few, with nothing of their operands left in the L2 cache."""
        prepare()
        if self._flush is not None:
            self._flush.zero_()
        return self._events(run) if self.on_gpu else self.host_and_wall(lambda: None, run)[1]

    def queued(self, prepare: Callable[[], object], run: Callable[[], object]) -> float:
        """On the GPU, from first to last, the host having a head start: what is left when host time is hidden."""
        prepare()
        self.synchronize()
        torch.cuda._sleep(HEAD_START)
        return self._events(run)

    def host_and_wall(self, prepare: Callable[[], object], run: Callable[[], object]) -> tuple[float, float]:
        """Until the call returns, and until its work is done, starting from an idle device."""
        prepare()
        self.synchronize()
        gc.disable()
        start = time.perf_counter()
        run()
        returned = time.perf_counter()
        self.synchronize()
        done = time.perf_counter()
        gc.enable()
        return returned - start, done - start

    @staticmethod
    def _events(run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gc.disable()
        begin.record()
        run()
        end.record()
        gc.enable()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def free(self) -> int:
        """Bytes of memory that may still be taken; on the CPU nobody counts."""
        if not self.on_gpu:
            return 1 << 62
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def launched(run: Callable[[], object]) -> dict[str, list[str]]:
    """Names of what `run` made the GPU do, by the profiler's category: "kernel", "gpu_memcpy", "gpu_memset"."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds: dict[str, list[str]] = {"kernel": [], "gpu_memcpy": [], "gpu_memset": []}
    for event in events:
        if event.get("cat") in kinds:
            kinds[event["cat"]].append(event["name"])
    return kinds


def rooms_on(device: torch.device) -> tuple[str, ...]:
    """Rooms to measure there, the compiled ones first."""
    from gam_fused import available_backends

    names = ("cuda", "triton", "torch") if device.type == "cuda" else ("cpp", "torch")
    there = available_backends()
    return tuple(name for name in names if not there[name])
