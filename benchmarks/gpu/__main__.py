"""One command for a machine with a GPU: `make gpu [OUT=folder] [ARGS=...]`.

    python -m benchmarks.gpu [--out benchmarks/results] [--minutes 9.5] [--stages build tests ...] [--rehearse]

Stages run one after the other, the important ones first, each with a time limit; when one fails the rest goes on. Everything
they find is in gpu-<device>.json in the folder, which is rewritten whenever a stage ends. Exit status 1 if a stage failed.
`--rehearse` runs on the CPU, with tiny sizes, what can run there, and skips the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import pytest_report
from benchmarks.gpu.record import Record, Stage, read_json
from benchmarks.measure import machine

ROOT = Path(__file__).parents[2]
NO_DEVICE = "no CUDA device"


def describe_machine() -> dict[str, Any]:
    """The machine with its GPU, driver and the versions that matter there."""
    result = machine() | {"cuda": torch.version.cuda, "triton": None, "gpu": None}
    if importlib.util.find_spec("triton"):
        import triton

        result["triton"] = triton.__version__
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        result |= {"gpu": p.name, "gpus": torch.cuda.device_count(), "compute_capability": f"{p.major}.{p.minor}"}
        result |= {"memory_GiB": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count}
        result["driver"] = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        result["nvcc"] = "".join(re.findall(r"release ([\d.]+)", _printed(_tool("nvcc"), "--version")))
    return result


def _printed(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _tool(name: str) -> str:
    """A program of the CUDA toolkit, "" where it is missing."""
    beside = shutil.which("nvcc")
    places = [Path(beside).resolve().parent] if beside else []
    found = (shutil.which(str(place / name)) for place in (*places, Path("/usr/local/cuda/bin")))
    return shutil.which(name) or next(filter(None, found), "")


def stages(device: str, folder: Path) -> list[Stage]:
    """All stages, in the order they run. `folder` takes what they leave for the record."""
    python, on_cpu = sys.executable, device == "cpu"
    no_device = NO_DEVICE if on_cpu else ""
    verbs, steps, outcomes = folder / "verbs.json", folder / "steps.json", folder / "outcomes.jsonl"
    tiny = ["--device", "cpu", "--sizes", "20000", "--rounds", "2"] if on_cpu else []
    short = ["--device", "cpu", "--networks", "tiny", "--blocks", "1", "--steps", "1"] if on_cpu else []
    return [
        Stage("build", [python, "-m", "benchmarks.gpu.build"], 180, skip=no_device),
        Stage("self-check", [python, "-m", "gam_fused"], 90),
        Stage(
            "tests",
            [python, "-m", "pytest", "-m", "gpu", "-p", "benchmarks.gpu.pytest_report", "--continue-on-collection-errors"],
            240,
            lambda: pytest_report.summary(outcomes),
            {pytest_report.REPORT: str(outcomes)},
            no_device,
        ),
        Stage("verbs", [python, "-m", "benchmarks.gpu.verbs", "--out", str(verbs), *tiny], 90, lambda: read_json(verbs)),
        Stage("steps", [python, "-m", "benchmarks.gpu.steps", "--out", str(steps), *short], 170, lambda: read_json(steps)),
        *(_sanitizer(tool, no_device) for tool in ("memcheck", "racecheck")),
    ]


def _sanitizer(tool: str, skip: str) -> Stage:
    program = _tool("compute-sanitizer")
    # Only our kernels are watched, by a part of their mangled names.
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=3gam5entry"]
    environment = {}
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch probes what the driver can do
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a step beyond a tensor is one beyond an allocation
    skip = skip or ("" if program else "compute-sanitizer is not there; it comes with the CUDA toolkit")
    return Stage(tool, [*command, sys.executable, "tests/every_verb.py"], 120, environment=environment, skip=skip)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole run")
    parser.add_argument("--stages", nargs="+", help="only these")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"{NO_DEVICE}: torch {torch.__version__} sees none. What a CPU can run of this: make gpu ARGS=--rehearse")
        return 1
    about = describe_machine()
    name = "rehearsal" if arguments.rehearse else re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    record = Record(arguments.out.resolve() / f"gpu-{name}.json", about, 60 * arguments.minutes)
    os.chdir(ROOT)  # stages run modules of the repository
    with tempfile.TemporaryDirectory() as folder:
        chosen = stages("cpu" if arguments.rehearse else "cuda", Path(folder))
        unknown = set(arguments.stages or ()) - {stage.name for stage in chosen}
        if unknown:
            parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in chosen)}")
        for stage in chosen:
            if not arguments.stages or stage.name in arguments.stages:
                record.run(stage)
    print(record.path)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
