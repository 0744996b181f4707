"""The stages of `make gpu`, in the order of their worth, and their limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import build
from benchmarks.gpu.record import Stage
from benchmarks.machine import tool

NO_DEVICE = "no CUDA device"
LIMITS = {  # seconds in a run of all
    "build": 80,
    "self-check": 40,  # Triton compiles
    "tests": 95,
    "memcheck": 35,
    "racecheck": 35,
    "kernels": 50,
    "steps": 70,
    "optimizer": 40,
    "triton": 65,
    "cosine": 20,
    "training": 40,
}
ALWAYS = ("build",)  # also where others are asked for: they need it
MINUTES = sum(LIMITS.values()) / 60
START, WRITE = 6, 2  # seconds in which Python and torch have started, in which figures are written


def limits(names: Sequence[str], minutes: float) -> dict[str, float]:
    """Seconds of the stages that run: the build has its own, the others share what is left."""
    fixed = sum(LIMITS[name] for name in names if name in ALWAYS)
    rest = sum(LIMITS[name] for name in names) - fixed
    factor = max(60 * minutes - fixed, 1) / max(rest, 1)
    return {name: LIMITS[name] if name in ALWAYS else factor * LIMITS[name] for name in names}


def stages(device: str, machine: str, folder: Path, seconds: dict[str, float]) -> list[Stage]:
    """Those of `seconds`, which are their limits; figures of `machine`, its file name, are left in `folder`."""
    no_device = _says(NO_DEVICE if device == "cpu" else "")
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-m", "gpu", "-v", "-rfEs", "--durations=10", "--continue-on-collection-errors"]
    tests += ["-o", "addopts=--import-mode=importlib"]  # in one process: tests measure the GPU's memory
    found = [
        ("build", [*python, "benchmarks.gpu.build"], no_device, None),
        ("self-check", [*python, "gam_fused"], str, None),
        ("tests", [*tests, "-k", "not triton"], no_device, None),
        *((name, _sanitizer(name), _no_sanitizer(device), None) for name in ("memcheck", "racecheck")),
        *(
            (name, *_figures(name, device, folder / name / f"{machine}.json", seconds.get(name, 0)))
            for name in ("kernels", "steps", "optimizer")
        ),
        ("triton", [*tests, "-k", "triton"], no_device, None),  # they wait for its compiler
        *(
            (name, *_figures(name, device, folder / name / f"{machine}.json", seconds.get(name, 0)))
            for name in ("cosine", "training")
        ),
    ]
    # A step beyond a tensor is then one beyond an allocation.
    environment = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
    return [
        Stage(name, command, seconds[name], figures, environment.get(name, {}), skip)
        for name, command, skip, figures in found
        if name in seconds
    ]


def _figures(name: str, device: str, file: Path, seconds: float) -> tuple[list[str], Callable[[], str], Path]:
    """The command of a stage that measures, and where it leaves what it has measured."""
    options = ["--device", device, "--out", str(file.parent), *(["--rehearse"] if device == "cpu" else [])]
    module = [sys.executable, "-m"]
    if name in ("cosine", "training"):
        return [*module, f"benchmarks.gpu.{name}", *options, "--seconds", f"{max(seconds - START, 1):.0f}"], str, file
    # A suite is a process of its own. A case that has begun when its time is up has an eighth of it to end, or is killed:
    # the figures before it are kept.
    grace = START + seconds / 8
    time = max(seconds - START - grace - WRITE, 1)
    suites = [
        "--suites",
        "training" if name == "steps" else name,
        "--minutes",
        f"{time / 60:.3f}",
        "--grace",
        f"{grace:.0f}",
    ]
    return [*module, "benchmarks", *suites, *options], str, file


def _sanitizer(name: str) -> list[str]:
    # Only our kernels are watched, by a part of their mangled names.
    command = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "9"]
    command += ["--kernel-name", "kernel_substring=3gam5entry"]
    command += ["--report-api-errors", "no"] if name == "memcheck" else []  # torch probes what the driver can do
    return [*command, sys.executable, "tests/every_kernel.py"]


def _no_sanitizer(device: str) -> Callable[[], str]:
    def why() -> str:
        if device == "cpu":
            return NO_DEVICE
        if not tool("compute-sanitizer"):
            return "compute-sanitizer is not there; it comes with the CUDA toolkit"
        missing = build.not_built("cuda")
        return f"it needs the CUDA backend, which is not built: {missing}" if missing else ""

    return why


def _says(text: str) -> Callable[[], str]:
    return lambda: text
