"""Builds the compiled backends where torch and a compiler are available; otherwise gam_fused installs as pure Python.

Everything else about the package is in pyproject.toml, compilers and their options are in csrc/toolchain.py. Environment:
    GAM_FUSED_REQUIRE_CPP=1   fail when the CPU backend cannot be built (for CI)
    FORCE_CUDA=1              build the CUDA backend also against a torch without CUDA, and fail when that cannot be done
    CXX                       the C++ compiler
    CUDA_HOME                 the CUDA toolkit; otherwise the nvcc on PATH
    TORCH_CUDA_ARCH_LIST      e.g. "8.0;9.0+PTX"; by default this machine's GPUs. "all", and the default where there is none:
                              8.0 to 12.0, as far as the toolkit knows them, and PTX
    MAX_JOBS                  compilers to run at a time

A backend that is not built leaves _cpu_not_built.txt or _cuda_not_built.txt in the package, which say why.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "gam_fused"
sys.path.insert(0, str(ROOT / "csrc"))

import toolchain  # noqa: E402

NOT_COMPILED = f"it does not compile:\n{{}}\nonce that is mended: {toolchain.INSTALL}"
REQUIRED = {"cpu": "GAM_FUSED_REQUIRE_CPP", "cuda": "FORCE_CUDA"}  # by backend, the variable that makes a failure an error


def give_up(backend: str, why: str) -> str:
    """Go on without a compiled backend, or stop where it is required. Returns `why`."""
    if os.environ.get(REQUIRED[backend]) == "1":
        raise SystemExit(f"gam_fused: {REQUIRED[backend]}=1, but {why}")
    print(f"\ngam_fused: the compiled {backend.upper()} backend is left out: {why}\n", file=sys.stderr)
    return why


def write_reasons(folder: Path, reasons: dict[str, str]) -> None:
    """Leave in a package why each backend was not built; what an earlier build has left of it there goes."""
    for backend, why in reasons.items():
        file = folder / f"_{backend}_not_built.txt"
        file.unlink(missing_ok=True)
        if why:
            for stale in folder.glob(f"_{backend}.*so"):
                stale.unlink()
            file.write_text(why + "\n")


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What this process and those that it starts print; it is in the list, and printed, in the end."""
    printed: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield printed
        finally:
            sys.stdout.flush()
            for number, own in enumerate(kept, 1):
                os.dup2(own, number)
                os.close(own)
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))
            print(printed[0], end="", flush=True)


class PurePython(build_py):
    """Where nothing can be compiled: the package with the reasons."""

    reasons: dict[str, str] = {}  # noqa: RUF012

    def run(self) -> None:
        super().run()
        in_place = getattr(self, "editable_mode", False)
        write_reasons(ROOT / PACKAGE if in_place else Path(self.build_lib, PACKAGE), self.reasons)


def compiled() -> dict:
    """Arguments of `setup` that build the compiled backends, one shared object each."""
    if why := toolchain.cpu_missing():
        PurePython.reasons = {"cpu": give_up("cpu", why), "cuda": why}
        return {"cmdclass": {"build_py": PurePython}}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        f"{PACKAGE}._cpu",
        [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))],
        depends=[os.path.relpath(path, toolchain.ROOT) for path in toolchain.inputs("cpu")],
        extra_compile_args={"cxx": [*toolchain.CXX_FLAGS, toolchain.stamp("cpu")]},
        py_limited_api=True,
    )
    cuda = Extension(f"{PACKAGE}._cuda", [], py_limited_api=True)

    class Build(BuildExtension):
        """Goes on without an extension that does not compile, and leaves the reason in the package."""

        def run(self) -> None:
            self.reasons = {"cpu": "", "cuda": ""}
            super().run()
            in_place = self.inplace or getattr(self, "editable_mode", False)  # older setuptools know no such mode
            folders = [Path(self.build_lib, PACKAGE), *([ROOT / PACKAGE] if in_place else [])]
            for folder in folders:
                if folder.exists():
                    write_reasons(folder, self.reasons)

        def build_extensions(self) -> None:
            self.build_cpu()
            self.build_cuda()
            self.extensions = [e for e, backend in ((cpu, "cpu"), (cuda, "cuda")) if not self.reasons[backend]]

        def build_cpu(self) -> None:
            self.extensions, printed = [cpu], []
            try:
                with recorded() as printed:
                    super().build_extensions()
            except Exception as error:
                why = toolchain.first_errors("".join(printed)) or str(error)
                self.reasons["cpu"] = give_up("cpu", NOT_COMPILED.format(why))

        def build_cuda(self) -> None:
            forced = os.environ.get("FORCE_CUDA") == "1"
            if not torch.version.cuda and not forced:
                why = f"torch was {torch.__version__} then, without CUDA; with this one: {toolchain.INSTALL}"
                self.reasons["cuda"] = why
                return
            if why := toolchain.cuda_missing():
                self.reasons["cuda"] = give_up("cuda", why)
                return
            try:
                toolchain.build_cuda(Path(self.get_ext_fullpath(cuda.name)), Path(self.build_temp) / "cuda")
            except toolchain.BuildFailed as error:
                self.reasons["cuda"] = give_up("cuda", NOT_COMPILED.format(error))

    return {
        "ext_modules": [cpu, cuda],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**compiled())
