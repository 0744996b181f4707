"""The pictures of a run: overhead, roofline, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench_kernels import PRODUCT, YARDSTICK
from benchmarks.bench_training import CONTESTANTS
from benchmarks.contestants import AUTHORS, FOREACH, TORCH_FUSED
from benchmarks.report.ratios import Cell, ms_per_step, ratio

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = ("#000000", "#E69F00", "#D55E00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#999999")
BY = {AUTHORS: "#999999", FOREACH: "#E69F00", TORCH_FUSED: "#000000"}
OURS = "#0072B2"
MARKERS = "o^sDvP*X<>p"
Record = dict[str, Any]


def save(record: Record, path: Path) -> None:
    """Draws what `record` has figures for, beside the JSON `path`."""
    cells = {name: suite["cells"] for name, suite in record["suites"].items()}
    m = record["machine"]
    footer = f"{m.get('gpu') or m['cpu']}, {m['cores']} cores, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    for name, draw in {"overhead": overhead, "roofline": roofline, "scaling": scaling}.items():
        figure = draw(cells)
        if figure:
            figure.supxlabel(footer, x=0.995, ha="right", fontsize=8, color="#555555")
            figure.savefig(path.with_name(f"{path.stem}-{name}.png"), dpi=120)
            plt.close(figure)


def overhead(cells: dict[str, dict[str, Cell]]) -> Figure | None:
    """Times of training steps in steps of the base; beside them the optimizer's own milliseconds."""
    training = {name: cell for name, cell in cells.get("training", {}).items() if "base" in cell}
    alone = {name: cells.get("optimizer", {}).get(name, {}) for name in ("resnet50, SGD", "tiny, SGD")}
    alone = {name: cell for name, cell in alone.items() if any("method" in row for row in cell.values())}
    if not training and not alone:
        return None
    figure = plt.figure(figsize=(14, max(7.5, 0.85 * len(training) + 1.5)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    if training:
        _training(left.subplots(), training)
    if alone:
        for ax, (name, cell) in zip(right.subplots(len(alone), 1, squeeze=False)[:, 0], sorted(alone.items()), strict=True):
            _alone(ax, name, cell)
    for ax in figure.get_axes():
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _training(ax: Axes, cells: dict[str, Cell]) -> None:
    names = [name for name in CONTESTANTS[1:] if any(name in cell for cell in cells.values())]
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        pairs = [(y, ratio(cell[name], cell["base"])) for y, cell in enumerate(cells.values()) if name in cell]
        found = [(y + (place - (len(names) - 1) / 2) * height, r) for y, r in pairs if r]
        ys, values = [y for y, _ in found], [r.value for _, r in found]
        spread = _spread([r for _, r in found])
        ax.barh(ys, values, 0.92 * height, xerr=spread, color=COLOURS[place], label=name, error_kw={"lw": 0.8})
        for y, r in found:
            ax.text(r.high + 0.08, y, f"{r.value:.2f}", va="center", fontsize=7.5)
    for passes in (1, 2, 4):
        ax.axvline(passes, color="#bbbbbb", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(cells)), [name.replace(", ", "\n", 1) for name in cells], fontsize=8)
    ax.margins(y=0.01)
    ax.invert_yaxis()
    ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.42, -0.07), ncols=3, frameon=False)
    ax.set(title="a training step, in steps of the base optimizer", xlabel="times the base (lines: 1, 2 and 4 passes)")


def _alone(ax: Axes, name: str, cell: Cell) -> None:
    shown = [(label, row) for label, row in cell.items() if "method" in row][::-1]
    times = [ms_per_step(row) for _, row in shown]
    values = [t[0] for t in times]
    style = {"color": [BY.get(row["by"], OURS) for _, row in shown], "error_kw": {"lw": 0.8}}
    ax.barh([label.removeprefix("SGD, ") for label, _ in shown], values, xerr=_spread(times), **style)
    for y, value in enumerate(values):
        ax.text(value + 0.012 * max(values), y + 0.25, f"{value:.3g}", va="center", fontsize=8)
    row = shown[0][1]
    size = f"{row['elements'] / 1e6:.1f} M parameters" if row["elements"] > 1e5 else f"{row['elements']} parameters"
    ax.set(title=f"the optimizer alone, {name}\n{row['tensors']} tensors, {size}", xlabel="ms per step")


