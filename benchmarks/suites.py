"""Runs a suite under pytest-benchmark and reduces what it measured: per cell and contestant quantiles, blocks and facts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SUITES = {"kernels": "on_device", "optimizer": "wall", "training": "wall", "scaling": "wall"}  # and the timer of each
WITHIN = "over_passes"  # ratios, of each timed step: median, 20 and 80 % quantile over all
QUIET = ("-q", "--no-header", "--no-summary", "--tb=short", "-p", "no:cacheprovider", "--benchmark-quiet")


def run_suite(
    name: str, *, device: str = "cpu", seconds: float = float("inf"), grace: float = 120.0, rehearse: bool = False
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
        # None of the tests' own options: side by side with others nothing can be measured.
        command = [sys.executable, "-m", "pytest", str(HERE / f"bench_{name}.py"), "-o", "addopts="]
        command += [*QUIET, "-o", "python_functions=bench_*", "-p", "benchmarks.plugin"]
        command += ["--benchmark-disable-gc", "--benchmark-timer", f"benchmarks.clock.{SUITES[name]}"]
        command += [f"--device={device}", f"--seconds={seconds}", f"--lines={lines}"]
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


def reduced(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the plugin wrote, as `run_suite` returns it."""
    machines = [line["machine"] for line in lines if "machine" in line]
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if "seconds" in line:
            measured.setdefault(line["cell"], {}).setdefault(line["contestant"], []).append(line)
    return {
        "machine": machines[0] if machines else {},
        "cells": {cell: {name: _row(blocks) for name, blocks in rows.items()} for cell, rows in measured.items()},
        "left_out": [line for line in lines if "why" in line],
    }


def _row(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One contestant's lines, one from each block, as a row; facts that differ are those of the first block."""
    facts: dict[str, Any] = {}
    for line in blocks:
        facts = line["facts"] | facts
    if "host_ms" in facts:
        facts["host_ms"] = statistics.median(line["facts"]["host_ms"] for line in blocks)
    if WITHIN in facts:
        low, median, high = quantiles([ratio for line in blocks for ratio in line["facts"][WITHIN]])
        facts[WITHIN] = [median, low, high]
    seconds = [s for line in blocks for s in line["seconds"]]
    low, median, high = quantiles([1e3 * s for s in seconds])
    medians = {str(line["block"]): 1e3 * statistics.median(line["seconds"]) for line in blocks}
    return {"blocks": medians, **facts, "ms_q20": low, "ms": median, "ms_q80": high, "runs": len(seconds)}


def quantiles(values: Sequence[float]) -> list[float]:
    """At 20, 50 and 80 %."""
    return np.quantile(values, (0.2, 0.5, 0.8)).tolist()
