"""The profile of a step names the step's functions and operators, and counts instructions by differences."""

from __future__ import annotations

import pytest

from benchmarks import profile_step


def test_functions_and_operators_of_a_step_are_listed(capsys):
    profile_step.main(["--backend", "torch", "--method", "sam", "--steps", "1"])
    said = capsys.readouterr().out
    assert "gam_fused/" in said  # which of its functions are among the first differs
    assert "aten::_foreach_mul" in said


def test_instructions_are_free_of_starting_and_preparing(monkeypatch):
    starting, preparing, stepping = 10**9, 300, 70
    monkeypatch.setattr(profile_step.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        profile_step,
        "_count",
        lambda chosen, steps, bare: starting + steps * (preparing + (stepping if bare == "step" else 0)),
    )
    assert profile_step.instructions([]) == stepping


def test_without_valgrind_it_says_so(monkeypatch):
    monkeypatch.setattr(profile_step.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="needs valgrind"):
        profile_step.instructions([])
