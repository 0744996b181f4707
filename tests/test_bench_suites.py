"""The benchmark suites: a tiny run of each, what a run leaves out, and that its counts are those of the design."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from gam_helpers import tables_are_rectangular

from benchmarks import __main__ as program
from benchmarks import bench_kernels, bench_optimizer, bench_training, clock, communication, suites
from benchmarks.bench_training import GAM, Job, Setting
from benchmarks.cases import Plan, blocks_of
from benchmarks.clock import Clock, backends_on
from benchmarks.contestants import AUTHORS, FOREACH, TORCH_FUSED, TRAFFIC, Implementation, parameters
from benchmarks.graphed import graphed
from benchmarks.kernels import KERNELS, Operands
from benchmarks.networks import batch, classifier, shapes
from benchmarks.plugin import NO_TIME, Suite
from benchmarks.suites import SUITES, read_lines, reduced, run_suite

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Plan(CPU, rehearse=True)


# A tiny run of every suite. One goes the whole way, the others are measured here, without pytest-benchmark around them.


def test_a_run_writes_figures_tables_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert program.main(["--rehearse", "--device", "cpu", "--suites", "scaling", "--out", str(tmp_path)]) == 0
    assert "Wrote" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    suite = record["suites"]["scaling"]
    assert (suite["left_out"], suite["failed"]) == ([], "")
    (cell,) = suite["cells"].values()
    assert len(cell) == 5
    for row in cell.values():
        assert 0 < row["ms_q20"] <= row["ms"] <= row["ms_q80"]
        assert row["runs"] == 2
        assert list(row["blocks"]) == ["0"]
    assert {"cpu", "torch", "commit", "date"} <= set(record["machine"])
    assert tables_are_rectangular(path.with_suffix(".md").read_text())
    assert path.with_name(f"{path.stem}-scaling.png").exists()


class Benchmark:
    """What a case asks of pytest-benchmark."""

    def __init__(self):
        self.extra_info, self.rounds = {}, 0

    def pedantic(self, run, args=(), setup=lambda: None, rounds=1, warmup_rounds=0):
        for _ in range(rounds):
            setup()
            run(*args)
        self.rounds = rounds


@pytest.fixture
def measured(monkeypatch) -> Callable[..., dict]:
    """A function that measures every contestant of a suite in the first of its cells: {contestant: facts}."""
    monkeypatch.setattr(clock, "FLUSHED", 1 << 10)

    def run(cases, bench) -> dict:
        facts = {}
        first = {case.contestant: case for case in reversed(cases(TINY))}
        for case in first.values():
            benchmark = Benchmark()
            bench(benchmark, case, TINY, Clock(CPU))
            assert benchmark.rounds == 2
            facts[case.contestant] = benchmark.extra_info
        return facts

    return run


def test_every_kernel_is_measured_in_every_backend(measured):
    facts = measured(bench_kernels.cases, bench_kernels.bench_kernel)
    for backend in backends_on(CPU):
        assert {name.removesuffix(f", {backend}") for name in facts if name.endswith(backend)} == set(KERNELS)
    assert facts["restore_, torch"]["operators"] > 0
    assert facts["restore_, torch"]["bytes"] == 2 * 20_000 * 4


def test_every_optimizer_is_measured(measured, monkeypatch):
    monkeypatch.setattr(bench_optimizer, "shapes", lambda name: ((64,),) * 5)
    monkeypatch.setattr(bench_optimizer, "launches", lambda run: {})  # slow to count, and the kernels count theirs
    facts = measured(bench_optimizer.cases, bench_optimizer.bench_step)
    by = {f["by"] for f in facts.values() if "by" in f}
    assert by == {AUTHORS, FOREACH, TORCH_FUSED, *backends_on(CPU)}
    assert {f["tensors"] for f in facts.values()} == {5}


def test_training_is_measured_and_takes_longer_than_its_passes(measured):
    facts = measured(bench_training.cases, bench_training.bench_training)
    assert set(facts) == set(bench_training.CONTESTANTS)
    for name, fact in facts.items():
        assert ("over_passes" in fact) is (name not in ("forward and backward", "GAM, exact"))
        assert all(ratio > 1 for ratio in fact.get("over_passes", []))
    peak = {name: fact["peak_bytes"] for name, fact in facts.items()}
    assert 0 < peak["base"] < peak["SAM"] < peak["GAM, finite_difference"] <= peak["GAM, accelerated"]


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


# Runs that are cut, and what contestants that fail leave to the others.

FAILING = """
import os, signal, time
from benchmarks.cases import blocks_of

def cases(plan):
    return blocks_of("cell", {"fails": 1 / 2, "lives": 1, "dies": signal.SIGKILL}, plan)

def bench_it(benchmark, case):
    benchmark.pedantic(lambda: os.kill(os.getpid(), case.what) if case.what != 1 else None, rounds=3)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A function that writes the suite "some" and runs it."""
    monkeypatch.setattr(suites, "HERE", tmp_path)
    monkeypatch.setitem(SUITES, "some", "wall")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(source: str, **options) -> dict:
        (tmp_path / "bench_some.py").write_text(source)
        return run_suite("some", rehearse=True, **options)

    return run


def test_a_suite_that_dies_leaves_what_it_has_measured(suite):
    result = suite(FAILING)
    assert result["failed"] == "pytest ended with status -9"
    assert set(result["cells"]["cell"]) == {"lives"}
    (line,) = result["left_out"]
    assert (line["contestant"], line["why"][:18]) == ("fails", "failed: TypeError:")
    assert result["machine"]["torch"] == torch.__version__


def test_no_case_begins_after_the_time_is_used(tmp_path):
    options = SimpleNamespace(rehearse=True, seconds=0, lines=tmp_path / "lines")
    with pytest.raises(pytest.skip.Exception, match=NO_TIME):
        Suite(SimpleNamespace(option=options), CPU).pytest_runtest_setup()


def test_a_suite_that_hangs_is_killed(suite):
    assert suite("import time; time.sleep(600)", seconds=1, grace=0)["failed"].startswith("killed")


def test_a_line_that_was_cut_is_left():
    assert read_lines('{"machine": {}}\n{"cell": "c", "contes') == [{"machine": {}}]


def test_blocks_measure_all_contestants_and_begin_with_another():
    cases = blocks_of("cell", {"a": 1, "b": 2}, Plan(CPU))
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


# What is measured is what it says.


def test_passes_of_a_step_are_counted(monkeypatch):
    job = Job(Setting("digits", 16, "fp32", "eager"), CPU)
    for name, (options, passes) in GAM.items():
        if name != "GAM, exact":
            step, seen, loss = job.step(name, options), [], job.loss
            monkeypatch.setattr(job, "loss", lambda x, y, seen=seen, loss=loss: (seen.append(len(x)), loss(x, y))[1])
            for _ in range(10):
                step()
            monkeypatch.undo()
            assert sum(seen) == pytest.approx(10 * 16 * passes), name


@pytest.mark.parametrize(
    ("network", "tensors", "elements"),
    [
        ("resnet50", 161, 25_557_032),
        ("vit_s_32", 200, 22_878_952),
        ("vit_b_32", 200, 88_224_232),
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
    assert torch.cuda.CUDAGraph.return_value.replay.called


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
def test_contestants_hold_no_more_memory_than_is_asked_for(step):
    elements = 1 << 20

    def run():
        prepare, go = step.on(parameters(((elements // 8,),) * 8))
        for _ in range(2):
            prepare()
            go()

    assert Clock(CPU).peak(run) / (4 * elements) < step.copies + 0.1
