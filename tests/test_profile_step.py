"""The profile of a step names the step's functions and operators, and counts instructions by differences."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import profile_step

ARGUMENTS = Namespace(shapes="tiny", backend="torch", method="sam")


def test_functions_and_operators_of_a_step_are_listed():
    command = [sys.executable, "-m", "benchmarks.profile_step", "--backend", "torch", "--method", "sam", "--steps", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "gam_fused/" in done.stdout  # which of its functions are among the first differs
    assert "aten::_foreach_mul" in done.stdout


def test_instructions_are_free_of_starting_and_preparing(monkeypatch):
    starting, preparing, stepping = 10**9, 300, 70
    monkeypatch.setattr(profile_step.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        profile_step,
        "_count",
        lambda arguments, steps, bare: starting + steps * (preparing + (stepping if bare == "step" else 0)),
    )
    assert profile_step.instructions(ARGUMENTS) == stepping


def test_without_valgrind_it_says_so(monkeypatch):
    monkeypatch.setattr(profile_step.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="needs valgrind"):
        profile_step.instructions(ARGUMENTS)
