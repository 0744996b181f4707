"""Builds the compiled backends in place for the GPU that is there, without a network. `python -m benchmarks.gpu.build`

Extensions alone, from a folder of links without pyproject.toml: a setuptools older than that file asks for cannot read it,
and on a machine without a network there is no other. The Triton kernels are linked to their place in the package. What was
built of the same sources, for the same torch, is not built anew. Exit status 1 and the reason if a backend is not built; the
other one is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
NEEDED = ("setup.py", "csrc", "gam_fused")
PACKAGE = ROOT / "gam_fused"
KERNELS = PACKAGE / "triton_kernels"
STAMP = ROOT / "build" / "gpu.stamp"


def not_built(backend: str, package: Path = PACKAGE) -> str:
    """Why the backend "cpu" or "cuda" is not in the package, in the words that setup.py has left; "" when it is."""
    if list(package.glob(f"_{backend}.*so")):
        return ""
    why = package / f"_{backend}_not_built.txt"
    return why.read_text().strip() if why.exists() else "it was not built"


def key() -> str:
    """What the build depends on."""
    sources = [ROOT / "setup.py", PACKAGE / "__init__.py"]  # the version is compiled into them
    sources += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    about = (torch.__version__, sys.version, torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    texts = [path.read_bytes() for path in sources if path.suffix != ".pyc"]
    return hashlib.sha256(repr(about).encode() + b"".join(texts)).hexdigest()


def build() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("GAM_FUSED_REQUIRE_CPP", "FORCE_CUDA")}
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            Path(folder, name).symlink_to(ROOT / name)
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, env=environment)


def main() -> int:
    if not KERNELS.exists():
        KERNELS.symlink_to(Path("..", "triton_kernels"))
    if STAMP.exists() and STAMP.read_text() == key() and not (not_built("cpu") or not_built("cuda")):
        print("Both backends are built, of these sources.")
        return 0
    build()
    reasons = {backend: why for backend in ("cpu", "cuda") if (why := not_built(backend))}
    for backend, why in reasons.items():
        print(f"The {backend.upper()} backend is not built: {why}")
    if not reasons:
        STAMP.parent.mkdir(exist_ok=True)
        STAMP.write_text(key())
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
