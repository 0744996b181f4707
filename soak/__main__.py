"""The long check, bounded in time: `make soak`.

    python -m soak [--minutes 10] [--only PART ...] [--seed 0] [--out out]

A line of progress every ten seconds, a summary line per part, the figures in out/soak.json. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["GAM_FUSED_CHECK"] = "1"

import torch  # noqa: E402

from soak import faults, kills, large, lists, operators, properties, ranks, sanitizers, state_dicts  # noqa: E402

# What runs a part, and its share of the time.
PARTS = {
    "lists": (lists.run, 0.3),
    "properties": (properties.run, 0.25),
    "faults": (faults.run, 0.08),
    "ranks": (ranks.run, 0.07),
    "kills": (kills.run, 0.06),
    "operators": (operators.run, 0.07),
    "state_dicts": (state_dicts.run, 0.03),
    "sanitizers": (sanitizers.run, 0.07),
    "large": (large.run, 0.07),
}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together (10)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts, with all the time")
    parser.add_argument("--seed", type=int, default=0, help="another one tries other cases (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for soak.json (out/)")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # problems are small; the property of threads sets its own
    record: dict[str, Any] = {"torch": torch.__version__, "minutes": options.minutes, "seed": options.seed, "parts": {}}
    left = 60 * options.minutes
    for i, name in enumerate(options.only):
        run, share = PARTS[name]
        seconds = left * share / sum(PARTS[later][1] for later in options.only[i:])
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)
        start = time.monotonic()
        figures = run(seconds, options.seed)
        left = max(0.0, left - (time.monotonic() - start))
        record["parts"][name] = figures
        (options.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n")  # a run that is stopped leaves these
        told = ", ".join(f"{k} {v}" for k, v in figures.items() if k != "failures")
        print(f"{name}: {'FAILED' if figures['failed'] else 'ok'}: {told}", flush=True)
    return int(any(figures["failed"] for figures in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
