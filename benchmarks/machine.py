"""What a figure must stand beside: machine, versions, commit."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """The processor, versions and commit; with a CUDA `device` also the GPU, its driver and what compiles for it."""
    facts = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d"),
    }
    return facts | _gpu(device) if device.type == "cuda" else facts


def slug(facts: dict[str, Any]) -> str:
    """A file's name for the machine: its GPU's, or its processor's with the number of cores."""
    name = facts.get("gpu") or f"{facts['cpu']} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tool(name: str) -> str:
    """A program of the CUDA toolkit, "" where it is missing."""
    beside = shutil.which("nvcc")
    places = [Path(beside).resolve().parent] if beside else []
    found = (shutil.which(str(place / name)) for place in (*places, Path("/usr/local/cuda/bin")))
    return shutil.which(name) or next(filter(None, found), "")


def _gpu(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "triton": None, "gpu": None}
    if importlib.util.find_spec("triton"):
        import triton

        facts["triton"] = triton.__version__
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(device)
        facts |= {"gpu": p.name, "gpus": torch.cuda.device_count(), "compute_capability": f"{p.major}.{p.minor}"}
        facts |= {"memory_GiB": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count}
        facts["driver"] = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["nvcc"] = "".join(re.findall(r"release ([\d.]+)", _printed(tool("nvcc"), "--version")))
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str:
    return _printed("git", "-C", str(Path(__file__).parent), *arguments)


def _printed(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""
