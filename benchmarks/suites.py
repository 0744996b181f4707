"""Runs a suite under pytest-benchmark and reduces what it wrote: per cell and contestant quantiles, blocks and facts.

python -m benchmarks.suites verbs --out verbs.json [--device cuda] [--seconds 90] [--blocks 3] [--rehearse]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import quantiles

HERE = Path(__file__).parent
SUITES = {"verbs": "on_device", "optimizer": "wall", "training": "wall", "scaling": "wall"}  # and the timer of each
IDENTITY = ("cell", "contestant", "block")
MEASURED_ONCE = ("operators", "kernels", "copies", "peak_bytes")  # in the first block


def run_suite(
    name: str, *, device: str = "cpu", seconds: float = float("inf"), blocks: int = 3, rehearse: bool = False
) -> dict[str, Any]:
    """Measure one suite, in a process of its own.

    Returns:
        "machine"; "cells": {cell: {contestant: row}} with the quantiles over all blocks in milliseconds, "blocks", the
        median of each block by its number, and the suite's own facts; "left_out": {cell: {contestant: why}}; "failed".
    """
    with tempfile.TemporaryDirectory() as folder:
        raw, facts = Path(folder, "raw.json"), Path(folder, "facts.json")
        command = [sys.executable, "-m", "pytest", str(HERE / f"bench_{name}.py"), "-p", "benchmarks.plugin"]
        command += ["-p", "no:cacheprovider", "-s", "-qq", "--no-header", "--tb=short", "-o", "python_functions=bench_*"]
        command += ["--benchmark-json", str(raw), "--benchmark-timer", f"benchmarks.clock.{SUITES[name]}"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--device={device}", f"--seconds={seconds}"]
        command += [f"--facts={facts}", f"--blocks={blocks}", *(["--rehearse"] if rehearse else [])]
        environment = os.environ | {"KINETO_LOG_LEVEL": "9"}  # the profiler reports on every start otherwise
        status = subprocess.run(command, cwd=HERE.parent, env=environment).returncode
        if not facts.exists():
            raise RuntimeError(f"the suite {name} did not run: pytest ended with status {status}, see above")
        measured = json.loads(raw.read_text()) if raw.exists() and raw.stat().st_size else {"benchmarks": []}
        return json.loads(facts.read_text()) | {"cells": reduced(measured), "failed": status != 0}


def reduced(raw: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells, as `run_suite` returns them, of what pytest-benchmark wrote."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    for entry in raw["benchmarks"]:
        facts, data = entry["extra_info"], entry["stats"]["data"]
        cell, contestant, block = (facts[key] for key in IDENTITY)
        row = cells.setdefault(cell, {}).setdefault(contestant, {"blocks": {}})
        row["blocks"][str(block)] = 1e3 * statistics.median(data)
        row |= {k: v for k, v in facts.items() if k not in IDENTITY and (k not in MEASURED_ONCE or k not in row)}
        seconds.setdefault((cell, contestant), []).extend(data)
    for (cell, contestant), data in seconds.items():
        cells[cell][contestant] = quantiles(data) | cells[cell][contestant]
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true")
    options = vars(parser.parse_args())
    out, name = options.pop("out"), options.pop("suite")
    result = run_suite(name, **options)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return result["failed"]


if __name__ == "__main__":
    sys.exit(main())
