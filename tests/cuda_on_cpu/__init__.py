"""The kernels of csrc/cuda on the CPU: built with a shim for CUDA's device language, as a backend over CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

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
    if result.exists():
        return result
    build.mkdir(parents=True, exist_ok=True)
    objects = [build / f"{source.stem}.o" for source in sources]
    shim = ["-include", str(Path(__file__).parent / "shim.h"), "-x", "c++"]
    commands = [["g++", *flags, *shim, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = ["g++", "-shared", *(SANITIZERS if sanitized else []), *map(str, objects), *torch_libraries]
    unfinished = build / f"kernels.{os.getpid()}.so"
    _run([*link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(unfinished)])
    unfinished.replace(result)
    return result


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-3:])} failed:\n{done.stderr[-4000:]}")


class CudaOnCpu(CompiledBackend):
    """`backends.compiled.cuda` with CPU tensors. The layout's map is handed over, as for a GPU."""

    def __init__(self, path: Path):
        super().__init__("CUDA", "", "", lambda: "", getattr(torch.ops, NAMESPACE))
        torch.ops.load_library(str(path))
        self._shim = ctypes.CDLL(str(path))

    def reason(self) -> str:
        return ""

    def map_of(self, layout, device):
        return layout.on(torch.device("cpu"))

    def drop_block_barriers(self, dropped: bool) -> None:
        """Make __syncthreads do nothing."""
        self._shim.shim_drop_block_barriers(int(dropped))


@cache
def backend(*, sanitized: bool = False) -> CudaOnCpu:
    """The backend, built if need be. A sanitized one needs the address sanitizer's runtime preloaded."""
    operators.define(NAMESPACE)
    return CudaOnCpu(library(sanitized=sanitized))
