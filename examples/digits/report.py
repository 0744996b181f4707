"""The numbers of a comparison: summary rows, the table for the terminal, the document that is written as JSON."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from examples.digits.machine import machine
from examples.digits.training import Settings

Run = dict[str, Any]
METHOD_FIELDS = ("base", "name", "options", "base_options")


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 for one value, and both are NaN where a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def row_key(method: dict[str, Any]) -> str:
    """Equal for the runs of one row of the table; from a run, a row or the fields of a `Method`."""
    return json.dumps([method[key] for key in METHOD_FIELDS], sort_keys=True)


def summary(runs: Sequence[Run], step_ms: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """One row per method, base optimizer and options, in the order of `runs`; costs are relative to the base alone.

    Args:
        step_ms: milliseconds per step by `row_key`; by default the median over the runs.
    """
    groups: dict[str, list[Run]] = {}
    for r in runs:
        groups.setdefault(row_key(r), []).append(r)
    times = step_ms or {key: statistics.median(r["step_ms"] for r in group) for key, group in groups.items()}
    rows = []
    for key, group in groups.items():
        accuracy, accuracy_sd = mean_sd([r["test"] for r in group])
        eigenvalue, eigenvalue_sd = mean_sd([r["eigenvalue"] for r in group])
        rows.append(
            {
                "label": group[0]["label"],
                **{field: group[0][field] for field in METHOD_FIELDS},
                "seeds": len(group),
                "test": accuracy,
                "test_sd": accuracy_sd,
                "eigenvalue": eigenvalue,
                "eigenvalue_sd": eigenvalue_sd,
                "step_ms": times[key],
                "cost": times[key] / times.get(row_key({**group[0], "name": "base", "options": {}}), math.nan),
                "diverged": sum(diverged(r) for r in group),
            }
        )
    return rows


def diverged(run: Run) -> bool:
    """No finite curvature at the end, or a last training loss like that of guessing among the ten digits.

    A net that has been thrown onto a plateau sits a little below log(10), as it knows how frequent the labels are.
    """
    return not math.isfinite(run["eigenvalue"]) or not run["loss"] < 0.95 * math.log(10)


def table(rows: Sequence[dict[str, Any]], judged_on: str = "test") -> str:
    """The table a person reads; `judged_on` heads the accuracy column."""
    header = (f"{judged_on} accuracy, %", "largest Hessian eigenvalue", "ms per step", "times the base")
    width = max(len("optimizer"), *(len(r["label"]) for r in rows))
    lines = ["  ".join(["optimizer".ljust(width), *header])]
    lines.append("  ".join("-" * n for n in (width, *map(len, header))))
    for i, r in enumerate(rows):
        if i and r["base"] != rows[i - 1]["base"]:
            lines.append("")
        cells = (
            f"{100 * r['test']:.1f} +- {100 * r['test_sd']:.1f}",
            f"{r['eigenvalue']:.2f} +- {r['eigenvalue_sd']:.2f}",
            f"{r['step_ms']:.1f}",
            "-" if math.isnan(r["cost"]) else f"{r['cost']:.1f}",
        )
        note = f"  {r['diverged']} of {r['seeds']} runs diverged" if r["diverged"] else ""
        body = "  ".join(c.rjust(len(h)) for c, h in zip(cells, header, strict=True))
        lines.append(f"{r['label'].ljust(width)}  {body}{note}")
    return "\n".join(lines)


def document(
    runs: Sequence[Run], rows: Sequence[dict[str, Any]], settings: Settings | Mapping[str, Any], **facts: Any
) -> dict[str, Any]:
    """Everything about a comparison, ready for `json.dump`; NaN is written as null."""
    result = {
        "arguments": without_folder(sys.argv[1:]),
        **facts,
        "settings": asdict(settings) if isinstance(settings, Settings) else dict(settings),
        "rows": list(rows),
        "runs": list(runs),
    }
    versions = {package: metadata.version(package) for package in ("numpy", "scikit-learn")}
    return without_nan({"machine": {**machine(), **versions}, **result})


def without_folder(arguments: Sequence[str]) -> list[str]:
    """Arguments of a program without `--out` and its folder, which tells of somebody's machine and of no result."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return kept


def without_nan(value: Any) -> Any:
    """`value` with None in place of every number that is not finite, as JSON has none of those."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
