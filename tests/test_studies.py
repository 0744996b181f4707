"""The sweep and the probe: a tiny run of each, and the tables and pictures of what was recorded."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("matplotlib", reason="the studies need matplotlib")

from examples.digits.methods import Method
from examples.digits.report import summary
from examples.digits.training import run
from studies import probe_cosine, probe_plot, sweep_digits, sweep_plot

RESULTS = Path(__file__).parents[1] / "studies" / "results"


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_the_sweep_follows_from_the_recorded_runs(tmp_path):
    recorded = json.loads((RESULTS / "sweep_digits.json").read_text())
    for r in recorded["runs"]:  # JSON has no NaN
        r |= {key: math.nan if r[key] is None else r[key] for key in ("loss", "eigenvalue")}
    sweep_digits.write_csv(summary(recorded["runs"]), tmp_path / "sweep.csv")
    assert (tmp_path / "sweep.csv").read_text() == (RESULTS / "sweep_digits.csv").read_text()
    sweep_plot.save(recorded, tmp_path / "sweep.png")
    assert is_picture(tmp_path / "sweep.png")


def test_a_tiny_sweep_is_judged_on_validation_folds(tmp_path, monkeypatch):
    gam = Method("finite_difference", options=sweep_digits.gam(0.2, 1.0))
    monkeypatch.setattr(sweep_digits, "grid", lambda: [Method("base"), gam])
    monkeypatch.setattr(sweep_digits, "run_all", lambda jobs, workers: [run(*job) for job in jobs])
    sweep_digits.main(["--out", str(tmp_path), "--seeds", "1", "--epochs", "1"])
    document = json.loads((tmp_path / "sweep_digits.json").read_text())
    assert [(r["name"], r["seed"]) for r in document["runs"]] == [("base", 100), ("finite_difference", 100)]
    assert document["settings"]["validation"]
    assert len((tmp_path / "sweep_digits.csv").read_text().splitlines()) == 3
    assert is_picture(tmp_path / "sweep_digits.png")


def test_every_setting_of_the_sweep_is_another():
    settings = [str(method) for method in sweep_digits.grid()]
    assert len(set(settings)) == len(settings)


def test_a_probe_that_is_not_too_short_finds_the_product(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_cosine, "STAGES", (0, 1, 2, 3))
    monkeypatch.setattr(probe_cosine, "STEPS", 3)
    monkeypatch.setattr(probe_cosine, "RHO_PRIMES", (0.001, 0.02))
    monkeypatch.setattr(probe_cosine, "BATCHES", 1)
    probe_cosine.main(["--nets", "transformer", "--out", str(tmp_path)])
    with (tmp_path / "probe_cosine.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "0"]
    cosines = {(row["precision"], row["rho_prime"]): float(row["cosine"]) for row in rows}
    assert len(cosines) == 6
    assert cosines["fp64", "0.001"] > 0.999
    assert cosines["bf16 autocast", "0.001"] < cosines["bf16 autocast", "0.02"]
    assert is_picture(tmp_path / "probe_cosine.png")


def test_the_picture_of_the_recorded_probe(tmp_path):
    with (RESULTS / "probe_cosine.csv").open() as file:
        _, *lines = csv.reader(file)
    texts = ("net", "precision")
    named = [dict(zip(probe_cosine.Row._fields, line, strict=True)) for line in lines]
    rows = [probe_cosine.Row(**{k: v if k in texts else float(v) for k, v in line.items()}) for line in named]
    probe_plot.save(rows, tmp_path / "probe.png")
    assert is_picture(tmp_path / "probe.png")
