"""The kernels of csrc/cuda on the CPU: built with a shim for CUDA's device language, as a backend over CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from gam_fused.backends import operators
from gam_fused.backends.compiled import CompiledBackend

NAMESPACE = "gam_fused_cuda_on_cpu"
ROOT = Path(__file__).parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# The address sanitizer clears a fiber's stack at every switch: there it has to be small, and so do kernel arguments.
STACKS = {False: ["-DGAM_MANY_WORDS", "-DSHIM_STACK=262144"], True: ["-DSHIM_STACK=32768"]}


def reason() -> str:
    """Why the kernels cannot be built here, or ""."""
    return "" if shutil.which("g++") else "no g++ to compile the CUDA kernels for the CPU with"


def library(*, sanitized: bool = False) -> Path:
    """Build the shared object, if that has not been done for these sources. Returns its path."""
    flags = [
        "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", *STACKS[sanitized],
        f"-DGAM_LIBRARY={NAMESPACE}", "-DGAM_DISPATCH=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-I{path}" for path in cpp_extension.include_paths()), *(SANITIZERS if sanitized else []),
    ]  # fmt: skip
    folder = ROOT / "csrc" / "cuda"
    sources = [*sorted(folder.glob("*.cu")), folder / "bindings.cpp", Path(__file__).parent / "shim.cpp"]
    inputs = [*sorted((ROOT / "csrc").rglob("*.*")), *sorted(Path(__file__).parent.glob("shim.*"))]
    key = hashlib.sha256(repr((flags, torch.__version__)).encode() + b"".join(p.read_bytes() for p in inputs))
    build = ROOT / "build" / f"cuda_on_cpu-{key.hexdigest()[:16]}"
    result = build / "kernels.so"
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:  # of two processes one builds, and the other waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            _compile(result, flags, sources, sanitized)
    return result


def _compile(result: Path, flags: list[str], sources: list[Path], sanitized: bool) -> None:
    build = result.parent
    objects = [build / f"{source.stem}.o" for source in sources]
    shim = ["-include", str(Path(__file__).parent / "shim.h"), "-x", "c++"]
    commands = [["g++", *flags, *shim, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = ["g++", "-shared", *(SANITIZERS if sanitized else []), *map(str, objects), *torch_libraries]
    unfinished = build / "unfinished.so"
    _run([*link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(unfinished)])
    unfinished.replace(result)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-3:])} failed:\n{done.stderr[-4000:]}")


class CudaOnCpu(CompiledBackend):
    """`backends.compiled.cuda` with CPU tensors. The layout's map is handed over, as for a GPU."""

    def __init__(self, path: Path):
        super().__init__("CUDA", "", lambda: "", getattr(torch.ops, NAMESPACE))
        torch.ops.load_library(str(path))
        self._shim = ctypes.CDLL(str(path))

    def reason(self) -> str:
        return ""

    def map_of(self, layout, device):
        return layout.on(torch.device("cpu"))

    @contextmanager
    def one_block_only(self, *, last: bool = False) -> Iterator[None]:
        """Of every launch one block alone is run, the first or the last."""
        self._shim.shim_run_blocks(-1 if last else 0, 1)
        try:
            yield
        finally:
            self._shim.shim_run_blocks(0, -1)

    def drop_block_barriers(self, dropped: bool) -> None:
        """Make __syncthreads do nothing."""
        self._shim.shim_drop_block_barriers(int(dropped))


@cache
def backend(*, sanitized: bool = False) -> CudaOnCpu:
    """The backend, built if need be. A sanitized one needs the address sanitizer's runtime preloaded."""
    operators.define(NAMESPACE)
    return CudaOnCpu(library(sanitized=sanitized))


def run_sanitized(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a process where the sanitized backend can be had, in which `tests/` is on the path."""
    # With the library that throws, or the sanitizer does not find the exceptions it watches.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("g++ has no address sanitizer runtime")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
