"""Builds the compiled backends in place for the GPU that is there, without a network. `python -m benchmarks.gpu.build`

Extensions alone, from a folder of links without pyproject.toml: a setuptools older than that file asks for cannot read it,
and on a machine without a network there is no other. The Triton kernels are linked to their place in the package.
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


def main() -> int:
    environment = os.environ | {"GAM_FUSED_REQUIRE_CPP": "1"}  # fail when a backend cannot be built
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        environment |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}  # no architecture but this device's
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            Path(folder, name).symlink_to(ROOT / name)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status = subprocess.run(command, cwd=folder, env=environment).returncode
    if not KERNELS.exists():
        KERNELS.symlink_to(Path("..", "triton_kernels"))
    return status


if __name__ == "__main__":
    sys.exit(main())
