"""The pictures: figures 2 to 5 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from examples.digits.plot import clean
from examples.digits.report import mean_sd
from gam_fused.flatness import MinimaDensity, plots
from studies.defaults.networks import Network
from studies.paper.claims import NAMES
from studies.paper.measures import LANDSCAPE_RADIUS, RHO
from studies.paper.parts import PARTS_OF_TRAINING, RATIOS, tuned_networks
from studies.paper.tables import on_test
from studies.store import Run

# Okabe and Ito's palette.
COLOURS = {"base": "#000000", "gam": "#D55E00", "sam": "#E69F00", "sam_gam": "#CC79A7"}


def save(parts: Mapping[str, Sequence[Run]], document: Mapping[str, Any], folder: Path) -> None:
    """paper_figure2.png to paper_figure5.png, as far as there are runs."""
    machine = document["machine"]
    footer = f"{machine['cpu']}, torch {machine['torch']}, commit {', '.join(document['commits'])}"
    measured = [run for run in parts.get("figures", ()) if run["split"] == "figure" and run["eigenvalues"]]
    if measured:
        figure2(measured, footer, folder / "paper_figure2.png")
        figure3(measured, footer, folder / "paper_figure3.png")
        figure5(measured, footer, folder / "paper_figure5.png")
    if "figure4" in parts:
        figure4(parts["figure4"], footer, folder / "paper_figure4.png")


def figure2(runs: Sequence[Run], footer: str, path: Path) -> None:
    """How many local minima and maxima lie along random directions, after training with the base optimizer."""
    found = [run for run in runs if run["kind"] == "base" and "minima" in run]
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False)
    for ax, run in zip(axes[0], found, strict=True):
        plots.minima_density(MinimaDensity(torch.tensor(run["minima"]), torch.tensor(run["maxima"])), ax=ax)
        ax.set_title(f"{_data(run)}, SGD")
        clean(ax)
    _write(figure, f"Figure 2: local minima and maxima within {RHO:g}", footer, path)


def figure3(runs: Sequence[Run], footer: str, path: Path) -> None:
    """The largest eigenvalues of the Hessian, and its trace, in the middle and at the end of training."""
    names = list(dict.fromkeys(run["network"] for run in runs))
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 3.6 * len(names)), squeeze=False, sharey="row")
    for row, name in zip(axes, names, strict=True):
        for ax, part in zip(row, PARTS_OF_TRAINING, strict=True):
            found = {run["kind"]: run for run in runs if (run["network"], run["part"]) == (name, part)}
            for run in (found[kind] for kind in NAMES if kind in found):
                ranks = range(1, 1 + len(run["eigenvalues"]))
                label = f"{NAMES[run['kind']]}: trace {run['trace']:.3g}"
                ax.plot(ranks, run["eigenvalues"], color=COLOURS[run["kind"]], linewidth=1.8, label=label)
            ax.set_yscale("log")
            ax.set_title(f"{name.split(',')[0]}, after {100 * part:.0f} % of the steps")
            ax.legend(frameon=False, fontsize=9)
            clean(ax)
        row[0].set_ylabel("eigenvalue of the Hessian")
    for ax in axes[-1]:
        ax.set_xlabel("its rank")
    _write(figure, "Figure 3: the largest eigenvalues and the trace", footer, path)


def figure4(runs: Sequence[Run], footer: str, path: Path) -> None:
    """Accuracy against passes with GAM on a ratio of the steps."""
    networks = tuned_networks()
    figure, axes = plt.subplots(1, len(networks), figsize=(6 * len(networks), 4.2), squeeze=False)
    for ax, network in zip(axes[0], networks, strict=True):
        for kind, other in (("gam", "base"), ("sam_gam", "sam")):
            _ratios(ax, runs, network, kind, other)
        ax.set_title(network.title)
        ax.set_xlabel("gradient passes per step")
        ax.legend(frameon=False)
        clean(ax)
    axes[0][0].set_ylabel("test accuracy, %")
    _write(figure, "Figure 4: GAM on a ratio of the steps; mean and sd over seeds", footer, path)


def _ratios(ax: Axes, runs: Sequence[Run], network: Network, kind: str, other: str) -> None:
    points = []
    for ratio in (0.0, *RATIOS, 1.0):
        group = on_test(runs, network, round(1 / ratio) if ratio else 1).get(kind if ratio else other)
        if group:
            mean, sd = mean_sd([100 * run["value"] for run in group])
            points.append((group[0]["passes"], mean, sd, f"{ratio:g}"))
    if points:
        x, y, sd, names = zip(*points, strict=True)
        ax.errorbar(x, y, sd, marker="o", capsize=3, color=COLOURS[kind], label=f"{NAMES[other]}, with GAM on a ratio")
        for place in zip(names, x, y, strict=True):
            ax.annotate(place[0], place[1:], (4, 6), textcoords="offset points", fontsize=9, color=COLOURS[kind])


def figure5(runs: Sequence[Run], footer: str, path: Path) -> None:
    """Landscapes along the same two random directions, filter-normalised to each network's own weights."""
    found = [run for run in runs if "landscape" in run]
    names = list(dict.fromkeys(run["network"] for run in found))
    figure, axes = plt.subplots(
        len(names), len(NAMES), figsize=(15, 3.9 * len(names)), squeeze=False, subplot_kw={"projection": "3d"}
    )
    for row, name in zip(axes, names, strict=True):
        top = max(max(map(max, run["landscape"])) for run in found if run["network"] == name)
        for ax, kind in zip(row, NAMES, strict=True):
            for run in (r for r in found if (r["network"], r["kind"]) == (name, kind)):
                plots.landscape_3d(torch.tensor(run["landscape"]), LANDSCAPE_RADIUS, ax=ax)
            ax.set_title(f"{name.split(',')[0]}, {NAMES[kind]}")
            ax.set_zlim(0, top)
            ax.set(xlabel="", ylabel="", zlabel="")
    _write(figure, "Figure 5: the loss along two filter-normalised directions, training data", footer, path)


def _data(run: Run) -> str:
    return str(run["network"].split(",")[0])


def _write(figure: Any, title: str, footer: str, path: Path) -> None:
    figure.suptitle(title, fontsize=13)
    figure.text(0.995, 0.005, footer, ha="right", va="bottom", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 0.99))
    figure.savefig(path, dpi=100)
    plt.close(figure)
