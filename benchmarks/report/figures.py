"""The pictures of a run: overhead, roofline, scaling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench_training import CONTESTANTS
from benchmarks.bench_verbs import PRODUCT, YARDSTICK
from benchmarks.contestants import AUTHORS, FOREACH, TORCH_FUSED
from benchmarks.report.ratios import Cell, ms_per_step, ratio

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = ("#000000", "#E69F00", "#D55E00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#999999")
BY = {AUTHORS: "#999999", FOREACH: "#E69F00", TORCH_FUSED: "#000000"}
OURS = "#0072B2"
Record = dict[str, Any]


def save(record: Record, path: Path) -> None:
    """Draws what `record` has figures for, beside the JSON `path`."""
    cells = {name: suite["cells"] for name, suite in record["suites"].items()}
    m = record["machine"]
    footer = f"{m.get('gpu') or m['cpu']}, {m['cores']} cores, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    for name, draw in {"overhead": overhead, "roofline": roofline, "scaling": scaling}.items():
        figure = draw(cells)
        if figure:
            figure.text(0.995, 0.005, footer, ha="right", va="bottom", fontsize=8, color="#555555")
            figure.savefig(path.with_name(f"{path.stem}-{name}.png"), dpi=120)
            plt.close(figure)


def overhead(cells: dict[str, dict[str, Cell]]) -> Figure | None:
    """Times of training steps in steps of the base, and the optimizer's own milliseconds."""
    training = {name: cell for name, cell in cells.get("training", {}).items() if "base" in cell}
    alone = {name: cell for name, cell in cells.get("optimizer", {}).items() if name in ("resnet50, SGD", "tiny, SGD")}
    panels: list[Callable[[Axes], None]] = [lambda ax: _training(ax, training)] if training else []
    for name, cell in sorted(alone.items()):
        panels.append(lambda ax, name=name, cell=cell: _alone(ax, name, cell))
    if not panels:
        return None
    widths = [1.3 if training and i == 0 else 1.0 for i in range(len(panels))]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.3 * sum(widths), 5.6), squeeze=False, width_ratios=widths)
    for ax, draw in zip(axes[0], panels, strict=True):
        draw(ax)
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    return figure


def _training(ax: Axes, cells: dict[str, Cell]) -> None:
    names = [name for name in CONTESTANTS[1:] if any(name in cell for cell in cells.values())]
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [(y, ratio(cell[name], cell["base"])) for y, cell in enumerate(cells.values()) if name in cell]
        ys = [y + (place - (len(names) - 1) / 2) * height for y, _ in found]
        values = [r.value for _, r in found if r]
        spread = [[r.value - r.low for _, r in found if r], [r.high - r.value for _, r in found if r]]
        ax.barh(ys, values, 0.92 * height, xerr=spread, color=COLOURS[place], label=name, error_kw={"lw": 0.8})
        for y, value in zip(ys, values, strict=True):
            ax.text(value + 0.15, y, f"{value:.2f}", va="center", fontsize=7)
    for passes in (1, 2, 4):
        ax.axvline(passes, color="#bbbbbb", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(cells)), [name.replace(", ", "\n", 1) for name in cells], fontsize=8)
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="lower right")
    ax.set(title="a training step, in steps of the base optimizer", xlabel="times the base (lines: 1, 2 and 4 passes)")


def _alone(ax: Axes, name: str, cell: Cell) -> None:
    shown = [(label, row) for label, row in cell.items() if "method" in row][::-1]
    times = [ms_per_step(row) for _, row in shown]
    values = [t[0] for t in times]
    spread = [[t[0] - t[1] for t in times], [t[2] - t[0] for t in times]]
    colours = [BY.get(row["by"], OURS) for _, row in shown]
    ax.barh([label.removeprefix("SGD, ") for label, _ in shown], values, xerr=spread, color=colours, error_kw={"lw": 0.8})
    for y, value in enumerate(values):
        ax.text(value + 0.012 * max(values), y + 0.25, f"{value:.3g}", va="center", fontsize=8)
    row = shown[0][1]
    size = f"{row['elements'] / 1e6:.1f} M parameters" if row["elements"] > 1e5 else f"{row['elements']} parameters"
    ax.set(title=f"the optimizer alone, {name}\n{row['tensors']} tensors, {size}", xlabel="ms per step")


def roofline(cells: dict[str, dict[str, Cell]]) -> Figure | None:
    """Arithmetic per second against arithmetic per byte; the roofs are this run's yardstick and matrix product."""
    found = {name: cell for name, cell in cells.get("verbs", {}).items() if YARDSTICK in cell and len(cell) > 1}
    large = [name for name, cell in found.items() if cell[YARDSTICK]["elements"] >= 10**7 or len(found) <= 4]
    if not large:
        return None
    product = cells["verbs"].get(PRODUCT, {}).get(PRODUCT)
    shown = [name for name in large if name.split(" tensors")[0] == large[0].split(" tensors")[0]]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.6 * len(shown), 5), squeeze=False, sharey=True)
    for ax, name in zip(axes[0], shown, strict=True):
        _roofs(ax, found[name], product)
        ax.set_title(name, fontsize=9)
    axes[0][0].set_ylabel("GFLOP/s")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _roofs(ax: Axes, cell: Cell, product: dict[str, Any] | None) -> None:
    yardstick = cell[YARDSTICK]
    rate = yardstick["bytes"] / yardstick["ms"] / 1e6  # GB/s
    intensities = [0.1, 2.5]
    ax.plot(intensities, [rate * i for i in intensities], color="#555555", label=f"yardstick, {rate:.0f} GB/s")
    if product:
        peak = product["flops"] / product["ms"] / 1e6
        ax.axhline(peak, color="#555555", linestyle="--", label=f"matrix product, {peak:.0f} GFLOP/s")
    for place, (name, row) in enumerate((n, r) for n, r in cell.items() if r.get("flops")):
        style = {"color": COLOURS[place % 8], "marker": "o^sDvP*X"[place % 8], "linestyle": "none", "markersize": 7}
        ax.plot(row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e6, label=name, **style)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte moved")
    ax.legend(fontsize=7, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)


def scaling(cells: dict[str, dict[str, Cell]]) -> Figure | None:
    """The optimizer's milliseconds against parameters (100 tensors) and against tensors (10^6 parameters)."""
    rows = [(name, row) for cell in cells.get("scaling", {}).values() for name, row in cell.items()]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8))
    for ax, x, fixed, at, title in (
        (axes[0], "elements", "tensors", 100, "parameters, in 100 tensors"),
        (axes[1], "tensors", "elements", 10**6, "tensors, of 10^6 parameters in all"),
    ):
        for place, name in enumerate(dict.fromkeys(name for name, _ in rows)):
            points = sorted((r[x], *ms_per_step(r)) for n, r in rows if n == name and r[fixed] == at)
            if points:
                xs, ms, low, high = zip(*points, strict=True)
                spread = [[m - a for m, a in zip(ms, low, strict=True)], [b - m for m, b in zip(ms, high, strict=True)]]
                label = name.removeprefix("SGD, ")
                ax.errorbar(xs, ms, spread, marker="o^sDv"[place % 5], color=COLOURS[place % 8], label=label, capsize=2)
        ax.set(xscale="log", yscale="log", xlabel=title, ylabel="ms per step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure
