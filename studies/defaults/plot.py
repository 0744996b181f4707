"""The picture: accuracy against passes for each network, and what rho and the bound do on validation data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from examples.digits.plot import clean, spread
from studies.defaults.contender import DEFAULTS, GIVEN, KINDS
from studies.defaults.networks import NETWORKS
from studies.defaults.report import bound_name, shown
from studies.defaults.rows import Row, gam_grid, networks_of

# Okabe and Ito's palette: black for the base, orange and yellow for SAM, blue for GAM in part, red for whole GAM.
STYLES = {
    GIVEN: ("#777777", "o"),
    "base": ("#000000", "o"),
    "base_long": ("#000000", "D"),
    "sam": ("#B07000", "s"),
    "sam_interval": ("#B07000", "X"),
    "sam_part": ("#B07000", "P"),
    "sam_small_batch": ("#B07000", "v"),
    "m_sam": ("#B07000", "*"),
    "gam": ("#D55E00", "^"),
    "gam_part": ("#0072B2", "^"),
    "gam_interval": ("#0072B2", "X"),
    "accelerated": ("#D55E00", "D"),
    "sam_gam": ("#CC79A7", "P"),
    "penalty_part": ("#009E73", "v"),
    **dict.fromkeys(DEFAULTS, ("#999999", "h")),
}
SHORT = {
    **{
        kind: name.replace("a part of the batch", "a part").replace("on some steps, a part", "on some steps")
        for kind, name in KINDS.items()
    },
    **{kind: f"{method}, defaults" for kind, method in DEFAULTS.items()},
    GIVEN: "base, as given",
}
COLUMNS = 2


def save(document: dict[str, Any], path: Path) -> None:
    """`path` is accuracy against passes; its neighbour with "_grid" in its name is the heat map of the tuning runs."""
    machine = document["machine"]
    footer = f"{machine['cpu']}, torch {machine['torch']}, commit {', '.join(document['commits'])}"
    rows, runs = document["rows"], document["runs"]
    figure, axes = _panels(networks_of(rows), (8.2, 5.4))
    for name, ax in axes.items():
        _cost(ax, [row for row in rows if row["network"] == name and _drawn(row)], name)
    figure.suptitle("Best of each kind by validation data, and the defaults: test data, mean and sd over seeds", fontsize=14)
    _write(figure, path, footer)
    grids = [name for name in networks_of(runs) if gam_grid(runs, name)]
    figure, axes = _panels(grids, (8.2, 2.9))
    for name, ax in axes.items():
        _heat(ax, runs, name)
    figure.suptitle(
        "GAM on validation data: rho (down), part f of the batch and bound (across); alpha is the best", fontsize=14
    )
    _write(figure, path.with_stem(f"{path.stem}_grid"), footer)


def _panels(names: Sequence[str], size: tuple[float, float]) -> tuple[Any, dict[str, Axes]]:
    """A figure with a panel for each network."""
    height = max(1, math.ceil(len(names) / COLUMNS))
    figure, axes = plt.subplots(height, COLUMNS, figsize=(size[0] * COLUMNS, size[1] * height + 0.6), squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for name, ax in zip(names, axes.flat, strict=False):
        ax.set_title(NETWORKS[name].title)
    return figure, dict(zip(names, axes.flat, strict=False))


def _write(figure: Any, path: Path, footer: str) -> None:
    figure.text(0.995, 0.003, footer, ha="right", va="bottom", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.012, 1, 0.99))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _drawn(row: Row) -> bool:
    """Rows with failed runs are in the table only: their mean would set the scale."""
    return not row["failed"] and math.isfinite(row["value"])


def _cost(ax: Axes, rows: Sequence[Row], network: str) -> None:
    """The metric against the passes of the training over those of the base, on a logarithmic axis."""
    scale = 100 if NETWORKS[network].metric == "accuracy" else 1
    for row in rows:
        colour, marker = STYLES[row["kind"]]
        x, y, sd = row["cost"], scale * row["value"], scale * row["sd"]
        ax.errorbar(x, y, sd, fmt=marker, color=colour, markersize=8, capsize=3, elinewidth=1, zorder=5)
    ax.set_xscale("log")
    ax.set_xlim(0.93, 11)  # space for the labels
    ax.set_xticks([1, 1.5, 2, 3, 4, 6], ["1", "1.5", "2", "3", "4", "6"])
    ax.minorticks_off()
    ax.set_xlabel("gradient passes of the training, times the base's")
    ax.set_ylabel("test accuracy, %" if scale == 100 else "test loss")
    if scale == 1:
        ax.invert_yaxis()  # up is better
    _label(ax, rows, scale)
    clean(ax)


def _label(ax: Axes, rows: Sequence[Row], scale: float) -> None:
    """The kind beside each point; labels that would overlap are moved apart."""
    ends = ax.get_ylim()
    bottom, top = min(ends), max(ends)
    xs, ys = [math.log10(row["cost"]) for row in rows], [scale * row["value"] for row in rows]
    heights = spread(xs, ys, 0.33, 0.045 * (top - bottom), bottom, top)
    for row, y, height in zip(rows, ys, heights, strict=True):
        colour = STYLES[row["kind"]][0]
        ax.annotate(
            SHORT[row["kind"]],
            (row["cost"], y),
            (1.12 * row["cost"], height),
            va="center",
            fontsize=8,
            color=colour,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def _heat(ax: Axes, runs: Sequence[dict[str, Any]], network: str) -> None:
    """Validation metric by rho and (f, bound); "x" where runs failed, empty where nothing was tried."""
    grid = gam_grid(runs, network)
    rhos = sorted({key[0] for key in grid})
    columns = sorted({key[1:] for key in grid}, key=lambda c: (-c[0], c[1] is not None, c[1] or 0.0))
    values = np.full((len(rhos), len(columns)), np.nan)
    for (rho, part, bound), cell in grid.items():
        place = rhos.index(rho), columns.index((part, bound))
        values[place] = math.nan if cell["failed"] else NETWORKS[network].sign * cell["value"]
        text = "x" if cell["failed"] else f"{shown(cell['value'], network)}\nalpha {float(cell['alpha']):g}"
        ax.text(place[1], place[0], text, ha="center", va="center", fontsize=8)
    ax.imshow(np.ma.masked_invalid(values), cmap="YlGn", aspect="auto", alpha=0.7)
    ax.set_xticks(range(len(columns)), [f"f {Fraction(f)}\n{bound_name(bound)}" for f, bound in columns], fontsize=8)
    ax.set_yticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
    ax.set_ylabel("rho")
