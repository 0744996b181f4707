"""The picture of the sweep: finite differences over rho and alpha, and every other setting as one dot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from examples.digits.plot import STYLES, clean

RHO_COLOURS = ("#56B4E9", "#0072B2", "#D55E00", "#000000")  # Okabe and Ito, light to dark


def save(document: dict[str, Any], path: Path) -> None:
    """Draws the sweep's document to `path` (PNG)."""
    rows = document["rows"]
    figure = plt.figure(figsize=(15, 10))
    left, right = figure.add_gridspec(1, 2, width_ratios=[1, 1.15])
    upper, lower = left.subgridspec(2, 1).subplots(sharex=True)
    surface = [r for r in rows if r["label"] == "SGD + GAM" and r["options"]["rho_prime"] == 0.05 and not r["base_options"]]
    base = next(r for r in rows if r["label"] == "SGD" and not r["base_options"])
    _surface(upper, surface, base, "test", 100)
    _surface(lower, surface, base, "eigenvalue", 1)
    upper.set_title("SGD + GAM by finite differences, rho' 0.05: validation accuracy, %")
    lower.set_title("largest Hessian eigenvalue of the training loss")
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("{x:g}")
    upper.legend(frameon=False, ncols=3, fontsize=9, loc="lower right")
    lower.set_xlabel("alpha")
    _dots(figure.add_subplot(right), [r for r in rows if r not in surface])
    seeds = max(r["seeds"] for r in rows)
    figure.suptitle(
        f"Sweep on validation folds of the training images (digits, 20 % wrong labels), mean and sd of {seeds} runs",
        fontsize=14,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _surface(ax: Axes, rows: list[dict[str, Any]], base: dict[str, Any], key: str, scale: float) -> None:
    radii = sorted({r["options"]["rho"] for r in rows})
    for j, (rho, colour) in enumerate(zip(radii, RHO_COLOURS, strict=False)):
        line = [r for r in rows if r["options"]["rho"] == rho]
        good = [r for r in line if not r["diverged"]]
        x = [_alpha(r, j) for r in good]  # apart, so that error bars are seen
        y, sd = [scale * r[key] for r in good], [scale * r[f"{key}_sd"] for r in good]
        ax.errorbar(x, y, sd, marker="o", color=colour, capsize=3, linewidth=1.5, label=f"rho {rho:g}")
        for r in line:
            if r["diverged"]:
                ax.plot(_alpha(r, j), 0.03, "x", color=colour, markersize=9, transform=ax.get_xaxis_transform())
    ax.plot([], [], "x", color="#777777", label="runs diverged")
    ax.axhline(scale * base[key], color="#777777", linestyle="--", linewidth=1, label="SGD")
    ax.set_xticks(sorted({r["options"]["alpha"] for r in rows}))
    clean(ax)


def _alpha(row: dict[str, Any], number: int) -> float:
    return row["options"]["alpha"] + 0.03 * (number - 1.5)


def _dots(ax: Axes, rows: list[dict[str, Any]]) -> None:
    names = []
    for i, r in enumerate(rows):
        colour, marker = STYLES[r["name"]]
        settings = {**r["base_options"], **r["options"]}
        names.append(
            f"{r['label']}  "
            + ", ".join(f"{k.replace('_prime', chr(39))} {v:g}" for k, v in settings.items() if v is not None)
        )
        if r["diverged"]:
            note = f"x  {r['diverged']} of {r['seeds']} runs diverged"
            ax.annotate(note, (0.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour)
            continue
        ax.errorbar(100 * r["test"], i, xerr=100 * r["test_sd"], fmt=marker, color=colour, capsize=2, elinewidth=1)
        curvature = f"{r['eigenvalue']:.1f}"
        ax.annotate(curvature, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_title("every other setting: validation accuracy, %  (right: eigenvalue)")
    clean(ax, "x")
