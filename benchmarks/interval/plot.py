"""The picture: accuracy against training cost for every ratio, and how alpha was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from benchmarks.interval.settings import ORACLES, RATIOS, ratio_name
from benchmarks.sweep_plot import clean
from examples.digits.plot import spread

# Okabe and Ito's palette: one half for the oracles, the other for the ratios.
ORACLE_STYLES = {"sgd": ("#D55E00", "o"), "sam": ("#CC79A7", "s"), "sam_wide": ("#0072B2", "D")}
RATIO_STYLES = {0.05: ("#E69F00", "v"), 0.1: ("#56B4E9", "^"), 0.5: ("#009E73", "P"), 1.0: ("#000000", "X")}
Row = dict[str, Any]


def save(document: dict[str, Any], path: Path) -> None:
    """Draws the study's document to `path` (PNG)."""
    oracles = document["oracles"]
    figure = plt.figure(figsize=(15, 7.6))
    left, right = figure.add_gridspec(1, 2, width_ratios=[1.5, 1])
    _cost(figure.add_subplot(left), document["rows"], oracles)
    panels = right.subgridspec(len(oracles), 1).subplots(sharex=True, squeeze=False)[:, 0]
    for ax, key in zip(panels, oracles, strict=True):
        _alphas(ax, [r for r in document["sweep"]["rows"] if r["oracle"] == key], document["sweep"]["chosen"], key)
    panels[0].set_title("choice of alpha: validation accuracy, % (ring: chosen)")
    panels[-1].set_xlabel("alpha    (x: runs diverged)")
    panels[-1].legend(frameon=False, ncols=2, fontsize=8, loc="lower left")
    seeds, machine = max(r["seeds"] for r in document["rows"]), document["timing"]["machine"]
    noise = 100 * document["settings"]["noise"]
    figure.suptitle(f"GAM on a fraction of the steps: digits with {noise:.0f} % wrong labels, {seeds} seeds", fontsize=14)
    footer = f"{machine['cpu']}, one thread, torch {machine['torch']}, cost measured at commit {machine['commit']}"
    figure.text(0.995, 0.005, footer, ha="right", va="bottom", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cost(ax: Axes, rows: list[Row], oracles: list[str]) -> None:
    shown = [r for r in rows if r["chosen"]]
    for key in oracles:
        colour, marker = ORACLE_STYLES[key]
        line = [r for r in shown if r["oracle"] == key]
        x, y = [r["cost_over_sgd"]["value"] for r in line], [100 * r["test"] for r in line]
        ax.plot(x, y, color=colour, linewidth=1.5, zorder=3)
        ax.plot(x, y, marker, color=colour, markersize=8, zorder=5, label=f"h_loss from {ORACLES[key].label}")
        for row, a, b in zip(line, x, y, strict=True):
            if row["over_alone"]:
                reach = 100 * (row["over_alone"]["high"] - row["over_alone"]["value"])
                ax.errorbar(a, b, reach, color=colour, capsize=4, elinewidth=1.2, zorder=4)
            ax.axhline(y[0], color=colour, linewidth=0.8, linestyle=":", zorder=1)
        other = [r for r in rows if r["oracle"] == key and not r["chosen"]]
        x, y = [r["cost_over_sgd"]["value"] for r in other], [100 * r["test"] for r in other]
        ax.plot(x, y, marker, color=colour, markersize=6, fillstyle="none", zorder=4)
    ax.plot([], [], "o", color="#777777", fillstyle="none", label="the same ratio at the default alpha")
    ax.plot([], [], ":", color="#777777", label="the oracle alone")
    ax.set_title("test accuracy, %  (bars: 95 % of the paired difference to the oracle alone)")
    ax.set_xlabel("training cost per step, times SGD's")
    ax.set_xlim(0.8, 1.12 * max(r["cost_over_sgd"]["value"] for r in shown))
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    _label(ax, shown)
    clean(ax, "y")


def _label(ax: Axes, rows: list[Row]) -> None:
    """Ratio and cost relative to the oracle alone, beside each point."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    xs, ys = [r["cost_over_sgd"]["value"] for r in rows], [100 * r["test"] for r in rows]
    heights = spread(xs, ys, 0.12 * (right - left), 0.035 * (top - bottom), bottom, top)
    for row, x, y, height in zip(rows, xs, ys, heights, strict=True):
        colour = ORACLE_STYLES[row["oracle"]][0]
        name = "alone" if not row["ratio"] else "all" if row["ratio"] == 1 else f"1/{round(1 / row['ratio'])}"
        ax.annotate(
            f"{name} ({row['cost']['value']:.2f})",
            (x, y),
            (x + 0.018 * (right - left), height),
            va="center",
            fontsize=9,
            color=colour,
            zorder=6,
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
        )


def _alphas(ax: Axes, rows: list[Row], chosen: list[Row], key: str) -> None:
    for ratio in RATIOS:
        colour, marker = RATIO_STYLES[ratio]
        line = [r for r in rows if r["ratio"] == ratio]
        good = [r for r in line if not r["diverged"]]
        x, y = [r["alpha"] for r in good], [100 * r["validation"] for r in good]
        ax.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5, label=ratio_name(ratio))
        best = next(c["alpha"] for c in chosen if (c["oracle"], c["ratio"]) == (key, ratio))
        ax.plot(
            *zip(*[p for p in zip(x, y, strict=True) if p[0] == best], strict=True),
            "o",
            color=colour,
            markersize=12,
            mfc="none",
        )
        for r in (r for r in line if r["diverged"]):
            height = 0.04 + 0.05 * RATIOS.index(ratio)
            ax.plot(r["alpha"], height, "x", color=colour, markersize=7, transform=ax.get_xaxis_transform())
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({r["alpha"] for r in rows}))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylabel(f"h_loss from {ORACLES[key].label}")
    clean(ax, "y")
