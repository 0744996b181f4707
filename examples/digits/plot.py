"""The picture of a comparison: accuracy against cost per step, and the curves of training, one row per base optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

# Okabe and Ito's palette, told apart with every kind of colour vision; markers say the same again.
STYLES = {
    "base": ("#000000", "o"),
    "sam": ("#E69F00", "s"),
    "accelerated": ("#0072B2", "D"),
    "finite_difference": ("#D55E00", "^"),
    "exact": ("#009E73", "v"),
    "sam_gam": ("#CC79A7", "P"),
    "sam_tuned": ("#B07000", "X"),
    "finite_difference_tuned": ("#8C3B00", "*"),
    "finite_difference_part": ("#6A1B9A", "h"),
}


def save(document: dict[str, Any], path: Path) -> None:
    """Draws the document of `report.document` to `path` (PNG)."""
    bases = list(dict.fromkeys(row["base"] for row in document["rows"]))
    figure, axes = plt.subplots(
        len(bases), 3, figsize=(15, 4.3 * len(bases) + 0.6), squeeze=False, gridspec_kw={"width_ratios": [1.25, 1, 1]}
    )
    for (left, middle, right), base in zip(axes, bases, strict=True):
        rows = [row for row in document["rows"] if row["base"] == base]
        runs = [run for run in document["runs"] if run["base"] == base]
        _cost(left, rows)
        _curves(middle, rows, runs, "test")
        _curves(right, rows, runs, "train")
        left.set_ylabel(f"{base}\n\ntest accuracy, %", fontweight="bold")
    axes[0][0].set_title("accuracy against cost (mean and sd over seeds)")
    axes[0][1].set_title("test accuracy, %")
    axes[0][2].set_title("fit to the training labels, wrong ones included, %")
    axes[-1][0].set_xlabel("ms per training step")
    for ax in axes[-1][1:]:
        ax.set_xlabel("epoch")
    settings, machine = document["settings"], document["machine"]
    figure.suptitle(
        f"Handwritten digits, 500 training images with {100 * settings['noise']:.0f} % wrong labels, "
        f"{max(row['seeds'] for row in document['rows'])} seeds",
        fontsize=14,
    )
    footer = f"{machine['cpu']}, one thread, torch {machine['torch']}, commit {machine['commit']}"
    figure.text(0.995, 0.005, footer, ha="right", va="bottom", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _cost(ax: Axes, rows: list[dict[str, Any]]) -> None:
    costs, accuracies = [r["step_ms"] for r in rows], [100 * r["test"] for r in rows]
    for row, x, y in zip(rows, costs, accuracies, strict=True):
        colour, marker = STYLES[row["name"]]
        ax.errorbar(x, y, 100 * row["test_sd"], fmt=marker, color=colour, markersize=9, capsize=4, elinewidth=1.2, zorder=5)
    ax.set_xlim(0, 1.5 * max(costs))  # space for the labels
    low = min(y - 100 * r["test_sd"] for r, y in zip(rows, accuracies, strict=True))
    high = max(y + 100 * r["test_sd"] for r, y in zip(rows, accuracies, strict=True))
    ax.set_ylim(low - 0.1 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
    _label(ax, rows, costs, accuracies, reach=0.3)
    clean(ax)


def _curves(ax: Axes, rows: list[dict[str, Any]], runs: list[dict[str, Any]], key: str) -> None:
    ends = []
    for row in rows:
        curves = 100 * np.array([r["curves"][key] for r in runs if r["name"] == row["name"]])
        mean, sd = curves.mean(axis=0), curves.std(axis=0)
        epochs = np.arange(1, len(mean) + 1)
        colour = STYLES[row["name"]][0]
        ax.plot(epochs, mean, color=colour, linewidth=1.8)
        ax.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.1, linewidth=0)
        ends.append(float(mean[-1]))
    ax.set_ylim(max(0.0, min(ends) - 15), 101)
    ax.set_xlim(1, max(len(mean), 2))
    _label(ax, rows, [float(len(mean))] * len(rows), ends, reach=1.0)
    clean(ax)


def _label(ax: Axes, rows: list[dict[str, Any]], xs: list[float], ys: list[float], reach: float) -> None:
    """Names beside the points; those of points within `reach` (a fraction of the axis) of each other are moved apart."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    heights = spread(xs, ys, reach * (right - left), 0.062 * (top - bottom), bottom, top)
    for row, x, y, height in zip(rows, xs, ys, heights, strict=True):
        colour = STYLES[row["name"]][0]
        ax.annotate(
            row["label"].replace(f"{row['base']} + ", "+ "),
            (x, y),
            (x + 0.045 * (right - left), height),
            va="center",
            fontsize=10,
            color=colour,
            zorder=4,
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
        )


def spread(xs: list[float], ys: list[float], reach: float, gap: float, bottom: float, top: float) -> list[float]:
    """Heights at least about `gap` apart wherever the xs are within `reach`, near `ys` and in their order."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    heights = list(ys)
    for _ in range(100):
        for a, lower in enumerate(order):
            for upper in order[a + 1 :]:
                overlap = gap - (heights[upper] - heights[lower])
                if overlap > 0 and abs(xs[upper] - xs[lower]) <= reach:
                    heights[upper] += overlap / 2
                    heights[lower] -= overlap / 2
        heights = [min(max(h, bottom + gap / 2), top - gap / 2) for h in heights]
    return heights


def clean(ax: Axes, axis: str = "y") -> None:
    """No frame but the axes, and a light grid across `axis`."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=axis, color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
