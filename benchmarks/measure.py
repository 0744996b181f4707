"""Measuring side by side: rounds in which every contestant runs once, quantiles, and what the machine is."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

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


def machine() -> dict[str, object]:
    """What a figure must stand beside: machine, versions, commit."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
