"""Whether the compiled backends load under the torch that is there, and register every kernel: a part of `make torch` and of
`make wheels`.

A torch without CUDA must never load the CUDA backend. One with CUDA loads it on a machine without a GPU too, if it is asked
directly, as here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import gam_fused
from gam_fused.backends import cpp, cuda
from gam_fused.backends.operands import KERNELS


def missing(device: str) -> list[str]:
    """Kernels that no operator serves on `device`, the name of a dispatch key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in KERNELS if not has(f"gam_fused::{name}", device)]


def main() -> str:
    """Returns "" or what is wrong."""
    built = sorted(path.name for path in Path(gam_fused.__file__).parent.glob("_c*.so"))
    print(f"torch {torch.__version__}: built {', '.join(built) or 'nothing'}")
    if why := cpp.reason():
        return why
    if kernels := missing("CPU"):
        return f"the CPU backend registers no {', '.join(kernels)}"
    if not any(name.startswith("_cuda") for name in built):
        print(f"The CPU backend loads and registers all {len(KERNELS)} kernels; there is no CUDA backend.")
        return ""
    if torch.version.cuda is None:
        why = cuda.reason()
        if "has no CUDA" not in why or missing("CUDA") != list(KERNELS):
            return f"a torch without CUDA has to leave the CUDA backend alone; it says: {why or 'loaded'}"
        print("The CPU backend loads; the CUDA backend stays out of a torch without CUDA.")
        return ""
    if why := cuda._load():
        return why
    if kernels := missing("CUDA"):
        return f"the CUDA backend registers no {', '.join(kernels)}"
    print(f"Both backends load and register all {len(KERNELS)} kernels.")
    return ""


if __name__ == "__main__":
    sys.exit(main() or 0)
