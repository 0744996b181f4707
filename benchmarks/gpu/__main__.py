"""One command for a machine with a GPU: `make gpu [OUT=folder] [ARGS=...]`.

    python -m benchmarks.gpu [--out benchmarks/results] [--minutes 9.5] [--stages build tests ...] [--rehearse]

Stages run one after the other, the important ones first, each with a time limit; when one fails the rest goes on. Everything
they find is in gpu-<device>.json in the folder, which is rewritten whenever a stage ends. Exit status 1 if a stage failed.
`--rehearse` runs on the CPU, with tiny sizes, what can run there, and skips the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import pytest_report
from benchmarks.gpu.record import Record, Stage, read_json
from benchmarks.machine import machine, slug, tool
from benchmarks.report.files import write
from benchmarks.suites import SUITES

ROOT = Path(__file__).parents[2]
NO_DEVICE = "no CUDA device"


def stages(device: str, folder: Path) -> list[Stage]:
    """All stages, in the order they run. `folder` takes what they leave for the record."""
    python, on_cpu = sys.executable, device == "cpu"
    no_device = NO_DEVICE if on_cpu else ""
    outcomes = folder / "outcomes.jsonl"

    def suite(name: str, limit: float) -> Stage:
        out = folder / f"{name}.json"
        command = [python, "-m", "benchmarks.suites", name, "--out", str(out), "--device", device]
        return Stage(name, [*command, *(["--rehearse"] if on_cpu else [])], limit, lambda: read_json(out), told=True)

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
        suite("kernels", 110),
        suite("optimizer", 170),
        *(_sanitizer(name, no_device) for name in ("memcheck", "racecheck")),
        suite("training", 400),
    ]


def _sanitizer(name: str, skip: str) -> Stage:
    program = tool("compute-sanitizer")
    # Only our kernels are watched, by a part of their mangled names.
    command = [program, "--tool", name, "--error-exitcode", "9", "--kernel-name", "kernel_substring=3gam5entry"]
    environment = {}
    if name == "memcheck":
        command += ["--report-api-errors", "no"]  # torch probes what the driver can do
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a step beyond a tensor is one beyond an allocation
    skip = skip or ("" if program else "compute-sanitizer is not there; it comes with the CUDA toolkit")
    return Stage(name, [*command, sys.executable, "tests/every_kernel.py"], 120, environment=environment, skip=skip)


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
    about = machine(torch.device("cuda"))
    name = "rehearsal" if arguments.rehearse else slug(about)
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
    found = {name: stage.get("figures") for name, stage in record.content["stages"].items() if name in SUITES}
    report = {"machine": about, "suites": {name: figures for name, figures in found.items() if figures}}
    write(report, record.path.with_name(f"{record.path.stem}-report.json"))
    print(record.path)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
