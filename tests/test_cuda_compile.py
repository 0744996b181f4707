"""What nvcc makes of the CUDA kernels: no spills, registers within the budget, 16-byte accesses in the loops.

Budget: csrc/cuda/walk.cuh asks for 8 blocks of 128 threads on a multiprocessor: 64 registers. Adam may take 72 (7
blocks), in float64 128 (4 blocks).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import toolchain

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100")
KERNELS = ("squared_norm", "direction_products", "perturb", "combine", "restore", "combined_update")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")]


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


def kept(path: Path, make: Callable[[], str]) -> str:
    """The text of `path`; made, if that has not been done."""
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(make())
        unfinished.replace(path)
    return path.read_text()


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], tuple[str, str]]:
    """(kernel, architecture) -> what ptxas printed, and the machine code; kept in build/ until a source changes."""
    options = [*toolchain.NVCC_FLAGS, "-DGAM_MANY_WORDS", "-Xptxas", "-v"]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    inputs = [*sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc" / "cuda").glob("*.*"))]
    key = hashlib.sha256(repr((options, version)).encode() + b"".join(p.read_bytes() for p in inputs))
    folder = ROOT / "build" / f"cuda_compile-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)

    def build(job: tuple[str, str]) -> tuple[str, str]:
        kernel, architecture = job
        target = folder / f"{kernel}-{architecture}.cubin"

        def compile_it() -> str:
            command = [NVCC, *options, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
            command += ["-cubin", str(ROOT / "csrc" / "cuda" / f"{kernel}.cu"), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stderr

        def disassemble() -> str:
            tools = {**os.environ, "PATH": f"{Path(cuobjdump()).parent}:{os.environ['PATH']}"}
            command = [cuobjdump(), "-sass", str(target)]
            return subprocess.run(command, capture_output=True, text=True, check=True, env=tools).stdout

        printed = kept(target.with_suffix(".txt"), compile_it)
        return printed, kept(target.with_suffix(".sass"), disassemble) if cuobjdump() else ""

    jobs = [(kernel, architecture) for kernel in reversed(KERNELS) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(build, jobs), strict=True))


def kernels(printed: str) -> list[tuple[str, int, int, int]]:
    """Mangled name, registers, bytes of stack and of spills of every kernel that ptxas compiled."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, printed, re.DOTALL)
    return [(name, int(registers), int(stack), int(out) + int(back)) for name, stack, out, back, registers in found]


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_spills(compiled, kernel):
    for architecture in ARCHITECTURES:
        found = kernels(compiled[kernel, architecture][0])
        assert len(found) >= 8, "four dtypes, two sizes of argument block"
        for name, registers, stack, spilled in found:
            adam = re.search(r"combined_updateI(\w+?)Li1E", name)  # combined_update<double, 1, ...>
            most = 64 if not adam else 128 if adam[1] == "d" else 72
            assert stack == spilled == 0, f"sm_{architecture}: {name} spills"
            assert registers <= most, f"sm_{architecture}: {name} takes {registers} registers"


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither of a CUDA toolkit nor in the triton package")
@pytest.mark.parametrize("kernel", KERNELS)
def test_loops_move_16_bytes_at_a_time(compiled, kernel):
    for architecture in ARCHITECTURES:
        functions = compiled[kernel, architecture][1].split("Function : ")[1:]
        assert len(functions) >= 8
        for function in functions:
            name = function.split("\n", 1)[0]
            assert re.search(r"LDG\.E\.128", function), f"sm_{architecture}: {name} has no 16-byte load"
            if kernel not in ("squared_norm", "direction_products"):
                assert re.search(r"STG\.E\.(128|64\.STRONG)", function), f"sm_{architecture}: {name} has no wide store"
            assert not re.search(r"\b(LDL|STL)\b", function), f"sm_{architecture}: {name} uses local memory"


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither of a CUDA toolkit nor in the triton package")
def test_norms_keep_2_kb_in_flight(compiled):
    """Four 16-byte loads of a lane before the first sum: 2 KB of a warp."""
    for architecture in ARCHITECTURES:
        for function in compiled["squared_norm", architecture][1].split("Function : ")[1:]:
            name = function.split("\n", 1)[0]
            code = re.findall(r"\b(LDG\.E\.128|DFMA|FFMA)\b", function)
            weighted = re.search(r"Lj3E", name)  # x, y and the weight: three loads
            wanted = ["LDG.E.128"] * (3 if weighted else 4)
            runs = [code[i : i + len(wanted)] for i in range(len(code))]
            assert wanted in runs, f"sm_{architecture}: {name}"
