"""Measuring side by side: rounds in which every contestant runs once, and quantiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds at the 20, 50 and 80 % quantiles, and how many measurements."""
    times = torch.tensor(seconds, dtype=torch.float64) * 1e3
    q20, q50, q80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"ms_q20": q20, "ms": q50, "ms_q80": q80, "runs": len(seconds)}


def side_by_side(
    contestants: dict[str, tuple[Callable[[], object], Callable[[], object]]], rounds: int, progress: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. A contestant is (prepare, run); only `run` is timed.

    Every round runs all of them, so that drift of the machine meets all alike. The first round warms up and is dropped.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, (prepare, run) in contestants.items():
            prepare()
            gc.disable()
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            gc.enable()
            if number:
                times[name].append(elapsed)
            progress()
    return times
