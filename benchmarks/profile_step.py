"""Where the time of `FusedGAM.step` goes, with a closure that hands over prepared gradients.

    python -m benchmarks.profile_step [--shapes tiny|resnet50] [--backend cpp|torch] [--method sam] [--steps 20]
    python -m benchmarks.profile_step --callgrind     instructions per step, the same on a busy machine; needs valgrind
    python -m benchmarks.profile_step --ratios 200    steps of every method in steps of SGD (`host_time`); so many rounds

Prints Python functions by their own time (cProfile) and operators by theirs (torch.profiler), each from a run of its own,
since either slows the other down. With --callgrind the module runs itself under valgrind with different numbers of steps,
and with their preparation alone (four runs of one or two minutes each): differences are free of what starting and preparing
costs.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.profiler import profile

from benchmarks import host_time
from benchmarks.contestants import Implementation, parameters
from benchmarks.networks import shapes

FEW, MANY = 5, 45  # steps of the two runs under valgrind


def instructions(chosen: Sequence[str]) -> float:
    """Instructions per step under valgrind, without those that prepare its gradients.

    Raises:
        SystemExit: valgrind is not there, or the process under it fails.
    """
    if not shutil.which("valgrind"):
        raise SystemExit("--callgrind needs valgrind on the PATH")
    steps, preparations = (_count(chosen, MANY, bare) - _count(chosen, FEW, bare) for bare in ("step", "prepare"))
    return (steps - preparations) / (MANY - FEW)


def _count(chosen: Sequence[str], steps: int, bare: str) -> int:
    """Instructions of a whole process that runs `steps` steps, or only prepares them."""
    module = [sys.executable, "-m", "benchmarks.profile_step", *chosen, "--bare", bare, "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        output = f"--callgrind-out-file={folder}/callgrind"
        # One thread and one hash seed make counts repeat.
        command = ["env", "PYTHONHASHSEED=0", "OMP_NUM_THREADS=1", "valgrind", "--tool=callgrind", output, *module]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"valgrind failed:\n{done.stderr[-2000:]}")
    return int(found[1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=("tiny", "resnet50"), default="tiny")
    parser.add_argument("--backend", choices=("cpp", "torch"), default="cpp")
    parser.add_argument("--method", choices=("sam", "finite_difference", "accelerated"), default="finite_difference")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--callgrind", action="store_true", help="instructions per step under valgrind")
    parser.add_argument("--ratios", type=int, metavar="ROUNDS", help="host time in steps of torch's SGD")
    parser.add_argument("--bare", choices=("step", "prepare"), help=argparse.SUPPRESS)  # nothing else: valgrind counts
    given = parser.parse_args(arguments)
    if given.ratios:
        host_time.tell(given.ratios)
        return
    title = f"{given.method}, {given.backend}, {given.shapes}"
    if given.callgrind:
        chosen = ["--shapes", given.shapes, "--backend", given.backend, "--method", given.method]
        print(f"{instructions(chosen):,.0f} instructions per step ({title})")
        return
    prepare, run = Implementation("SGD", given.method, given.backend).on(parameters(shapes(given.shapes)))
    for _ in range(given.steps if given.bare else 3):  # three: plan, state, scratch
        prepare()
        if given.bare != "prepare":
            run()
    if given.bare:
        return
    print(f"{title}; {given.steps} steps\n")
    functions = cProfile.Profile()
    for _ in range(given.steps):
        prepare()
        functions.enable()
        run()
        functions.disable()
    pstats.Stats(functions).sort_stats("tottime").print_stats(20)
    prepare()
    with profile() as operators:
        run()
    print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


if __name__ == "__main__":
    main()
