"""A pytest plugin that writes each test's outcome as it ends, so that a run that is cut leaves what it has.

GAM_FUSED_REPORT=outcomes.jsonl python -m pytest -p benchmarks.gpu.pytest_report
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

REPORT = "GAM_FUSED_REPORT"


def _write(entry: dict[str, Any]) -> None:
    with open(os.environ[REPORT], "a") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """What waits for Triton's compiler comes last: a run that is cut has the others whole."""
    items.sort(key=lambda item: "triton" in item.nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    """A test's call, or what kept it from being called or cleaned up."""
    if report.when != "call" and report.outcome == "passed":
        return
    why = ""
    if report.outcome == "skipped":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr)
    _write({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "why": why[:1000]})


def pytest_collectreport(report: Any) -> None:
    """A file that could not be imported."""
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "why": str(report.longrepr)[-1000:]})


def summary(path: Path) -> dict[str, Any]:
    """Counts, failures with their messages, skipped tests by reason, and the slowest tests.

    Raises:
        OSError: no test ended.
    """
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    counts = Counter(entry["outcome"] for entry in entries)
    skips: dict[str, list[str]] = {}
    for entry in entries:
        if entry["outcome"] == "skipped":
            skips.setdefault(entry["why"], []).append(entry["test"])
    slowest = sorted(entries, key=lambda entry: -entry["seconds"])[:10]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": {entry["test"]: entry["why"] for entry in entries if entry["outcome"] == "failed"},
        "skips": skips,
        "slowest": {entry["test"]: round(entry["seconds"], 2) for entry in slowest},
    }
