"""Builds the compiled rooms where torch and a compiler are there; otherwise gam_fused installs as pure Python.

Everything else about the package is in pyproject.toml. Environment:
    GAM_FUSED_REQUIRE_CPP=1  fail when the CPU room cannot be built (for CI)
    CXX                      the C++ compiler
    MAX_JOBS                 compilers to run at a time
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TORCH_MINIMUM = (2, 10)
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # the same bits from every instruction set
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def missing() -> str:
    """What keeps the CPU room from being built, and the mend; "" when nothing does."""
    if sys.platform == "win32":
        return "the compiled CPU room is not built on Windows"
    try:
        import torch
    except ImportError:
        return "torch is not there at build time; install it, then: pip install --no-build-isolation ."
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < TORCH_MINIMUM:
        return f"torch {torch.__version__} is older than 2.10; upgrade it, then: pip install --no-build-isolation ."
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler}); install one or set CXX, then: pip install --no-build-isolation ."
    return ""


def give_up(why: str) -> None:
    """Go on without the CPU room, or stop where it is required."""
    if os.environ.get("GAM_FUSED_REQUIRE_CPP") == "1":
        raise SystemExit(f"gam_fused: GAM_FUSED_REQUIRE_CPP=1, but {why}")
    print(f"\ngam_fused: the compiled CPU room is left out, the torch room serves instead: {why}\n", file=sys.stderr)


def compiled() -> dict:
    """Arguments of `setup` that build the compiled rooms, one shared object each."""
    why = missing()
    if why:
        give_up(why)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Goes on without the extension when it does not compile."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                give_up(f"it does not compile:\n{error}")
                self.extensions.clear()

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    cpu = CppExtension(
        "gam_fused._cpu",
        [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [cpu],  # the CUDA room's extension, csrc/cuda, goes beside it
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**compiled())
