"""The picture: accuracy against training cost for every ratio, and how alpha was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from examples.digits.plot import clean, spread
from studies.interval.settings import ORACLES, RATIOS, ratio_name

# Okabe and Ito's palette: one half for the oracles, the other for the ratios.
ORACLE_STYLES = {"sgd": ("#D55E00", "o"), "sam": ("#CC79A7", "s"), "sam_wide": ("#0072B2", "D")}
RATIO_STYLES = {0.05: ("#E69F00", "v"), 0.1: ("#56B4E9", "^"), 0.5: ("#009E73", "P"), 1.0: ("#000000", "X")}
REACH = 20  # points of validation accuracy below the best that are shown
Row = dict[str, Any]


def save(document: dict[str, Any], path: Path) -> None:
    """Draws the study's document to `path` (PNG): one row per oracle."""
    oracles, rows = document["oracles"], document["rows"]
    figure, axes = plt.subplots(
        len(oracles), 2, figsize=(15, 3.7 * len(oracles) + 1.4), sharex="col", squeeze=False, width_ratios=[1.5, 1]
    )
    for (left, right), key in zip(axes, oracles, strict=True):
        _cost(left, rows, key)
        _alphas(right, [r for r in document["sweep"]["rows"] if r["oracle"] == key], document["sweep"]["chosen"], key)
    _same_heights(axes[:, 0], rows)
    for ax, key in zip(axes[:, 0], oracles, strict=True):
        _label(ax, [r for r in rows if r["chosen"] and r["oracle"] == key])
    axes[0][0].set_title("test accuracy, %; bars: 95 % of the paired difference to no GAM\n\n")
    axes[0][1].set_title("choice of alpha: validation accuracy, %\n\n")
    for ax in axes[0]:
        columns = len(ax.get_legend_handles_labels()[0])
        ax.legend(frameon=False, ncols=columns, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2)
    axes[-1][0].set_xlabel("training cost per step, times SGD's    (in brackets: times that of the same without GAM)")
    axes[-1][1].set_xlabel("alpha    (ring: chosen; x: runs diverged)")
    seeds, machine = max(r["seeds"] for r in rows), document["timing"]["machine"]
    noise = 100 * document["settings"]["noise"]
    figure.suptitle(f"GAM on a fraction of the steps: digits with {noise:.0f} % wrong labels, {seeds} seeds", fontsize=14)
    footer = f"{machine['cpu']}, one thread, torch {machine['torch']}, cost measured at commit {machine['commit']}"
    figure.text(0.995, 0.005, footer, ha="right", va="bottom", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cost(ax: Axes, rows: list[Row], key: str) -> None:
    """This oracle in colour, the others in grey behind it."""
    for other in dict.fromkeys(r["oracle"] for r in rows):
        line = [r for r in rows if r["oracle"] == other and r["chosen"]]
        style = {"color": ORACLE_STYLES[key][0], "zorder": 3} if other == key else {"color": "#cccccc", "zorder": 1}
        ax.plot(*_points(line), linewidth=1.5, **style)
    colour, marker = ORACLE_STYLES[key]
    for row in (r for r in rows if r["oracle"] == key and r["chosen"]):
        ax.errorbar(
            *_points([row]), _reach(row), fmt=marker, color=colour, markersize=8, capsize=4, elinewidth=1.2, zorder=5
        )
        if not row["ratio"]:
            ax.axhline(100 * row["test"], color=colour, linewidth=0.8, linestyle=":", zorder=1)
    others = [r for r in rows if r["oracle"] == key and not r["chosen"]]
    ax.plot(*_points(others), marker, color=colour, markersize=7, fillstyle="none", linestyle="none", zorder=4)
    ax.plot([], [], "o", color="#777777", label="alpha chosen")
    ax.plot([], [], "o", color="#777777", fillstyle="none", label="default alpha, where another was chosen")
    ax.plot([], [], ":", color="#777777", label="no GAM")
    ax.plot([], [], color="#cccccc", label="the other panels")
    ax.set_ylabel(f"h_loss from {ORACLES[key].label}", fontweight="bold")
    clean(ax)


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [r["cost_over_sgd"]["value"] for r in rows], [100 * r["test"] for r in rows]


def _reach(row: Row) -> float:
    """Half of the interval of the difference to the oracle alone, in points."""
    reach = 100 * (row["over_alone"]["high"] - row["over_alone"]["value"]) if row["over_alone"] else 0.0
    return reach if math.isfinite(reach) else 0.0


def _same_heights(axes: Sequence[Axes], rows: list[Row]) -> None:
    """One range of accuracies and costs for all panels, wide enough for every error bar and label."""
    low = min(100 * r["test"] - _reach(r) * r["chosen"] for r in rows)
    high = max(100 * r["test"] + _reach(r) * r["chosen"] for r in rows)
    for ax in axes:
        ax.set_ylim(low - 0.05 * (high - low) - 0.1, high + 0.05 * (high - low) + 0.1)
        ax.set_xlim(0.4, 1.12 * max(r["cost_over_sgd"]["value"] for r in rows))


def _label(ax: Axes, rows: list[Row]) -> None:
    """Ratio, and cost relative to no GAM: left of the point without GAM, right of the others, clear of their neighbours."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    near, gap = 0.1 * (right - left), 0.018 * (right - left)
    colour = ORACLE_STYLES[rows[0]["oracle"]][0]
    style = {"va": "center", "fontsize": 9, "color": colour, "zorder": 6, "annotation_clip": False}
    style["path_effects"] = [withStroke(linewidth=3, foreground="white")]
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    alone, others = [r for r in rows if not r["ratio"]], [r for r in rows if r["ratio"]]
    for x, y in zip(*_points(alone), strict=True):
        ax.annotate("no GAM", (x, y), (x - gap, y), ha="right", **style)
    xs, ys = _points(others)
    below = [y - 0.045 * (top - bottom) for y in ys]  # curves rise
    heights = spread(xs, below, near, 0.075 * (top - bottom), bottom, top)
    for row, x, y, height in zip(others, xs, ys, heights, strict=True):
        name = "all" if row["ratio"] == 1 else f"1/{round(1 / row['ratio'])}"
        start = max(other for other in xs if other - x <= near) + gap
        ax.annotate(f"{name} ({row['cost']['value']:.2f})", (x, y), (start, height), arrowprops=line, **style)


def _alphas(ax: Axes, rows: list[Row], chosen: list[Row], key: str) -> None:
    shown = [100 * r["validation"] for r in rows if not r["diverged"]]
    for number, ratio in enumerate(RATIOS):
        colour, marker = RATIO_STYLES[ratio]
        line = [r for r in rows if r["ratio"] == ratio]
        good = {r["alpha"]: 100 * r["validation"] for r in line if not r["diverged"]}
        ax.plot(list(good), list(good.values()), color=colour, marker=marker, markersize=5, label=ratio_name(ratio))
        best = next(c["alpha"] for c in chosen if (c["oracle"], c["ratio"]) == (key, ratio))
        if best is not None:
            ax.plot(best, good[best], "o", color=colour, markersize=12, markerfacecolor="none")
        for r in line:
            if r["diverged"]:
                ax.plot(r["alpha"], 0.05 + 0.06 * number, "x", color=colour, transform=ax.get_xaxis_transform())
    if shown and min(shown) < max(shown) - REACH:
        ax.set_ylim(bottom=max(shown) - REACH)  # what fell below, though not by our measure diverged, leaves the panel
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({r["alpha"] for r in rows}))
    ax.xaxis.set_major_formatter("{x:g}")
    clean(ax)
