"""Builds the compiled backends where torch and a compiler are available; otherwise gam_fused installs as pure Python.

Everything else about the package is in pyproject.toml. Environment:
    GAM_FUSED_REQUIRE_CPP=1   fail when the CPU backend cannot be built (for CI)
    FORCE_CUDA=1              build the CUDA backend also against a torch without CUDA, and fail when that cannot be done
    CXX                       the C++ compiler
    CUDA_HOME                 the CUDA toolkit; otherwise the nvcc on PATH
    TORCH_CUDA_ARCH_LIST      e.g. "8.0;9.0+PTX"; by default 8.0 to 12.0, as far as the toolkit knows them, and PTX
    MAX_JOBS                  compilers to run at a time
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
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


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


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
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler}); install one or set CXX, then: {INSTALL}"
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


def architectures() -> list[str]:
    """nvcc's -gencode options."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
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


def build_cuda(target: Path, temporary: Path) -> None:
    """Compile and link csrc/cuda. `CUDAExtension` would not do: it refuses a torch without CUDA.

    Raises:
        subprocess.CalledProcessError: a compiler failed; it has printed why.
    """
    from torch.utils import cpp_extension

    temporary.mkdir(parents=True, exist_ok=True)
    folder, (compiler, version) = ROOT / "csrc" / "cuda", nvcc()
    many = ["-DGAM_MANY_WORDS"] if version >= MANY_WORDS_FROM else []
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    cxx = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *CXX_FLAGS,
        "-fPIC",
        "-DUSE_CUDA",
        "-DGAM_LIBRARY=gam_fused",
        *includes,
    ]
    jobs, objects = [], []
    for source in [*sorted(folder.glob("*.cu")), folder / "bindings.cpp"]:
        objects.append(str(temporary / f"{source.stem}.o"))
        kernels = [compiler, *NVCC_FLAGS, *many, *architectures()]
        jobs.append([*(kernels if source.suffix == ".cu" else cxx), "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), jobs))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = [compiler, "-shared", "-cudart", "static", *objects, *libraries, "-Xlinker", "--no-as-needed"]
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(target)], check=True)


def give_up(backend: str, why: str, *, required: str) -> None:
    """Go on without a compiled backend, or stop where it is required."""
    if os.environ.get(required) == "1":
        raise SystemExit(f"gam_fused: {required}=1, but {why}")
    print(f"\ngam_fused: the compiled {backend} backend is left out, another serves instead: {why}\n", file=sys.stderr)


def compiled() -> dict:
    """Arguments of `setup` that build the compiled backends, one shared object each."""
    why = cpu_missing()
    if why:
        give_up("CPU", why, required="GAM_FUSED_REQUIRE_CPP")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Goes on without an extension that does not compile."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                give_up("CPU", f"it does not compile:\n{error}", required="GAM_FUSED_REQUIRE_CPP")
                self.extensions.remove(cpu)

        def build_extension(self, extension: Extension) -> None:
            if extension is not cuda:
                super().build_extension(extension)
                return
            try:
                build_cuda(Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "cuda")
            except (OSError, subprocess.CalledProcessError) as error:
                give_up("CUDA", f"it does not compile: {error}", required="FORCE_CUDA")
                self.extensions = [e for e in self.extensions if e is not cuda]

    cpu = CppExtension(
        "gam_fused._cpu",
        [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )
    cuda = Extension("gam_fused._cuda", [], py_limited_api=True)
    extensions = [cpu]
    if torch.version.cuda or os.environ.get("FORCE_CUDA") == "1":
        why = cuda_missing()
        if why:
            give_up("CUDA", why, required="FORCE_CUDA")
        else:
            extensions.append(cuda)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**compiled())
