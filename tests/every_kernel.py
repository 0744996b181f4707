"""Every kernel of one backend, dtype and awkward shape, once: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/every_kernel.py [--backend cuda] [--device cuda] [--kinds "one large" ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from cases import DTYPES, SHAPES, Problem  # noqa: E402
from on_gpu import OnDevice  # noqa: E402
from test_kernels import KERNELS  # noqa: E402

from gam_fused import available_backends  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    if why := available_backends()[arguments.backend]:
        raise SystemExit(f"backend {arguments.backend}: {why}")
    for kind in arguments.kinds:
        for dtype in DTYPES:
            for lasting in (False, True):
                for run in KERNELS.values():
                    run(OnDevice(arguments.backend, arguments.device, lasting=lasting), Problem(kind, dtype, dtype))
    print(f"{len(KERNELS)} kernels, {len(arguments.kinds)} kinds of shapes, {len(DTYPES)} dtypes: done")


if __name__ == "__main__":
    main()
