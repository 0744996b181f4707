"""The picture of the probe's length: cosine against rho', one panel per net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STAGE_COLOURS = ("#56B4E9", "#009E73", "#D55E00", "#000000")  # Okabe and Ito
LINES = {"fp32": "-", "bf16 autocast": "--"}


def save(rows: Sequence[Any], path: Path) -> None:
    """Draws the rows of `probe_cosine` to `path` (PNG)."""
    nets = list(dict.fromkeys(r.net for r in rows))
    figure, axes = plt.subplots(1, len(nets), figsize=(5 * len(nets), 4.8), sharey=True, squeeze=False)
    for ax, net in zip(axes[0], nets, strict=True):
        here = [r for r in rows if r.net == net]
        ax.axvspan(0.02, 0.1, color="#eeeeee", zorder=0)
        for step, colour in zip(sorted({r.step for r in here}), STAGE_COLOURS, strict=True):
            for precision, line in LINES.items():
                points = [r for r in here if r.step == step and r.precision == precision]
                ax.plot(
                    [r.rho_prime for r in points],
                    [r.cosine for r in points],
                    line,
                    color=colour,
                    marker="o",
                    markersize=3.5,
                    linewidth=1.5,
                )
        ax.set_xscale("log")
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("rho'")
        ax.set_title(f"{net}, {here[0].parameters:,} parameters")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes[0][0].set_ylabel("cosine with the exact Hessian-vector product")
    steps = sorted({r.step for r in rows})
    handles = [
        plt.Line2D([], [], color=c, label=f"after {s} of {steps[-1]} steps")
        for s, c in zip(steps, STAGE_COLOURS, strict=True)
    ]
    handles += [plt.Line2D([], [], color="#777777", linestyle=line, label=name) for name, line in LINES.items()]
    axes[0][-1].legend(handles=handles, frameon=False, loc="lower center", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
