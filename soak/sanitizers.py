"""The kernels of csrc/cpu under AddressSanitizer with UBSan, and under ThreadSanitizer: every kernel, dtype, awkward shape.

Under the latter over plain threads (threads.cpp), since OpenMP's runtime is not built for it and would be full of races that
are none. The library is preloaded in a process of its own, and operators are registered under another name.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from soak.turns import Turns

ROOT = Path(__file__).parents[1]
NAMESPACE = "gam_fused_cpu_sanitized"
# The compiler's options, what is preloaded, and which bindings are built.
KINDS: dict[str, tuple[list[str], list[str], Path]] = {
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
        ["libasan.so", "libstdc++.so"],
        ROOT / "csrc" / "cpu" / "bindings.cpp",
    ),
    "thread": (["-fsanitize=thread"], ["libtsan.so"], ROOT / "soak" / "threads.cpp"),
}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "exitcode=66"}


def reason() -> str:
    """Why there are no sanitizers here, or ""."""
    if not shutil.which("g++"):
        return "no g++"
    missing = [name for _, names, _ in KINDS.values() for name in names if not Path(runtime(name)).is_absolute()]
    return f"g++ has no {', '.join(missing)}" if missing else ""


def runtime(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def library(kind: str) -> Path:
    """Build the shared object, if that has not been done for these sources. Returns its path."""
    sanitizer, _, bindings = KINDS[kind]
    flags = [
        "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", *sanitizer,
        f"-DGAM_LIBRARY={NAMESPACE}", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-I{path}" for path in cpp_extension.include_paths()),
    ]  # fmt: skip
    units = [p for p in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if p.name != "bindings.cpp"]
    inputs = [*sorted((ROOT / "csrc").rglob("*.h")), *units, ROOT / "csrc" / "cpu" / "bindings.cpp", bindings]
    key = hashlib.sha256(repr((flags, torch.__version__)).encode() + b"".join(p.read_bytes() for p in inputs))
    build = ROOT / "build" / f"soak-{kind}-{key.hexdigest()[:16]}"
    result = build / "kernels.so"
    if result.exists():
        return result
    build.mkdir(parents=True, exist_ok=True)
    objects = {source: build / f"{source.stem}.o" for source in [*units, bindings]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiler, [[*flags, "-c", str(s), "-o", str(o)] for s, o in objects.items()]))
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    unfinished = build / f"unfinished-{os.getpid()}.so"
    link = ["-shared", *sanitizer, *map(str, objects.values()), *torch_libraries]
    compiler([*link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(unfinished)])
    unfinished.replace(result)
    return result


def compiler(arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ {' '.join(arguments[-3:])} failed:\n{done.stderr[-4000:]}")


def backend_at(path: str) -> Any:
    """The backend of a sanitized library, in the process with its sanitizer."""
    from gam_fused.backends import operators
    from gam_fused.backends.compiled import CompiledBackend

    torch.set_num_threads(1)
    operators.define(NAMESPACE)
    torch.ops.load_library(path)
    return CompiledBackend("CPU", "", lambda: "", getattr(torch.ops, NAMESPACE))


def kernels(path: str, first: int, count: int) -> None:
    """In the process with the sanitizer: so many of the turns through every kernel, kind of shapes and dtype."""
    from cases import DTYPES, SHAPES, Problem
    from test_kernels import KERNELS

    backend = backend_at(path)
    kinds = list(SHAPES)
    for turn in range(first, first + count):
        kind, dtype = kinds[turn % len(kinds)], DTYPES[turn // len(kinds) % len(DTYPES)]
        for run_kernel in KERNELS.values():
            run_kernel(backend, Problem(kind, dtype, dtype))
    print("done")


def under(kind: str, code: str, isa: str = "") -> subprocess.CompletedProcess:
    """Run `code` in a process where the runtime of a sanitizer is preloaded."""
    environment = os.environ | OPTIONS | {"LD_PRELOAD": " ".join(map(runtime, KINDS[kind][1]))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GAM_FUSED_ISA": isa}
    # The thread sanitizer wants addresses where it looks for them.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
    return subprocess.run([*fixed, sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def sanitized(kind: str, first: int, count: int, isa: str = "") -> str:
    """Returns "" or what the sanitizer has found."""
    code = f"from soak.sanitizers import kernels; kernels({str(library(kind))!r}, {first}, {count})"
    done = under(kind, code, isa)
    return "" if done.returncode == 0 and done.stdout == "done\n" else (done.stdout + done.stderr)[-4000:] or "no output"


def run(seconds: float = float("inf"), number: int = 0, count: int | None = None, each: int = 8) -> dict[str, Any]:
    turns = Turns("sanitizers", seconds, count)
    if why := reason():
        return turns.figures(left_out=why)
    at = dict.fromkeys(KINDS, each * number)
    for turn in turns:
        kind, isa = list(KINDS)[turn % len(KINDS)], ("", "avx2", "baseline")[turn // len(KINDS) % 3]
        if found := sanitized(kind, at[kind], each, isa):
            turns.fail(f"{kind}, {isa or 'the best instruction set'}: {found}")
        at[kind] += each
    return turns.figures(kernel_runs={kind: 16 * (n - each * number) for kind, n in at.items()})
