"""The profile of a step names the step's functions and operators, and counts instructions by differences."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import host_time, profile_step
from gam_fused import available_backends


def test_functions_and_operators_of_a_step_are_listed(capsys):
    profile_step.main(["--backend", "torch", "--method", "sam", "--steps", "1"])
    said = capsys.readouterr().out
    assert "gam_fused/" in said  # which of its functions are among the first differs
    assert "aten::_foreach_mul" in said


def test_ratios_to_the_base(monkeypatch, capsys):
    if reason := available_backends()["cpp"]:
        pytest.skip(reason)
    ticks = itertools.count()
    monkeypatch.setattr(host_time.time, "thread_time", lambda: float(next(ticks)))  # one second from each call to the next
    profile_step.main(["--ratios", "2"])
    said = dict(line.rsplit(maxsplit=4)[::4] for line in capsys.readouterr().out.splitlines() if len(line.split()) > 4)
    assert float(said["finite_difference"]) == 1.0
    assert float(said["model= with 53 conv-BN blocks adds"]) == 0.0
    assert float(said["GAM: a step over its passes"]) == 9 / 4  # two calls in each pass, and one at the end
    assert float(said["GAM, interval=10: 10 steps over the base's"]) == 3.6 / 3


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
