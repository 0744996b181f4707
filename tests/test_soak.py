"""A short, fixed form of every part of `make soak`, and what each part would tell if something were wrong."""

from __future__ import annotations

import json

import large as elements
import pytest
import torch
from cases import get_backend

pytest.importorskip("hypothesis", reason="random cases need hypothesis")

from gam_fused.backends import cpp
from soak import __main__ as soak
from soak import faults, kills, large, lists, operators, properties, ranks, sanitizers, state_dicts

pytestmark = pytest.mark.skipif(bool(cpp.reason()), reason=cpp.reason() or "built")


@pytest.mark.parametrize("name", properties.PROPERTIES)
def test_a_property(name):
    assert properties.attempt(name, 6) >= 6


def test_lists_hold_and_tell_how_far_they_went():
    figures = lists.run(count=25)
    assert figures["failed"] == 0, figures["failures"]
    done = [told.split(" of ") for told in figures["done"].values()]
    assert [int(n) for n, _ in done] == [25] * len(lists.LISTS)
    assert [int(n) for _, n in done] == [len(cases()) for cases, _ in lists.LISTS.values()]


def test_a_case_of_a_list_that_fails_is_counted(monkeypatch):
    def check(case):
        if case == 3:
            raise ValueError("three")

    monkeypatch.setattr(lists, "LISTS", {"numbers": (lambda: list(range(5)), check)})
    figures = lists.run()
    assert (figures["failed"], figures["failures"]) == (1, ["numbers, 3: ValueError: three"])
    assert figures["done"] == {"numbers": "5 of 5"}


@pytest.mark.processes
def test_killed_trainings_go_on():
    assert kills.run(times=2) | {"seconds": 0} == {"turns": 3, "failed": 0, "seconds": 0, "kills": 6, "failures": []}


def test_faults_leave_everything_as_it_was():
    figures = faults.run(count=120)
    assert figures["failed"] == figures["bits_lost"] == 0, figures["failures"]
    assert len(figures["kinds"]) == 4


@pytest.mark.processes
def test_faults_on_ranks_lose_nothing():
    figures = ranks.run(number=5, count=40)
    assert figures["failed"] == figures["bits_lost"] == 0, figures["failures"]
    assert figures["kinds"].keys() == ranks.KINDS.keys()


def test_a_lost_bit_is_counted():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])
    frozen = [{"weights": [t.view(torch.int32)], "rng": 0} for t in (a, b)]
    assert faults.bits_lost(*frozen) == 1
    assert faults.bits_lost({"a": 1}, {"b": 1}) == 64


def test_operators_refuse_or_compute():
    figures = operators.run(count=1, calls=150)
    assert figures["failed"] == 0, figures["failures"]
    assert figures["calls"] == 150
    assert {"refused", "right"} <= figures["outcomes"].keys()


def test_operands_in_the_memory_of_others_are_among_what_operators_are_given():
    told = [operators.one_call(0, turn)[1].split(":")[0] for turn in range(300)]
    assert {name.split(", ")[1] for name in told} == {f"dtype {code}" for code in range(4)}
    pairs = [name for name in told if " and " in name]
    assert any("workspace" in name for name in pairs)
    assert any("last" in name for name in pairs)


def test_numbers_that_share_memory_must_be_refused():
    assert operators.must_be_refused("perturb_", "coefficients and control")
    assert not operators.must_be_refused("perturb_", "coefficients and partials")
    assert not operators.must_be_refused("perturb_", "x and y")
    assert not operators.must_be_refused("perturb_", "control")


def test_a_crash_of_an_operator_is_counted(monkeypatch):
    monkeypatch.setattr(operators, "ROOT", operators.ROOT / "nowhere")
    figures = operators.run(count=1, calls=1)
    assert figures["failed"] == figures["outcomes"]["crashed"] == 1


@pytest.mark.parametrize("backend", ["reference", *large.BACKENDS])
def test_what_a_large_tensor_goes_through_holds_for_a_small_one(monkeypatch, backend):
    monkeypatch.setattr(elements, "COUNT", 70_001)
    elements.check(get_backend(backend), torch.device("cpu"))


def test_without_the_memory_for_a_large_tensor_it_is_left_out(monkeypatch):
    monkeypatch.setattr(large, "available", lambda: 3 << 30)
    assert large.run()["outcomes"] == dict.fromkeys(large.BACKENDS, "needs 16 GiB of memory, 3 are free")


def test_damaged_state_dicts_are_refused_or_work():
    figures = state_dicts.run(count=150)
    assert figures["failed"] == 0, figures["failures"]
    assert {"refused", "loaded"} <= figures["outcomes"].keys()


@pytest.mark.processes
@pytest.mark.skipif(bool(sanitizers.reason()), reason=sanitizers.reason() or "there")
@pytest.mark.parametrize("kind", sanitizers.KINDS)
def test_kernels_under_a_sanitizer(kind):
    assert sanitizers.sanitized(kind, 0, 6) == ""


@pytest.mark.processes
@pytest.mark.skipif(bool(sanitizers.reason()), reason=sanitizers.reason() or "there")
@pytest.mark.parametrize(("kind", "found"), [("address", "heap-buffer-overflow"), ("thread", "data race")])
def test_a_sanitizer_sees_what_it_is_for(kind, found):
    """Two tensors of a list in one memory, which threads write to at a time; one that is shorter than the layout says."""
    size = 60_001 if kind == "address" else 60_000
    done = sanitizers.under(
        kind,
        f"from soak.sanitizers import backend_at; backend = backend_at({str(sanitizers.library(kind))!r})\n"
        "import torch; from gam_fused.backends import compiled, operands; compiled.check_lists = lambda *_: None\n"
        "from gam_fused.backends.tensor_lists import Layout, TensorList; t, s = torch.ones(60_000), torch.ones(60_001)\n"
        f"layout = Layout([{size}] * 2, [0] * 2, [True] * 2)\n"
        "backend.restore_(operands.Restore(layout=layout, theta=TensorList([t, t]), backup=TensorList([s, s])))",
    )
    assert done.returncode != 0
    assert found in done.stderr


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(soak.PARTS, "faults", (lambda seconds, seed: {"failed": seed, "failures": ["x"] * seed}, 1.0))
    common = ["--only", "faults", "--minutes", "0.01", "--out", str(tmp_path)]
    assert soak.main(common) == 0
    assert soak.main([*common, "--seed", "1"]) == 1
    assert "faults: FAILED" in capsys.readouterr().out
    assert json.loads((tmp_path / "soak.json").read_text())["parts"]["faults"]["failures"] == ["x"]
