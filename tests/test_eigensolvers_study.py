"""The comparison of eigensolvers: a tiny run from end to end, and the table of what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the comparison needs scipy")
pytest.importorskip("sklearn", reason="the comparison needs scikit-learn")

from studies import eigensolvers

RESULTS = Path(__file__).parents[1] / "studies" / "results"


def test_all_solvers_find_the_eigenvalues_of_the_dense_hessian(tmp_path, monkeypatch):
    monkeypatch.setitem(eigensolvers.NETS, "MLP, dense", lambda: eigensolvers.mlp(2))
    eigensolvers.main(["--out", str(tmp_path), "--nets", "MLP, dense", "--ks", "1", "3", "--rounds", "2", "--epochs", "2"])
    document = json.loads((tmp_path / "eigensolvers.json").read_text())
    assert [(row["k"], row["solver"]) for row in document["rows"]] == [(k, s) for k in (1, 3) for s in eigensolvers.SOLVERS]
    assert all(row["error"] < 1e-3 and row["products"] > 0 for row in document["rows"])
    assert document["truth"]["MLP, dense"]["apart"] < 1e-6


def test_a_solver_that_fails_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(eigensolvers, "LIMIT", 2)
    monkeypatch.setattr(eigensolvers, "truth", lambda *_: {"values": [1.0]})
    monkeypatch.setitem(eigensolvers.NETS, "MLP, dense", lambda: eigensolvers.mlp(2))
    rows = eigensolvers.study(["MLP, dense"], [1], 1, 0)["rows"]
    assert [row["failed"] for row in rows] == ["not there after 2 products"] * 3
    assert "not there after 2 products" in eigensolvers.table(rows)


def test_the_recorded_table_follows_from_the_recorded_runs():
    recorded = json.loads((RESULTS / "eigensolvers.json").read_text())
    assert (RESULTS / "eigensolvers.md").read_text() == eigensolvers.table(recorded["rows"]) + "\n"
    assert {row["net"] for row in recorded["rows"]} == set(eigensolvers.NETS)
    assert {row["k"] for row in recorded["rows"]} == set(eigensolvers.KS)
