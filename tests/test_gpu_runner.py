"""`make gpu` without a GPU: its stages, those that fail or hang, its record, and what the sanitizers watch."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from cases import Problem, assert_same_bits
from on_gpu import OnDevice
from test_kernels import KERNELS, reference

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.record import Record, Stage

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json"
PYTHON = [sys.executable, "-c"]


def test_every_stage_runs_what_is_there(tmp_path):
    for stage in gpu.stages("cuda", tmp_path / "figures.json"):
        if stage.command[1:2] == ["-m"]:
            module = ROOT / stage.command[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists() or module.name == "pytest"
    skipped = {stage.name for stage in gpu.stages("cpu", tmp_path / "figures.json") if stage.skip == gpu.NO_DEVICE}
    assert skipped == {"build", "tests", "memcheck", "racecheck", "tests of Triton"}


def test_the_record_has_stages_beside_the_figures(tmp_path, monkeypatch):
    """The benchmarks' stage here leaves what was recorded."""

    def stages(device, figures):
        copy = f"import shutil; shutil.copy({str(RECORDED)!r}, {str(figures)!r})"
        return [Stage("benchmarks", [*PYTHON, copy], 30, figures), Stage("build", [], 30, skip="no need")]

    monkeypatch.setattr(gpu, "stages", stages)
    monkeypatch.chdir(ROOT)  # and back
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    status = {name: entry["status"] for name, entry in record["stages"].items()}
    assert status == {"benchmarks": "passed", "build": "skipped: no need"}
    assert record["machine"]["torch"] == torch.__version__
    assert record["suites"] == json.loads(RECORDED.read_text())["suites"]
    assert (tmp_path / "rehearsal.md").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--out", str(tmp_path), "--stages", "another"])


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    record = Record(tmp_path / "record.json", {"gpu": "none"}, budget=200)
    left = tmp_path / "left.json"
    hang = f"import pathlib, time; pathlib.Path({str(left)!r}).write_text('{{\"suites\": {{}}}}'); time.sleep(600)"
    for stage in (
        Stage("fails", [*PYTHON, "raise SystemExit('why it failed')"], 30),
        Stage("hangs", [*PYTHON, hang], 3, left),
        Stage("leaves nothing", [*PYTHON, ""], 30, tmp_path / "missing.json"),
        Stage("is not there", ["/no/such/program"], 30),
        Stage("passes", [*PYTHON, "import os; assert os.environ['ADDED'] == '1'"], 30, environment={"ADDED": "1"}),
        Stage("is skipped", [], 30, skip="a reason"),
    ):
        record.run(stage)
    written = json.loads((tmp_path / "record.json").read_text())
    stages = written["stages"]
    assert "why it failed" in stages["fails"]["output"]
    assert stages["hangs"]["status"] == "failed: cut after 3 s"
    assert written["suites"] == {}, "what a stage that was cut has left"
    assert stages["passes"]["status"] == "passed"
    assert stages["is skipped"]["status"] == "skipped: a reason"
    assert record.failed == ["fails", "hangs", "leaves nothing", "is not there"]


def test_no_stage_begins_after_the_run_has_used_its_time(tmp_path):
    record = Record(tmp_path / "record.json", {}, budget=0)
    record.run(Stage("late", [*PYTHON, ""], 30))
    assert record.failed == ["late"]
    assert record.content["stages"]["late"]["status"] == "failed: no time left for it"


def test_every_kernel_for_the_sanitizers(monkeypatch, capsys):
    """The script that compute-sanitizer watches, in a backend that runs here."""
    script = str(ROOT / "tests" / "every_kernel.py")
    monkeypatch.setattr(sys, "argv", [script, "--backend", "torch", "--device", "cpu", "--kinds", "misaligned"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(script, run_name="__main__")
    assert "16 kernels, 1 kinds of shapes, 4 dtypes: done" in capsys.readouterr().out


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
