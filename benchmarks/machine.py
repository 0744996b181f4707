"""What a figure must stand beside: machine, versions, commit, and of a GPU its driver and what compiles for it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from examples.digits import machine as host

CPU = torch.device("cpu")


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """The processor, versions and commit; with a CUDA `device` also the GPU, its driver and what compiles for it."""
    facts = host.machine()
    if device.type != "cuda":
        return facts
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else None
    facts |= {"cuda": torch.version.cuda, "triton": triton}
    p = torch.cuda.get_device_properties(device)
    facts |= {"gpu": p.name, "gpus": torch.cuda.device_count(), "compute_capability": f"{p.major}.{p.minor}"}
    facts |= {"memory_GiB": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count}
    facts["L2_MiB"] = round(p.L2_cache_size / 2**20, 1)
    facts["driver"] = host.printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    facts["nvcc"] = "".join(re.findall(r"release ([\d.]+)", host.printed(tool("nvcc"), "--version")))
    return facts


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
