"""The benchmark suite: that all of it runs, what it leaves out, and that its counts are those of the design."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from gam_helpers import tables_are_rectangular

from benchmarks import communication, suites
from benchmarks.bench_training import GAM, Job, Setting
from benchmarks.cases import Plan, blocks_of
from benchmarks.clock import Clock, backends_on
from benchmarks.contestants import AUTHORS, FOREACH, TORCH_FUSED, TRAFFIC, Implementation, parameters
from benchmarks.graphed import graphed
from benchmarks.kernels import KERNELS, Operands
from benchmarks.networks import BUILDERS, batch, classifier, shapes
from benchmarks.plugin import NO_TIME
from benchmarks.suites import SUITES, read_lines, reduced, run_suite

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks", "--rehearse", "--device", "cpu", "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images/s" in done.stdout
    return folder


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_every_suite_measures_every_contestant(rehearsal):
    record = record_of(rehearsal)
    assert set(record["suites"]) == set(SUITES)
    for suite in record["suites"].values():
        assert suite["cells"]
        assert not suite["left_out"]
        assert not suite["failed"]
        for cell in suite["cells"].values():
            for row in cell.values():
                assert 0 < row["ms_q20"] <= row["ms"] <= row["ms_q80"]
                assert row["runs"] == 2
                assert list(row["blocks"]) == ["0"]
    assert {"cpu", "torch", "commit", "date"} <= set(record["machine"])


def test_the_report_has_every_table_and_picture(rehearsal):
    (path,) = rehearsal.glob("*.md")
    text = path.read_text()
    for heading in ("Training steps", "The optimizer alone", "Kernels", "Scaling", "Communication"):
        assert f"## {heading}" in text
    assert tables_are_rectangular(text)
    names = {p.name.removeprefix(path.stem) for p in rehearsal.glob("*.png")}
    assert names == {"-overhead.png", "-roofline.png", "-scaling.png"}


def test_contestants_that_hold_more_hold_more_memory(rehearsal):
    (cell,) = record_of(rehearsal)["suites"]["training"]["cells"].values()
    peak = {name: row["peak_bytes"] for name, row in cell.items()}
    assert 0 < peak["base"] < peak["SAM"] < peak["GAM, finite_difference"] < peak["GAM, accelerated"]


def test_steps_take_longer_than_the_passes_in_them(rehearsal):
    (cell,) = record_of(rehearsal)["suites"]["training"]["cells"].values()
    for name, row in cell.items():
        assert ("over_passes" in row) is (name not in ("forward and backward", "GAM, exact"))
        assert all(ratio > 1 for ratio in row.get("over_passes", []))


def test_passes_of_a_step_are_counted():
    job = Job(Setting("digits", 8, "fp32", "eager"), CPU)
    for name, (options, passes) in GAM.items():
        if name != "GAM, exact":
            step, job.passes = job.step(name, options), []
            for _ in range(10):
                step()
            assert len(job.passes) == pytest.approx(10 * passes), name
            job.passes = None


def test_what_there_is_no_time_for_is_named():
    result = run_suite("scaling", seconds=0, rehearse=True)
    assert result["cells"] == {}
    assert len(result["left_out"]) == 5
    assert {line["why"] for line in result["left_out"]} == {NO_TIME}


DYING = """
import os, signal, time
from benchmarks.bench_training import GAM, Job, Setting
from benchmarks.cases import blocks_of

def cases(plan):
    return blocks_of("cell", {"lives": 0, "dies": signal.SIGKILL}, plan)

