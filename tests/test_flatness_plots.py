"""Pictures of the measures: what is drawn is what was measured, and what is missing is said."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="plots need matplotlib")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from torch.nn.functional import cross_entropy

from gam_fused import FusedGAM, flatness
from gam_fused.flatness import plots

PAGE = Path(__file__).parents[1] / "docs" / "flatness.md"

DENSITY = flatness.SpectralDensity(
    torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
)
MINIMA = flatness.MinimaDensity(torch.tensor([0, 2, 2]), torch.tensor([1, 1, 3]))
GRID = torch.arange(9.0).view(3, 3)
PLOTS = {
    "eigenvalues": lambda **ax: plots.eigenvalues(torch.tensor([5.0, 1.0, 1.0]), **ax),
    "spectral_density": lambda **ax: plots.spectral_density(DENSITY, **ax),
    "landscape_1d": lambda **ax: plots.landscape_1d(torch.tensor([2.0, math.inf, 3.0]), 0.5, **ax),
    "landscape_2d": lambda **ax: plots.landscape_2d(GRID, **ax),
    "landscape_3d": lambda **ax: plots.landscape_3d(GRID, **ax),
    "minima_density": lambda **ax: plots.minima_density(MINIMA, **ax),
    "flatness": lambda **ax: plots.flatness([0.1, 0.2], [torch.tensor(1.0), 2.0], [2.0, 4.0], **ax),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_has_names_on_its_axes_and_can_be_saved(name, tmp_path):
    ax = PLOTS[name]()
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_may_be_a_part_of_another(name):
    mine = plt.figure().add_subplot(projection="3d" if name == "landscape_3d" else None)
    assert PLOTS[name](ax=mine) is mine


def test_bars_are_counts():
    heights = [patch.get_height() for patch in PLOTS["eigenvalues"]().patches]
    assert sum(heights) == 3
    assert (heights[0], heights[-1]) == (2, 1)
    minima, maxima = ([bar.get_height() for bar in bars] for bars in PLOTS["minima_density"]().containers)
    assert (minima, maxima) == ([1, 0, 2, 0], [0, 2, 0, 1])


def test_lines_are_the_results():
    x, y = PLOTS["landscape_1d"]().lines[0].get_data()
    assert x.tolist() == [-0.5, 0.0, 0.5]
    assert [y[0], y[2]] == [2.0, 3.0]
    assert math.isnan(y[1])
    first, zeroth = PLOTS["flatness"]().lines
    assert list(first.get_ydata()) == [2.0, 4.0]
    assert list(zeroth.get_ydata()) == [1.0, 2.0]


def test_the_curve_of_a_density():
    ax = plots.spectral_density(DENSITY, width=0.1)
    x, y = (torch.tensor(values) for values in ax.lines[0].get_data())
    torch.testing.assert_close(y, DENSITY.density(x, 0.1))
    assert ax.get_yscale() == "log"
    assert plots.spectral_density(DENSITY._replace(nodes=torch.ones(1, 2, dtype=torch.float64))).lines  # no extent at all


def test_the_surface_has_the_first_direction_along_x(monkeypatch):
    from mpl_toolkits.mplot3d.axes3d import Axes3D

    seen = []
    monkeypatch.setattr(Axes3D, "plot_surface", lambda self, *data, **options: seen.extend(data))
    PLOTS["landscape_3d"]()
    x, _, z = seen
    assert x[:, 0].tolist() == [-1.0, 0.0, 1.0]
    assert z[2, 0] == GRID[2, 0]
    monkeypatch.setattr(
        matplotlib.axes.Axes, "contour", lambda self, *data, **options: seen.append(data[2]) or _contour(self)
    )
    with pytest.raises(RuntimeError, match="drawn"):
        PLOTS["landscape_2d"]()
    assert seen[-1][0, 2] == GRID[2, 0]  # matplotlib has x in columns


def _contour(ax):
    raise RuntimeError("drawn")


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"2 equal dimensions, got shape \(3,\)"):
        plots.landscape_2d(torch.ones(3))
    with pytest.raises(ValueError, match="three dimensions"):
        plots.landscape_3d(GRID, ax=plt.figure().add_subplot())


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_it_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        PLOTS[name]()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """All of docs/flatness.md but the callbacks, whose frameworks tests/test_flatness_log.py runs."""

    class Named(torch.nn.Linear):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return logits if labels is None else {"loss": cross_entropy(logits, labels)}

    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(12, 9), torch.randint(6, (12,))
    models = [Named(9, 6) for _ in range(2)]
    names = {"torch": torch, "cross_entropy": cross_entropy, "x": x, "y": y, "model": models[0]}
    names |= {"model_a": models[1], "model_b": models[0], "loader": [(x[:8], y[:8]), (x[8:], y[8:])], "data": [(x, y)]}
    names |= {"dataset_of_dicts": [{"x": x, "labels": y}], "optimizer": FusedGAM(models[0], torch.optim.SGD, lr=0.1)}
    names["closure"] = lambda batch: cross_entropy(models[0](batch[0]), batch[1])
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if "Callback" not in block:
            exec(block, names)
    pictures = {"eigenvalues.png", "density.png", "landscape.png", "minima.png"}
    assert {path.name for path in tmp_path.iterdir()} == pictures
