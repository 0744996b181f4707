"""Where the time of `FusedGAM.step` goes, with a closure that hands over prepared gradients.

    python -m benchmarks.profile_step [--shapes tiny|resnet50] [--backend cpp|torch] [--method sam] [--steps 20]
    python -m benchmarks.profile_step --callgrind     instructions per step, the same on a busy machine; needs valgrind

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
from pathlib import Path

from torch.profiler import profile

from benchmarks.contestants import Contestant, Implementation, parameters
from benchmarks.networks import shapes

FEW, MANY = 5, 45  # steps of the two runs under valgrind
METHODS = ("sam", "finite_difference", "accelerated")


def contestant(arguments: argparse.Namespace) -> Contestant:
    """(prepare, run) of one step."""
    return Implementation("SGD", arguments.method, arguments.backend).on(parameters(shapes(arguments.shapes)))


def python_functions(pair: Contestant, steps: int) -> pstats.Stats:
    """Python functions of `steps` steps; what prepares their gradients is left out."""
    prepare, run = pair
    profiler = cProfile.Profile()
    for _ in range(steps):
        prepare()
        profiler.enable()
        run()
        profiler.disable()
    return pstats.Stats(profiler).sort_stats("tottime")


def operators(pair: Contestant) -> str:
    """A table of the operators of one step, by their own time."""
    prepare, run = pair
    prepare()
    with profile() as profiler:
        run()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)


def instructions(arguments: argparse.Namespace) -> float:
    """Instructions per step under valgrind, without those that prepare its gradients.

    Raises:
        SystemExit: valgrind is not there, or the process under it fails.
    """
    if not shutil.which("valgrind"):
        raise SystemExit("--callgrind needs valgrind on the PATH")
    steps, preparations = (_count(arguments, MANY, bare) - _count(arguments, FEW, bare) for bare in ("step", "prepare"))
    return (steps - preparations) / (MANY - FEW)


def _count(arguments: argparse.Namespace, steps: int, bare: str) -> int:
    """Instructions of a whole process that runs `steps` steps, or only prepares them."""
    chosen = ["--shapes", arguments.shapes, "--backend", arguments.backend, "--method", arguments.method]
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


def loop(pair: Contestant, steps: int, bare: str = "step") -> None:
    """Steps, or their preparation, and nothing else: what valgrind counts."""
    prepare, run = pair
    for _ in range(steps):
        prepare()
        if bare == "step":
            run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=("tiny", "resnet50"), default="tiny")
    parser.add_argument("--backend", choices=("cpp", "torch"), default="cpp")
    parser.add_argument("--method", choices=METHODS, default="finite_difference")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--callgrind", action="store_true", help="instructions per step under valgrind")
    parser.add_argument("--bare", choices=("step", "prepare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.callgrind:
        count = instructions(arguments)
        print(f"{count:,.0f} instructions per step ({arguments.method}, {arguments.backend}, {arguments.shapes})")
        return
    pair = contestant(arguments)
    if arguments.bare:
        loop(pair, arguments.steps, arguments.bare)
        return
    loop(pair, 3)  # plan, state, scratch
    print(f"{arguments.method}, {arguments.backend}, {arguments.shapes}; {arguments.steps} steps\n")
    python_functions(pair, arguments.steps).print_stats(20)
    print(operators(pair))


if __name__ == "__main__":
    main()
