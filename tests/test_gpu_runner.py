"""`make gpu` without a GPU: the rehearsal's record, stages that fail or hang, pytest's outcomes, the build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Problem, assert_same_bits
from on_gpu import OnDevice
from test_kernels import KERNELS, reference

from benchmarks.gpu import pytest_report
from benchmarks.gpu.__main__ import NO_DEVICE, stages
from benchmarks.gpu.record import Record, Stage, read_json

ROOT = Path(__file__).parents[1]
SUITES = ("kernels", "optimizer", "training")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name for path in folder.iterdir()}
    assert {"gpu-rehearsal.json", "gpu-rehearsal-report.json", "gpu-rehearsal-report.md"} < written
    return read_json(folder / "gpu-rehearsal.json")


def test_every_stage_is_there_and_says_why_it_did_not_run(rehearsal):
    status = {name: entry["status"] for name, entry in rehearsal["stages"].items()}
    needs_gpu = dict.fromkeys(("build", "tests", "memcheck", "racecheck"), f"skipped: {NO_DEVICE}")
    assert status == needs_gpu | dict.fromkeys(("self-check", *SUITES), "passed")
    assert {"cpu", "gpu", "torch", "triton", "cuda", "commit"} <= set(rehearsal["machine"])


@pytest.mark.parametrize("suite", SUITES)
def test_figures_of_the_suites(rehearsal, suite):
    figures = rehearsal["stages"][suite]["figures"]
    assert figures["cells"]
    assert not figures["left_out"]


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    record = Record(tmp_path / "record.json", {"gpu": "none"}, budget=200)
    python = [sys.executable, "-c"]
    left = tmp_path / "left.json"
    hang = f"import pathlib, time; pathlib.Path({str(left)!r}).write_text('[1]'); time.sleep(600)"
    for stage in (
        Stage("fails", [*python, "raise SystemExit('why it failed')"], 30),
        Stage("hangs", [*python, hang], 8, lambda: read_json(left)),
        Stage("leaves nothing", [*python, ""], 30, lambda: read_json(tmp_path / "missing.json")),
        Stage("is not there", ["/no/such/program"], 30),
        Stage("passes", [*python, "import os; assert os.environ['ADDED'] == '1'"], 30, environment={"ADDED": "1"}),
        Stage("is skipped", [], 30, skip="a reason"),
    ):
        record.run(stage)
    written = json.loads((tmp_path / "record.json").read_text())["stages"]
    assert "why it failed" in written["fails"]["output"]
    assert written["hangs"]["status"] == "failed: cut after 8 s"
    assert written["hangs"]["figures"] == [1]
    assert written["passes"]["status"] == "passed"
    assert written["is skipped"]["status"] == "skipped: a reason"
    assert record.failed == ["fails", "hangs", "leaves nothing", "is not there"]


def test_a_suite_is_told_to_end_before_it_is_killed(tmp_path):
    record = Record(tmp_path / "record.json", {}, budget=100)
    told = [sys.executable, "-c", "import sys; print(*sys.argv[1:]); sys.exit(1)"]
    record.run(Stage("told", told, 50, told=True))
    assert record.content["stages"]["told"]["output"] == "--seconds=10 --grace=30\n"


def test_no_stage_begins_after_the_run_has_used_its_time(tmp_path):
    record = Record(tmp_path / "record.json", {}, budget=0)
    record.run(Stage("late", [sys.executable, "-c", ""], 30))
    assert record.failed == ["late"]
    assert record.content["stages"]["late"]["status"] == "failed: no time left for it"


def test_outcomes_of_pytest(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no such device')\n"
        "def test_absent(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module_at_all\n")
    outcomes = tmp_path / "outcomes.jsonl"
    stage = next(s for s in stages("cuda", tmp_path) if s.name == "tests")
    assert stage.command[1:3] == ["-m", "pytest"]
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.pytest_report", "--continue-on-collection-errors"]
    environment = os.environ | {pytest_report.REPORT: str(outcomes), "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--rootdir", str(tmp_path), str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True)
    with outcomes.open("a") as file:
        file.write('{"test": "cut in the mid')
    found = pytest_report.summary(outcomes)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert "one is not two" in found["failures"]["test_some.py::test_bad"]
    assert "no_such_module_at_all" in found["failures"]["test_broken.py"]
    assert found["skips"] == {"Skipped: no such device": ["test_some.py::test_absent"]}


def test_every_kernel_for_the_sanitizers():
    """The script that compute-sanitizer watches, in a backend that runs here."""
    command = [sys.executable, "tests/every_kernel.py", "--backend", "torch", "--device", "cpu", "--kinds", "misaligned"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16 kernels, 1 kinds of shapes, 4 dtypes: done" in done.stdout


@pytest.mark.parametrize("kind", ["misaligned", "transposed", "channels_last", "empty tensors", "0-dim"])
def test_operands_go_to_the_device_as_they_lie_in_memory(kind, monkeypatch):
    """How the GPU tests move operands, with the CPU as the device."""
    moved = []
    there = OnDevice("reference", torch.device("cpu"))
    copy = there._copy
    monkeypatch.setattr(there, "_copy", lambda t: moved.append((t, copy(t))) or moved[-1][1])
    for run in KERNELS.values():
        direct = run(reference, Problem(kind, torch.float32, torch.float32))
        assert_same_bits(run(there, Problem(kind, torch.float32, torch.float32)), direct)
    for here, gone in moved:
        assert gone.data_ptr() != here.data_ptr() or not here.numel()
        assert gone.stride() == here.stride()
        assert gone.data_ptr() % 16 == here.data_ptr() % 16 or not here.numel()
