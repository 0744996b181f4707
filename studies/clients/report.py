"""What the runs say: a row per client and options, the Markdown table, the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from examples.digits.report import Run, mean_sd
from studies.clients.catalogue import CLIENTS

LIMIT = 1.10


def label(options: dict[str, Any] | None) -> str:
    """`finite_difference, rho 0.05`; the base optimizer alone has none."""
    if options is None:
        return "base"
    rest = [f"{key} {value}" for key, value in options.items() if key != "method"]
    return ", ".join([options.get("method", "finite_difference"), *rest])


def result_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per client and options, in the order of `runs`; the ratio is of means over seeds."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["client"], json.dumps(run["options"])), []).append(run)
    rows = []
    for (client, _), group in groups.items():
        loss, sd = mean_sd([run["loss"] for run in group])
        base, _ = mean_sd([run["loss"] for run in groups[client, "null"]])
        start, _ = mean_sd([run["start"] for run in group])
        ratio = loss / base
        row = {"client": client, "options": group[0]["options"], "seeds": len(group), "start": start, "loss": loss}
        rows.append({**row, "loss_sd": sd, "ratio": ratio, "within": ratio <= LIMIT})  # NaN is not
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: options by clients."""
    clients = list(dict.fromkeys(row["client"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(label(row["options"]), {})[row["client"]] = _cell(row)
    lines = ["| | " + " | ".join(CLIENTS[client].label for client in clients) + " |", "|---" * (len(clients) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(line.get(c, "") for c in clients) + " |" for name, line in cells.items()]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if row["options"] is None:
        return f"{row['loss']:.3g} +- {row['loss_sd']:.1g} (start {row['start']:.3g})"
    text = f"{row['loss']:.3g} ({row['ratio']:.2f})"
    return text if row["within"] else f"**{text}**"


def page(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown page: table, what exceeds the limit, what it was measured on."""
    machine = document["machine"]
    exceeding = [f"- {label(r['options'])}: {CLIENTS[r['client']].label}, {r['ratio']:.2f}" for r in rows if not r["within"]]
    seeds, steps = max(r["seeds"] for r in rows), {run["client"]: run["steps"] for run in document["runs"]}
    return (
        f"Final loss on held-out data in eval mode, mean of {seeds} seeds, and its ratio to the base optimizer's after as "
        f"many steps. Bold: more than {LIMIT:.2f} times the base's.\n\n{table(rows)}\n\n"
        f"Above {LIMIT:.2f}: {'none.' if not exceeding else ''}\n"
        + "".join(f"{line}\n" for line in exceeding)
        + f"\nSteps: {', '.join(f'{CLIENTS[client].label} {n}' for client, n in steps.items())}. "
        f"{machine['cpu']}, one thread, Python {machine['python']}, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}.\n"
    )
