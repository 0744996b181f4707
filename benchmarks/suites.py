"""Runs a suite under pytest-benchmark and reduces what it measured: per cell and contestant quantiles, blocks and facts.

python -m benchmarks.suites kernels --out kernels.json [--device cuda] [--seconds 90] [--grace 120] [--blocks 3] [--rehearse]
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
SUITES = {"kernels": "on_device", "optimizer": "wall", "training": "wall", "scaling": "wall"}  # and the timer of each
MEASURED_ONCE = ("operators", "kernels", "copies", "peak_bytes")  # in the first block
WITHIN = "over_passes"  # ratios, of each timed step: median, 20 and 80 % quantile over all
MEDIANS = ("host_ms", "queued_ms")  # over the blocks


def run_suite(
    name: str,
    *,
    device: str = "cpu",
    seconds: float = float("inf"),
    grace: float = 120.0,
    blocks: int = 3,
    rehearse: bool = False,
) -> dict[str, Any]:
    """Measure one suite, in a process of its own; what it measured before it failed or was killed is there.

    Args:
        seconds: after them no further case begins.
        grace: seconds more, after which the case that has begun is killed.

    Returns:
        "machine"; "cells": {cell: {contestant: row}} with the quantiles over all blocks in milliseconds, "blocks", the
        median of each block by its number, and the suite's own facts; "left_out": a list of {"cell", "contestant",
        "block", "why"}; "failed": "" or how it ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines.jsonl")
        command = [sys.executable, "-m", "pytest", str(HERE / f"bench_{name}.py"), "-p", "benchmarks.plugin"]
        command += ["-p", "no:cacheprovider", "-s", "-qq", "--no-header", "--tb=short", "-o", "python_functions=bench_*"]
        command += ["--benchmark-timer", f"benchmarks.clock.{SUITES[name]}", "--benchmark-disable-gc", "--benchmark-quiet"]
        command += [f"--device={device}", f"--seconds={seconds}", f"--lines={lines}", f"--blocks={blocks}"]
        command += ["--rehearse"] if rehearse else []
        environment = os.environ | {"KINETO_LOG_LEVEL": "9"}  # the profiler reports on every start otherwise
        limit = None if seconds == float("inf") else seconds + grace
        try:
            status = subprocess.run(command, cwd=HERE.parent, env=environment, timeout=limit).returncode
            failed = f"pytest ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            failed = f"killed: the last case took more than {grace:.0f} s"
        found = read_lines(lines.read_text() if lines.exists() else "")
    return reduced(found) | {"failed": failed}


def read_lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines of a run, but for a last one that was cut."""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def reduced(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plugin wrote, as `run_suite` returns it."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    lists: dict[tuple[str, str], dict[str, list[float]]] = {}
    result: dict[str, Any] = {"machine": {}, "cells": cells, "left_out": [line for line in lines if "why" in line]}
    for line in lines:
        result |= {"machine": line["machine"]} if "machine" in line else {}
        if "seconds" not in line:
            continue
        facts = line["facts"]
        row = cells.setdefault(line["cell"], {}).setdefault(line["contestant"], {"blocks": {}})
        row["blocks"][str(line["block"])] = 1e3 * statistics.median(line["seconds"])
        row |= {k: v for k, v in facts.items() if k not in MEASURED_ONCE or k not in row}
        kept = lists.setdefault((line["cell"], line["contestant"]), {"seconds": []})
        kept["seconds"] += line["seconds"]
        for key in MEDIANS:
            if key in facts:
                kept.setdefault(key, []).append(facts[key])
        if WITHIN in facts:
            kept.setdefault(WITHIN, []).extend(facts[WITHIN])
    for (cell, contestant), kept in lists.items():
        row = cells[cell][contestant]
        if WITHIN in kept:
            q = quantiles(kept.pop(WITHIN))
            row[WITHIN] = [q[key] / 1e3 for key in ("ms", "ms_q20", "ms_q80")]
        row |= quantiles(kept.pop("seconds")) | {key: statistics.median(values) for key, values in kept.items()}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--grace", type=float, default=120.0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true")
    options = vars(parser.parse_args())
    out, name = options.pop("out"), options.pop("suite")
    result = run_suite(name, **options)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return bool(result["failed"]) or not result["cells"]


if __name__ == "__main__":
    sys.exit(main())
