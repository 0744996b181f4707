"""`python -m gam_fused`: lists available backends and self-tests them, each against `reference`."""

from __future__ import annotations

import platform
import sys
import textwrap

import torch

import gam_fused
from gam_fused.selfcheck import compare_with_reference


def main() -> int:
    """Print the report. Returns the exit status: 1 if an available backend disagrees with the reference."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    print(f"gam_fused {gam_fused.__version__}, {versions}")
    print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"CUDA {torch.version.cuda}: {', '.join(names)}")
    else:
        print("CUDA: no device, or a torch without CUDA")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    failed = False
    for name, why in gam_fused.available_backends().items():
        if why:
            print(f"  {name:<10} not available: {textwrap.indent(why, ' ' * 13).strip()}")
            continue
        for device in devices:
            result = compare_with_reference(name, torch.device(device))
            failed |= result.startswith("FAILED")
            if result:
                print(f"  {name:<10} {device}: {result}")
    print("A backend disagrees with the reference." if failed else "Every available backend agrees with the reference.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
