"""Every verb of one room, dtype and awkward shape, once: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/every_verb.py [--room cuda] [--device cuda] [--kinds "one large" ...]
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
from test_verbs import VERBS  # noqa: E402

from gam_fused import available_backends  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", default="cuda")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    if why := available_backends()[arguments.room]:
        raise SystemExit(f"room {arguments.room}: {why}")
    for kind in arguments.kinds:
        for dtype in DTYPES:
            for lasting in (False, True):
                for run in VERBS.values():
                    run(OnDevice(arguments.room, arguments.device, lasting=lasting), Problem(kind, dtype, dtype))
    print(f"{len(VERBS)} verbs, {len(arguments.kinds)} kinds of shapes, {len(DTYPES)} dtypes: done")


if __name__ == "__main__":
    main()
