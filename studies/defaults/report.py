"""The Markdown page: for each network what came out on test data, and the grids on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from studies.defaults.contender import DEFAULTS, GIVEN
from studies.defaults.networks import NETWORKS
from studies.defaults.rows import Cell, Row, gam_grid, interval_grid, networks_of

HEADER = (
    "| | {metric} | - best base | - best SAM | largest eigenvalue | passes per step | passes / base | time / base | failed |"
)
NOTES = (
    "Mean +- sd over seeds on test data. One row per kind: the contender of that kind that is best on validation data, "
    "with other seeds. Square brackets: 95 % intervals over seeds (Student's t) of the paired difference to the best base "
    "and to the best SAM of any kind (marked *), both by validation data. Passes are counted: one on a quarter of the batch "
    "is a quarter; a double backward counts as two. passes / base: of the whole training. time / base: medians, the "
    "training's steps over those of the base as given, measured while other runs were under way. The eigenvalue is of the "
    "Hessian of the loss on 500 training samples, in eval mode."
)


def page(document: dict[str, Any]) -> str:
    """The whole page."""
    runs, rows = document["runs"], document["rows"]
    parts = [f"The defaults: nothing given but the method.\n\n{defaults_table(rows)}"]
    for name in networks_of(runs):
        mine = [row for row in rows if row["network"] == name]
        sections = [f"## {NETWORKS[name].title}", result_table(mine, name)] if mine else [f"## {NETWORKS[name].title}"]
        tables = ((GAM_TITLE, gam_table(gam_grid(runs, name), name)), (INTERVAL_TITLE, interval_table(runs, name)))
        sections += [f"{title}\n\n{table}" for title, table in tables if table]
        parts.append("\n\n".join(sections))
    machine = document["machine"]
    commits = ", ".join(document["commits"])
    origin = (
        f"{len(runs)} runs, {document['run_hours']:.1f} hours of one thread each in {document['workers']} processes. "
        f"{machine['cpu']}, Python {machine['python']}, torch {machine['torch']}, commit {commits}, {machine['date']}."
    )
    return "\n\n".join([*parts, f"{NOTES}\n\n{origin}"]) + "\n"


GAM_TITLE = (
    "GAM in every step on validation data, by part f of the batch and bound kappa (`max_ratio`); in brackets the alpha "
    "that is best there."
)
INTERVAL_TITLE = "GAM in every k-th step with a quarter of the batch, on validation data, by kappa."


def result_table(rows: Sequence[Row], network: str) -> str:
    """Test data: one line per row."""
    metric = "test accuracy, %" if NETWORKS[network].metric == "accuracy" else "test loss (lower is better)"
    lines = [HEADER.format(metric=metric), "|---" * (HEADER.count(" | ") + 1) + "|"]
    for row in rows:
        cells = [row["label"] + " *" * row["is_best_sam"], spread(row, network)]
        cells += [difference(row["over_base"], network), difference(row["over_sam"], network), curvature(row)]
        cells += [f"{row['passes']:.2f}", f"{row['cost']:.2f}", number(row["time"], ".2f")]
        lines.append("| " + " | ".join([*cells, failures(row)]) + " |")
    return "\n".join(lines)


def defaults_table(rows: Sequence[Row]) -> str:
    """A line per network, a column for the base as given and each method with nothing given."""
    lines = ["| | base, as given | best base | " + " | ".join(DEFAULTS.values()) + " |", "|---" * (len(DEFAULTS) + 3) + "|"]
    for name in networks_of(rows):
        found = {row["kind"]: row for row in rows if row["network"] == name}
        cells = [NETWORKS[name].title]
        for kind in (GIVEN, "base", *DEFAULTS):
            row = found.get(kind)
            lost = f" ({failures(row)} failed)" if row and row["failed"] else ""
            cells.append(spread(row, name) + lost if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gam_table(grid: dict[tuple[float, float, float | None], Cell], network: str) -> str:
    """A line per rho, a column per (f, kappa)."""
    columns = sorted({(f, bound) for _, f, bound in grid}, key=lambda c: (-c[0], c[1] is not None, c[1] or 0.0))
    heads = [f"f {Fraction(f)}, {bound_name(bound)}" for f, bound in columns]
    return matrix(
        "rho",
        heads,
        {f"{rho:g}": [grid.get((rho, *column)) for column in columns] for rho in sorted({key[0] for key in grid})},
        lambda cell: f"{shown(cell['value'], network)} ({float(cell['alpha']):g})",
    )


def interval_table(runs: Sequence[dict[str, Any]], network: str) -> str:
    """A line per interval, rho and alpha, a column per kappa."""
    grid = interval_grid(runs, network)
    bounds = sorted({key[3] for key in grid}, key=lambda b: (b is not None, b or 0.0))
    places = sorted({key[:3] for key in grid}, key=lambda p: (p[0], p[1], float(p[2])))
    lines = {f"{k}, {rho:g}, {float(a):g}": [grid.get((k, rho, a, bound)) for bound in bounds] for k, rho, a in places}
    return matrix("k, rho, alpha", list(map(bound_name, bounds)), lines, lambda cell: shown(cell["value"], network))


def matrix(corner: str, heads: Sequence[str], lines: dict[str, list[Cell | None]], text: Callable[[Cell], str]) -> str:
    """A Markdown table of cells; "" without lines."""
    if not lines:
        return ""
    written = [f"| {corner} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in lines.items():
        texts = ["" if c is None else text(c) + (f", {failures(c)} failed" if c["failed"] else "") for c in cells]
        written.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(written)


def failures(row: dict[str, Any]) -> str:
    """How many of the runs failed; "" for none."""
    return f"{row['failed']} of {row['seeds']}" if row["failed"] else ""


def bound_name(bound: float | None) -> str:
    """As people say it."""
    return "no bound" if bound is None else f"kappa {bound:g}"


def shown(value: float, network: str) -> str:
    """A metric as the tables show it."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if NETWORKS[network].metric == "accuracy" else f"{value:.3f}"


def spread(row: Row, network: str) -> str:
    """Mean +- sd."""
    return f"{shown(row['value'], network)} +- {shown(row['sd'], network)}"


def difference(estimate: dict[str, float] | None, network: str) -> str:
    """A difference with its interval: points of accuracy, or loss."""
    if estimate is None:
        return ""
    scale, digits = (100, 1) if NETWORKS[network].metric == "accuracy" else (1, 3)
    value, low, high = (number(scale * estimate[key], f"+.{digits}f") for key in ("value", "low", "high"))
    return value if low == "-" else f"{value} [{low}, {high}]"


def curvature(row: Row) -> str:
    """The largest Hessian eigenvalue, where it was measured."""
    return f"{number(row['eigenvalue'], '.2f')} +- {number(row['eigenvalue_sd'], '.2f')}" if "eigenvalue" in row else ""


def number(value: float, form: str) -> str:
    """Formatted, "-" where it is not finite."""
    return f"{value:{form}}" if math.isfinite(value) else "-"
