"""What the compiled backends are built with: compilers, their options, GPU architectures. Used by setup.py."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
_STAMP = runpy.run_path(str(ROOT / "gam_fused" / "backends" / "stamp.py"))  # importing the package needs torch
TORCH_MINIMUM = (2, 10)
NVCC_MINIMUM = (12, 0)
MANY_WORDS_FROM = (12, 1)  # kernel arguments of more than 4 KB
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # the same bits from every instruction set
    TARGET_VERSION,
]
# -fmad=false: element by element the same bits as on the CPU; the kernels wait for memory, not for arithmetic.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
INSTALL = "pip install --no-build-isolation ."
ERROR = re.compile(r"\b(error|fatal)\b[^:\n]*:|\bld: |undefined (reference|symbol)|: not found", re.IGNORECASE)
ERROR_LINES = 4  # that are kept of what a compiler prints


def inputs(backend: str) -> list[Path]:
    """What the stamp of the backend "cpu" or "cuda" depends on."""
    found: list[Path] = [*_STAMP["sources"](backend), ROOT / "gam_fused" / "__init__.py"]
    return found


def stamp(backend: str) -> str:
    """The option that compiles the stamp into a backend."""
    return f"-DGAM_BUILT_FROM={_STAMP['stamp'](backend)}"


class BuildFailed(Exception):
    """A compiler failed; the message is what it said first."""


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def cxx() -> list[str]:
    """The C++ compiler, with its options in CXX."""
    return shlex.split(os.environ.get("CXX", "c++"))


def cpu_missing() -> str:
    """Why the CPU backend cannot be built, and the remedy; "" when it can."""
    if sys.platform == "win32":
        return "the compiled CPU backend is not built on Windows"
    try:
        import torch
    except ImportError:
        return f"torch is not installed at build time; install it, then: {INSTALL}"
    if version_of(torch.__version__) < TORCH_MINIMUM:
        return f"torch {torch.__version__} is older than 2.10; upgrade it, then: {INSTALL}"
    if not shutil.which(cxx()[0]):
        return f"no C++ compiler ({cxx()[0]}); install one or set CXX, then: {INSTALL}"
    return ""


def nvcc() -> tuple[str, tuple[int, ...]]:
    """The path and version of the CUDA compiler; ("", ()) where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home, "bin", "nvcc"))] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next(filter(None, map(shutil.which, candidates)), None)
    if not path:
        return "", ()
    printed = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    return path, version_of(found[1]) if found else ()


def cuda_missing() -> str:
    """Why the CUDA backend cannot be built, and the remedy; "" when it can."""
    path, version = nvcc()
    if not path:
        return f"no CUDA toolkit (nvcc); install one or set CUDA_HOME, then: {INSTALL}"
    if version < NVCC_MINIMUM:
        found = ".".join(map(str, version)) or "unknown"
        return f"the CUDA toolkit at {path} is of version {found}, older than 12.0; upgrade it, then: {INSTALL}"
    return ""


def gpus() -> list[str]:
    """The architectures of the GPUs that torch sees, each once, such as "9.0"; none where nvcc does not know one of them."""
    import torch

    if not torch.cuda.is_available():
        return []
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    known = subprocess.run([nvcc()[0], "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if not all(f"compute_{major}{minor}" in known for major, minor in seen):
        return []
    return [f"{major}.{minor}" for major, minor in sorted(seen)]


def architectures() -> list[str]:
    """nvcc's -gencode options: TORCH_CUDA_ARCH_LIST's; else this machine's GPUs; else, and for "all", every architecture."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(gpus()) or "all"
    if wanted == "all":
        blackwell = ["10.0", "12.0"] if nvcc()[1] >= (12, 8) else []
        wanted = ";".join(["8.0", "8.6", "8.9", "9.0", *blackwell]) + "+PTX"
    options = []
    for entry in re.split(r"[;,\s]+", wanted.strip()):
        name = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if not name:
            raise SystemExit(f'gam_fused: TORCH_CUDA_ARCH_LIST holds {entry!r}; entries look like "9.0" or "9.0+PTX"')
        number = name[1] + name[2]
        codes = [f"sm_{number}", *([f"compute_{number}"] if name[3] else [])]
        options += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return options


def compile_commands(includes: Sequence[str], temporary: Path) -> dict[Path, list[str]]:
    """The command for every source of csrc/cuda, by the object that it makes."""
    compiler, version = nvcc()
    sources, options = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "bindings.cpp"], architectures()
    many = ["-DGAM_MANY_WORDS"] if version >= MANY_WORDS_FROM else []
    # What is left of the compilers that may run at a time goes to the architectures of one source.
    threads = max(1, min(jobs() // len(sources), len(options)))
    kernels = [compiler, *NVCC_FLAGS, *many, *options, *([f"--threads={threads}"] if threads > 1 else [])]
    bindings = [*cxx(), *CXX_FLAGS, "-fPIC", "-DUSE_CUDA", "-DGAM_LIBRARY=gam_fused", stamp("cuda")]
    bindings += [f"-I{path}" for path in includes]
    objects = {temporary / f"{source.stem}.o": source for source in sources}
    return {
        target: [*(kernels if source.suffix == ".cu" else bindings), "-c", str(source), "-o", str(target)]
        for target, source in objects.items()
    }


def jobs() -> int:
    """Compilers that may run at a time."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def build_cuda(target: Path, temporary: Path) -> None:
    """Compile and link csrc/cuda. `CUDAExtension` would not do: it refuses a torch without CUDA.

    Raises:
        BuildFailed: a compiler failed.
    """
    from torch.utils import cpp_extension

    temporary.mkdir(parents=True, exist_ok=True)
    commands = compile_commands(cpp_extension.include_paths(), temporary)
    with ThreadPoolExecutor(jobs()) as pool:
        running = [pool.submit(run, command) for command in commands.values()]
        try:
            for each in as_completed(running):
                each.result()
        finally:  # after a failure nothing further begins
            pool.shutdown(cancel_futures=True)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = [nvcc()[0], "-shared", "-cudart", "static", *map(str, commands), *libraries, "-Xlinker", "--no-as-needed"]
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(target)])


def run(command: Sequence[str]) -> None:
    """Run a compiler and print what it prints.

    Raises:
        BuildFailed: it failed, or is not there.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildFailed(str(error)) from error
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise BuildFailed(first_errors(done.stdout) or f"{command[0]} ended with status {done.returncode}")


def first_errors(printed: str) -> str:
    """The first lines of what a compiler printed that tell of errors; its last ones where none does."""
    lines = [line.replace(f"{CSRC.parent}/", "").strip() for line in printed.splitlines() if line.strip()]
    found = [line for line in lines if ERROR.search(line)]
    return "\n".join(found[:ERROR_LINES] or lines[-ERROR_LINES:])
