"""One command for a machine with a GPU: `make gpu [OUT=folder] [ARGS=...]`.

    python -m benchmarks.gpu [--out benchmarks/results] [--minutes 9.5] [--only NAME ...] [--rehearse]

    build self-check             the compiled backends for this GPU, each compared with the specification
    tests triton                 all tests marked gpu: kernels and steps in every backend, graphs, steps that must not wait
    memcheck racecheck           compute-sanitizer over every kernel of the CUDA backend
    kernels                      each kernel's rate against a copy's
    steps                        training steps of ResNet-18, ResNet-50 and ViT-B/32: eager, as a CUDA graph, compiled
    optimizer                    the optimizer alone, against the authors' order of operations and torch._foreach
    cosine                       the finite difference against the exact product, on ResNet-50
    training                     two networks trained to the end by the base, SAM and GAM

Stages run one after the other, the important ones first, each with a time limit; when one fails the rest goes on. --only
runs the stages named, after the build, and gives them all the time. What they find is in <device>.json in the folder, which
is rewritten whenever a stage ends, and in tables beside it. Exit status 1 if a stage failed. `--rehearse` runs on the CPU,
with tiny sizes, what can run there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.record import Record
from benchmarks.gpu.stages import ALWAYS, LIMITS, MINUTES, NO_DEVICE, limits, stages
from benchmarks.machine import machine, slug
from benchmarks.report import write

ROOT = Path(__file__).parents[2]
REHEARSAL = 60  # minutes: no more than a few are used, but on a busy machine


def main(given: Sequence[str] | None = None) -> int:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, help=f"of the whole run ({MINUTES:g}; of a rehearsal {REHEARSAL})")
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="NAME", help="only these stages, after the build")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args(given)
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"{NO_DEVICE}: torch {torch.__version__} sees none. What a CPU can run of this: make gpu ARGS=--rehearse")
        return 1
    minutes = arguments.minutes or (REHEARSAL if arguments.rehearse else MINUTES)
    device = "cpu" if arguments.rehearse else "cuda"
    about = machine(torch.device(device))
    name = "rehearsal" if arguments.rehearse else slug(about)
    record = Record(arguments.out.resolve() / f"{name}.json", about, 60 * minutes)
    os.chdir(ROOT)  # stages run modules of the repository
    seconds = limits([n for n in LIMITS if n in (*ALWAYS, *(arguments.only or LIMITS))], minutes)
    with tempfile.TemporaryDirectory() as folder:
        chosen = stages(device, slug(about), Path(folder), seconds)
        for number, stage in enumerate(chosen):
            record.run(stage, later=sum(after.limit for after in chosen[number + 1 :]))
    write(record.content, record.path)
    print(record.path)
    return 1 if record.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
