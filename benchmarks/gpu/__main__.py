"""One command for a machine with a GPU: `make gpu [OUT=folder] [ARGS=...]`.

    python -m benchmarks.gpu [--out benchmarks/results] [--minutes 9.5] [--stages build tests ...] [--rehearse]

Stages run one after the other, the important ones first, each with a time limit; when one fails the rest goes on. What they
find is in <device>.json in the folder, which is rewritten whenever a stage ends: how each stage went, beside the figures of
`make bench`. Exit status 1 if a stage failed. `--rehearse` runs on the CPU, with tiny sizes, what can run there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.record import Record, Stage
from benchmarks.machine import machine, slug, tool
from benchmarks.report import write

ROOT = Path(__file__).parents[2]
NO_DEVICE = "no CUDA device"


def stages(device: str, figures: Path) -> list[Stage]:
    """All stages, in the order they run; the benchmarks leave theirs in `figures`."""
    rehearse = ["--rehearse"] if device == "cpu" else []
    no_device = NO_DEVICE if rehearse else ""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-m", "gpu", "-v", "-rfEs", "--durations=10", "--continue-on-collection-errors"]
    tests += ["-o", "addopts=--import-mode=importlib"]  # in one process: tests measure the GPU's memory
    bench = [*python, "benchmarks", "--suites", "kernels", "optimizer", "training", "--device", device, *rehearse]
    return [
        Stage("build", [*python, "benchmarks.gpu.build"], 180, skip=no_device),
        Stage("self-check", [*python, "gam_fused"], 90),
        Stage("tests", [*tests, "-k", "not triton"], 180, skip=no_device),
        Stage("benchmarks", [*bench, "--minutes", "3.5", "--out", str(figures.parent)], 270, figures),
        *(_sanitizer(name, no_device) for name in ("memcheck", "racecheck")),
        Stage("tests of Triton", [*tests, "-k", "triton"], 240, skip=no_device),  # they wait for its compiler
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


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole run")
    parser.add_argument("--stages", nargs="+", help="only these")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args(given)
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"{NO_DEVICE}: torch {torch.__version__} sees none. What a CPU can run of this: make gpu ARGS=--rehearse")
        return 1
    device = "cpu" if arguments.rehearse else "cuda"
    about = machine(torch.device(device))
    name = "rehearsal" if arguments.rehearse else slug(about)
    record = Record(arguments.out.resolve() / f"{name}.json", about, 60 * arguments.minutes)
    os.chdir(ROOT)  # stages run modules of the repository
    with tempfile.TemporaryDirectory() as folder:
        chosen = stages(device, Path(folder, f"{slug(about)}.json"))
        unknown = set(arguments.stages or ()) - {stage.name for stage in chosen}
        if unknown:
            parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in chosen)}")
        for stage in chosen:
            if not arguments.stages or stage.name in arguments.stages:
                record.run(stage)
    if "suites" in record.content:
        write(record.content, record.path)
    print(record.path)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
