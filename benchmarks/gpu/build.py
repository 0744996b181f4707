"""Builds the compiled backends in place for the GPU that is there, without a network.

    python -m benchmarks.gpu.build

An editable install where pip and setuptools can do it. A setuptools older than pyproject.toml asks for cannot read that
file; then the extensions are built from a folder of links without it, and the Triton kernels linked to their place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
NEEDED = ("setup.py", "csrc", "gam_fused")
KERNELS = ROOT / "gam_fused" / "triton_kernels"


def environment() -> dict[str, str]:
    """Variables of setup.py: fail when a backend cannot be built; no architecture but this device's."""
    variables = {"GAM_FUSED_REQUIRE_CPP": "1"}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        variables |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return {**os.environ, **variables}


def install() -> int:
    """An editable install. Returns pip's exit status."""
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
    return subprocess.run(pip, cwd=ROOT, env=environment()).returncode


def build_without_installing() -> int:
    """The extensions alone. Returns setup.py's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            Path(folder, name).symlink_to(ROOT / name)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status = subprocess.run(command, cwd=folder, env=environment()).returncode
    if not KERNELS.exists():
        KERNELS.symlink_to(Path("..", "triton_kernels"))
    return status


def main() -> int:
    import setuptools

    recent = int(setuptools.__version__.split(".")[0]) >= 77
    if recent and install() == 0:
        return 0
    print(f"no editable install with setuptools {setuptools.__version__}: building the extensions alone", flush=True)
    return build_without_installing()


if __name__ == "__main__":
    sys.exit(main())