def bench_it(benchmark, case):
    benchmark.pedantic(lambda: case.what and os.kill(os.getpid(), case.what), rounds=3)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A function that writes the suite "some" and runs it."""
    monkeypatch.setattr(suites, "HERE", tmp_path)
    monkeypatch.setitem(SUITES, "some", "wall")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(source: str, **options) -> dict:
        (tmp_path / "bench_some.py").write_text(source)
        return run_suite("some", blocks=1, **options)

    return run


def test_a_suite_that_dies_leaves_what_it_has_measured(suite):
    result = suite(DYING)
    assert result["failed"] == "pytest ended with status -9"
    assert set(result["cells"]["cell"]) == {"lives"}
    assert result["machine"]["torch"] == torch.__version__


def test_a_suite_that_hangs_is_killed(suite):
    result = suite(DYING.replace("os.kill(os.getpid(), case.what)", "time.sleep(600)"), seconds=1, grace=1)
    assert result["failed"].startswith("killed")


def test_a_contestant_that_fails_is_named_and_the_others_go_on(suite):
    result = suite(
        DYING.replace("os.kill(os.getpid(), case.what)", "1 / 0").replace('"lives": 0, ', '"fails": 1, "lives": 0, ')
    )
    (line,) = (line for line in result["left_out"] if line["contestant"] == "fails")
    assert line["why"] == "failed: ZeroDivisionError: division by zero"
    assert set(result["cells"]["cell"]) == {"lives"}


def test_a_line_that_was_cut_is_left():
    assert read_lines('{"machine": {}}\n{"cell": "c", "contes') == [{"machine": {}}]


def test_blocks_measure_all_contestants_and_begin_with_another():
    cases = blocks_of("cell", {"a": 1, "b": 2}, Plan(CPU, blocks=3))
    order = ["cell | a | 0", "cell | b | 0", "cell | b | 1", "cell | a | 1", "cell | a | 2", "cell | b | 2"]
    assert [str(case) for case in cases] == order


def test_reduction_keeps_blocks_apart_and_facts_of_the_first():
    def line(block, seconds, **facts):
        return {"cell": "c", "contestant": "x", "block": block, "seconds": seconds, "facts": facts}

    within = [line(0, [1.0], over_passes=[1.0, 1.1]), line(1, [1.0], over_passes=[1.4])]
    assert reduced(within)["cells"]["c"]["x"]["over_passes"] == pytest.approx([1.1, 1.04, 1.28])
    late = {"cell": "c", "contestant": "x", "block": 2, "why": NO_TIME}
    lines = [line(0, [1.0, 2.0, 3.0], kernels=8, host_ms=1.0), line(1, [5.0, 5.0, 5.0], kernels=9, host_ms=3.0), late]
    result = reduced([{"machine": {"cpu": "one"}}, *lines])
    row = result["cells"]["c"]["x"]
    assert row["blocks"] == {"0": 2000.0, "1": 5000.0}
    assert (row["ms"], row["runs"], row["kernels"], row["host_ms"]) == (4000.0, 6, 8, 2.0)
    assert (row["ms_q20"], row["ms_q80"]) == (2000.0, 5000.0)
    assert (result["machine"], result["left_out"]) == ({"cpu": "one"}, [late])


@pytest.mark.parametrize(
    ("network", "tensors", "elements"),
    [
        ("resnet18", 62, 11_689_512),
        ("resnet50", 161, 25_557_032),
        ("vit_s_32", 200, 22_878_952),
        ("vit_b_32", 200, 88_224_232),
        ("swin_t", 221, 28_288_354),
        ("efficientnet_b0", 213, 5_288_548),
        ("transformer_1b", 146, 1_235_814_400),
    ],
)
def test_networks_are_the_published_ones(network, tensors, elements):
    sizes = shapes(network)
    assert (len(sizes), sum(torch.Size(s).numel() for s in sizes)) == (tensors, elements)


def test_resnet18_for_small_images_keeps_their_size():
    model = classifier("resnet18_cifar", CPU).eval()
    images, labels = batch("resnet18_cifar", 2, CPU)
    assert model(images).shape == (2, 100)
    assert model.model.resnet.embedder(images).shape == (2, 64, 32, 32)
    assert labels.shape == (2,)
    assert set(BUILDERS) > {"resnet18_cifar"}


@pytest.mark.parametrize(
    ("kernel", "traffic"),
    [
        ("squared_norm", 1),
        ("direction_products", 3),
        ("perturb_, first", 4),
        ("perturb_, second", 4),
        ("perturb_, third", 5),
        ("combined_update_, SGD, finite_difference", 6),
        ("combined_update_, SGD, accelerated", 7),
        ("combine_", 3),
        ("restore_", 2),
    ],
)
def test_bytes_of_kernels_are_those_of_the_design(kernel, traffic):
    operands = Operands(1600, 16, torch.float32, CPU)
    assert operands.moved(KERNELS[kernel]) == traffic * 4 * 1600


@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        ("finite_difference", ("perturb_, third", "squared_norm", "combined_update_, SGD, finite_difference")),
        ("accelerated", ("perturb_, third", "direction_products", "combined_update_, SGD, accelerated")),
    ],
)
def test_traffic_of_steps_is_that_of_their_kernels(method, kernels):
    begin = ("squared_norm", "perturb_, first", "squared_norm of a difference", "perturb_, second", "squared_norm")
    operands = Operands(1600, 16, torch.float32, CPU)
    assert sum(operands.moved(KERNELS[kernel]) for kernel in (*begin, *kernels)) == TRAFFIC[method] * 4 * 1600


def test_a_graph_keeps_what_it_was_captured_from(monkeypatch):
    """The state of an optimizer that a graph writes to must not be freed before the graph."""
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    class Run:
        def __call__(self):
            pass

    run = Run()
    gone = weakref.ref(run)
    replay = graphed(run)
    del run
    assert gone() is not None
    replay()


def test_peak_memory_is_what_is_held_at_a_time():
    def run():
        a = torch.ones(1 << 20)
        del a
        return torch.ones(1 << 20) + torch.ones(1 << 20)

    assert Clock(CPU).peak(run) == pytest.approx(3 * 4 << 20, rel=0.01)


METHODS = ("base", "sam", "finite_difference", "accelerated")
STEPS = [
    Implementation("AdamW", method, by)
    for method in METHODS
    for by in ((TORCH_FUSED,) if method == "base" else (AUTHORS, FOREACH, *backends_on(CPU)))
    if (method, by) != ("finite_difference", AUTHORS)  # the authors published no code for it
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_contestants_hold_as_much_memory_as_is_asked_for(step):
    elements = 1 << 20

    def run():
        prepare, go = step.on(parameters(((elements // 8,),) * 8))
        for _ in range(2):
            prepare()
            go()

    assert step.copies - 1 < Clock(CPU).peak(run) / (4 * elements) < step.copies + 0.1


def test_all_reduces_are_those_of_the_design():
    (rows,) = communication.measure("digits", (2,)).values()
    assert "failed" not in rows
    model = 4 * rows["SGD"]["parameters"]
    assert (rows["SGD"]["all_reduces"], rows["SGD"]["bytes"]) == (1, model)
    assert (rows["SAM, global"]["all_reduces"], rows["SAM, global"]["bytes"]) == (2, 2 * model)
    assert (rows["GAM, global"]["all_reduces"], rows["GAM, global"]["bytes"]) == (4, 4 * model)
    for name in ("SAM, local", "GAM, local"):  # one for the direction, with a few flags and its alignment
        assert rows[name]["all_reduces"] == 1
        assert model < rows[name]["bytes"] < model + 1024


def test_processes_that_do_not_end_are_told():
    (rows,) = communication.measure("digits", (1,), limit=0).values()
    assert rows == {"failed": "not done after 0 s"}
