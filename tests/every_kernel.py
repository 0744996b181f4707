"""Every kernel of one backend with each of its sets of operands in each dtype, once: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python tests/every_kernel.py [--backend cuda] [--device cuda]

Under it every tensor takes long, so awkward shapes take turns, as do lists that last and lists that do not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from cases import DTYPES, Problem  # noqa: E402
from on_gpu import OnDevice  # noqa: E402
from test_kernels import KERNELS  # noqa: E402

from gam_fused import available_backends  # noqa: E402

# Of several chunks, of one element, beside a 16-byte mark, with gaps between their strides.
KINDS = ("one large", "misaligned", "transposed", "one element", "channels_last")


def turns() -> Iterator[tuple[str, torch.dtype, str, bool]]:
    """(name in `KERNELS`, dtype, kind of shapes, whether lists last)."""
    for row, dtype in enumerate(DTYPES):
        for column, name in enumerate(KERNELS):
            yield name, dtype, KINDS[(row + column) % len(KINDS)], (row + column) % 2 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", type=torch.device, default="cuda")
    arguments = parser.parse_args()
    if why := available_backends()[arguments.backend]:
        raise SystemExit(f"backend {arguments.backend}: {why}")
    for name, dtype, kind, lasting in turns():
        print(f"{name}, {dtype}, {kind}{', lasting' * lasting}", flush=True)  # what is cut or fails tells where
        KERNELS[name](OnDevice(arguments.backend, arguments.device, lasting=lasting), Problem(kind, dtype, dtype))
    print(f"{len(KERNELS)} kernels, {len(DTYPES)} dtypes: done")


if __name__ == "__main__":
    main()
