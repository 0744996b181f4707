"""`make gpu` without a GPU: its stages, those that fail or hang, its record, and what the sanitizers watch."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Problem, assert_same_bits
from gam_helpers import tables_are_rectangular
from on_gpu import OnDevice
from test_kernels import KERNELS, reference

from benchmarks import clock
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import build, cosine, stages, training
from benchmarks.gpu.record import Record, Stage
from benchmarks.report import gpu as report

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json"
PYTHON = [sys.executable, "-c"]


def all_stages(device: str, folder: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages.stages(device, "machine", folder, stages.limits([*stages.LIMITS], 9.5))}


def test_every_stage_runs_what_is_there(tmp_path):
    found = all_stages("cuda", tmp_path)
    assert list(found) == list(stages.LIMITS)
    for stage in found.values():
        if stage.command[1:2] == ["-m"]:
            module = ROOT / stage.command[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists() or module.name == "pytest"
    skipped = {stage.name for stage in all_stages("cpu", tmp_path).values() if stage.skip() == stages.NO_DEVICE}
    assert skipped == {"build", "tests", "memcheck", "racecheck", "triton"}


def test_a_whole_run_fits_ten_minutes(tmp_path):
    found = all_stages("cuda", tmp_path)
    assert sum(stage.limit for stage in found.values()) <= 600
    assert stages.MINUTES <= 10


def test_stages_that_measure_end_by_themselves_before_they_are_cut(tmp_path):
    for name, stage in all_stages("cuda", tmp_path).items():
        given = dict(zip(stage.command[:-1], stage.command[1:], strict=True))
        seconds = float(given.get("--seconds", 0)) + 60 * float(given.get("--minutes", 0)) + float(given.get("--grace", 0))
        assert seconds + stages.START <= stage.limit + 1, name
        assert (seconds > 0) is (stage.figures is not None), name


def test_stages_that_are_asked_for_get_all_the_time_but_the_builds():
    given = stages.limits(["build", "kernels", "cosine"], 9.5)
    assert given["build"] == stages.LIMITS["build"]
    assert sum(given.values()) == pytest.approx(570)
    assert given["kernels"] / given["cosine"] == stages.LIMITS["kernels"] / stages.LIMITS["cosine"]


def test_sanitizers_say_that_the_build_has_failed(tmp_path, monkeypatch):
    """What does not need the CUDA backend runs."""
    monkeypatch.setattr(stages, "tool", lambda name: f"/{name}")
    monkeypatch.setattr(stages.build, "not_built", lambda backend: "it does not compile:\na.cu(3): error: x")
    skipped = {name: stage.skip() for name, stage in all_stages("cuda", tmp_path).items() if stage.skip()}
    assert set(skipped) == {"memcheck", "racecheck"}
    assert skipped["memcheck"].endswith("is not built: it does not compile:\na.cu(3): error: x")


def test_a_build_tells_what_it_has_not_built_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    builds = []

    def setup(command, cwd, env):
        assert "FORCE_CUDA" not in env, "that would leave no backend where one fails"
        builds.append(command)
        (tmp_path / "_cpu.abi3.so").touch()
        if len(builds) == 1:
            (tmp_path / "_cuda_not_built.txt").write_text("no CUDA toolkit\n")
        else:
            (tmp_path / "_cuda.abi3.so").touch()

    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "STAMP", tmp_path / "build" / "stamp")
    monkeypatch.setattr(build, "KERNELS", tmp_path)
    monkeypatch.setattr(build, "not_built", functools.partial(build.not_built, package=tmp_path))
    monkeypatch.setattr(build.subprocess, "run", setup)
    assert build.main() == 1
    assert "The CUDA backend is not built: no CUDA toolkit" in capsys.readouterr().out
    assert [build.main(), build.main(), len(builds)] == [0, 0, 2]
    monkeypatch.setattr(build, "key", lambda: "other sources")
    assert [build.main(), len(builds)] == [0, 3]


def test_the_record_has_stages_beside_the_figures(tmp_path, monkeypatch):
    """Two stages leave suites here; one of them is what was recorded."""
    recorded = json.loads(RECORDED.read_text())["suites"]
    for name in ("kernels", "training"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"suites": {name: recorded[name]}}))

    def some(device, machine, folder, seconds):
        named = [Stage(name, [*PYTHON, ""], 30, tmp_path / f"{name}.json") for name in ("kernels", "training")]
        return [*named, Stage("build", [], 30, skip=lambda: "no need")]

    monkeypatch.setattr(gpu, "stages", some)
    monkeypatch.chdir(ROOT)  # and back
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    status = {name: entry["status"] for name, entry in record["stages"].items()}
    assert status == {"kernels": "passed", "training": "passed", "build": "skipped: no need"}
    assert record["machine"]["torch"] == torch.__version__
    assert record["suites"] == {name: recorded[name] for name in ("kernels", "training")}
    assert (tmp_path / "rehearsal.md").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--out", str(tmp_path), "--only", "another"])


@pytest.mark.processes
def test_the_rehearsal_runs_every_stage_that_measures(tmp_path, monkeypatch):
    """For real, at tiny sizes; with more time than `make gpu` has, since this asserts none."""
    monkeypatch.chdir(ROOT)
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    assert set(record["suites"]) == {"kernels", "optimizer", "training"}
    for suite in record["suites"].values():
        assert suite["cells"]
        assert not suite["failed"]
        assert not suite["left_out"]
    rows = record["cosine"]["rows"]
    assert {row["precision"] for row in rows} == set(cosine.PRECISIONS)
    assert {row["rho_prime"] for row in rows} == set(cosine.RHO_PRIMES)
    assert min(row["cosine"] for row in rows if row["precision"] == "float32" and row["rho_prime"] == 0.1) > 0.9
    runs = [(run["task"], run["contender"]) for run in record["trained"]]
    assert runs == [(task, contender) for task in training.TINY for contender in training.CONTENDERS]
    text = (tmp_path / "rehearsal.md").read_text()
    assert tables_are_rectangular(text)
    assert "## The finite difference and the exact product" in text
    assert "## Networks trained to the end" in text


def test_the_gpu_of_a_record_is_told():
    machine = {"gpu": "A GPU", "multiprocessors": 7, "L2_MiB": 5.0, "driver": "1.2", "cuda": "13.0"}
    assert report.device(machine) == ["A GPU: 7 multiprocessors, 5.0 MiB of L2, driver 1.2, CUDA 13.0."]
    assert report.device({"cpu": "a processor"}) == []


def test_time_that_a_stage_has_left_goes_to_those_after_it(tmp_path):
    """The second sleeps for longer than its limit, which the first has not used."""
    record = Record(tmp_path / "record.json", {}, budget=300)
    record.run(Stage("short", [*PYTHON, ""], 299), later=1)
    record.run(Stage("long", [*PYTHON, "import time; time.sleep(2)"], 1), later=0)
    assert record.failed == []


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
        Stage("is skipped", [], 30, skip=lambda: "a reason"),
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
    """The script that compute-sanitizer watches, in a backend that runs here: a few hundred tensors, as each takes long."""
    copies = []
    copy = OnDevice._copy
    monkeypatch.setattr(OnDevice, "_copy", lambda self, t: copies.append(t) or copy(self, t))
    script = str(ROOT / "tests" / "every_kernel.py")
    monkeypatch.setattr(sys, "argv", [script, "--backend", "torch", "--device", "cpu"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    turns = [*runpy.run_path(script, run_name="__main__")["turns"]()]
    assert "16 kernels, 4 dtypes: done" in capsys.readouterr().out
    assert {(name, dtype) for name, dtype, _, _ in turns} == {(name, dtype) for name in KERNELS for dtype in DTYPES}
    assert {lasting for *_, lasting in turns} == {False, True}
    assert len({kind for *_, kind, _ in turns}) == 5
    assert len(copies) < 1000


def test_caches_are_flushed_by_reading(monkeypatch):
    monkeypatch.setattr(clock, "FLUSHED", 1 << 10)
    here = clock.Clock(torch.device("cpu"))
    version = here._flush._version
    here.flush_caches()
    assert here._flush._version == version, "written to"
    assert here._sum == here._flush.numel(), "all of it is read"


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