def _spread(found: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """How far the lows and the highs of (value, low, high) lie from the values."""
    return [[value - low for value, low, _ in found], [high - value for value, _, high in found]]


def roofline(cells: dict[str, dict[str, Cell]]) -> Figure | None:
    """Arithmetic per second against arithmetic per byte; the roofs are this run's yardstick and matrix product."""
    found = {name: cell for name, cell in cells.get("kernels", {}).items() if YARDSTICK in cell and len(cell) > 1}
    large = [name for name, cell in found.items() if cell[YARDSTICK]["elements"] >= 10**7 or len(found) <= 4]
    if not large:
        return None
    product = cells["kernels"].get(PRODUCT, {}).get(PRODUCT)
    shown = [name for name in large if name.split(" tensors")[0] == large[0].split(" tensors")[0]]
    size = (4.2 * len(shown) + 3, 4.6)
    figure, axes = plt.subplots(1, len(shown), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax, name in zip(axes[0], shown, strict=True):
        _roofs(ax, found[name], product)
        ax.set_title(name.replace(", ", "\n", 1), fontsize=9)
    axes[0][0].set_ylabel("GFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _roofs(ax: Axes, cell: Cell, product: dict[str, Any] | None) -> None:
    yardstick = cell[YARDSTICK]
    rate = yardstick["bytes"] / yardstick["ms"] / 1e6  # GB/s
    intensities = [0.1, 2.5]
    ax.plot(intensities, [rate * i for i in intensities], color="#555555", label="the yardstick's rate")
    ax.text(0.11, 0.16 * rate, f"{rate:.3g} GB/s", fontsize=8, color="#555555")
    if product:
        peak = product["flops"] / product["ms"] / 1e6
        ax.axhline(peak, color="#555555", linestyle="--", label="a matrix product's rate")
        ax.text(0.11, 1.08 * peak, f"{peak:.3g} GFLOP/s", fontsize=8, color="#555555")
    kernels, backends = ([r[key] for r in cell.values() if r.get("flops")] for key in ("kernel", "backend"))
    for row in cell.values():
        if row.get("flops"):
            place, backend = (
                list(dict.fromkeys(kernels)).index(row["kernel"]),
                list(dict.fromkeys(backends)).index(row["backend"]),
            )
            style = {"color": COLOURS[place % 8], "marker": MARKERS[place], "linestyle": "none", "markersize": 7}
            style |= {"fillstyle": "full" if backend == 0 else "none"}
            label = row["kernel"] + (f", {row['backend']}" if len(set(backends)) > 1 else "")
            ax.plot(row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e6, label=label, **style)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte moved")
    ax.spines[["top", "right"]].set_visible(False)


def scaling(cells: dict[str, dict[str, Cell]]) -> Figure | None:
    """The optimizer's milliseconds against parameters (100 tensors) and against tensors (10^6 parameters)."""
    rows = [(name, row) for cell in cells.get("scaling", {}).values() for name, row in cell.items()]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for ax, x, fixed, at, title in (
        (axes[0], "elements", "tensors", 100, "parameters, in 100 tensors"),
        (axes[1], "tensors", "elements", 10**6, "tensors, of 10^6 parameters in all"),
    ):
        for place, name in enumerate(dict.fromkeys(name for name, _ in rows)):
            points = sorted((r[x], ms_per_step(r)) for n, r in rows if n == name and r[fixed] == at)
            if points:
                xs, times = [x for x, _ in points], [t for _, t in points]
                style = {"marker": MARKERS[place], "color": COLOURS[place % 8], "label": name.removeprefix("SGD, ")}
                ax.errorbar(xs, [t[0] for t in times], _spread(times), capsize=2, **style)
        ax.set(xscale="log", yscale="log", xlabel=title, ylabel="ms per step")
        ax.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure
