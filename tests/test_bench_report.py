"""Ratios, shares and comparisons of made-up rows with known answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gam_helpers import tables_are_rectangular

from benchmarks.kernels import KERNELS
from benchmarks.report import figures, tables, write
from benchmarks.report.compare import changes, main, text
from benchmarks.report.ratios import beyond_passes, ms_per_step, ratio, share_of_yardstick

RECORDED = Path(__file__).parents[1] / "benchmarks" / "results" / "amd-epyc-2-cores.json"


def row(*blocks: float, **facts) -> dict:
    ordered = sorted(blocks)
    quantiles = {"ms_q20": ordered[0], "ms": ordered[len(ordered) // 2], "ms_q80": ordered[-1], "runs": len(blocks)}
    return quantiles | {"blocks": {str(number): ms for number, ms in enumerate(blocks)}} | facts


def test_ratios_are_taken_within_blocks():
    """The machine was twice as slow in the second block: the ratio is not."""
    assert ratio(row(4.0, 8.0), row(2.0, 4.0)) == (2.0, 2.0, 2.0)
    assert ratio(row(2.0, 6.0, 4.0), row(1.0, 2.0, 1.0)) == (3.0, 2.0, 4.0)
    assert ratio(row(1.0), {"blocks": {}}) is None


def test_the_spread_of_one_block_is_that_of_its_quantiles():
    one, two = row(2.0) | {"ms_q20": 1.8, "ms_q80": 2.2}, row(1.0) | {"ms_q20": 0.9, "ms_q80": 1.1}
    assert ratio(one, two) == pytest.approx((2.0, 1.8 / 1.1, 2.2 / 0.9))
    assert ratio(one, one) == (1.0, 1.0, 1.0)


def test_windows_count_by_the_step():
    window = row(26.0, steps=10)
    assert ms_per_step(window) == (2.6, 2.6, 2.6)
    assert ratio(window, row(2.0)) == pytest.approx((1.3, 1.3, 1.3))


def test_what_is_beyond_the_passes_is_told_within_steps():
    assert beyond_passes(row(8.4, over_passes=[1.05, 1.0, 1.2])) == (1.05, 1.0, 1.2)
    assert beyond_passes(row(8.4)) is None


def test_shares_of_the_yardstick():
    triad = row(3.0, elements=10**6)
    step = {"method": "finite_difference", "base": "SGD", "by": "cpp", "elements": 10**6}
    assert share_of_yardstick(row(24.0, **step | {"elements": 1000}), triad) is None
    assert share_of_yardstick(row(24.0, **step), triad).value == pytest.approx(1.0)
    assert share_of_yardstick(row(26.0, **step | {"base": "AdamW"}), triad).value == pytest.approx(1.0)
    assert share_of_yardstick(row(24.0, **step | {"by": "torch._foreach"}), triad) is None
    assert share_of_yardstick(row(2.0, bytes=400), row(1.0, bytes=800)).value == pytest.approx(0.25)


def run_of(**cells: dict) -> dict:
    machine = {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.13", "python": "3.11", "commit": "0", "date": ""}
    return {"machine": machine, "suites": {"optimizer": {"cells": cells, "left_out": [], "failed": ""}}}


BEFORE = {"triad": row(1.0, 1.02, 0.98), "ours": row(4.0, 4.08, 3.92), "theirs": row(9.0, 11.0, 10.0)}


@pytest.mark.parametrize(
    ("after", "moved"),
    [
        (BEFORE, []),
        (BEFORE | {"ours": row(4.8, 4.9, 4.7)}, ["ours"]),
        (BEFORE | {"ours": row(3.2, 3.26, 3.14)}, ["ours"]),
        (BEFORE | {"theirs": row(11.0, 11.0, 11.0)}, []),  # within its noise
        ({name: row(*(2 * ms for ms in r["blocks"].values())) for name, r in BEFORE.items()}, ["triad"]),  # the machine
    ],
)
def test_figures_that_moved_beyond_the_noise(after, moved):
    runs = run_of(cell=BEFORE), run_of(cell=after)
    found = list(changes(*runs))
    assert len(found) == 3
    assert [change.key[-1] for change in found if change.moved] == moved
    assert text(*runs).startswith(f"{len(moved)} of 3 times moved")


def test_nothing_is_compared_with_another_yardstick():
    without = {name: r for name, r in BEFORE.items() if name != "triad"}
    said = text(run_of(cell=BEFORE), run_of(cell=without, other=BEFORE))
    assert said.startswith("0 of 0 times moved")
    assert "gone: optimizer: cell: triad" in said
    assert "new: optimizer: other" in said


def test_counts_and_machines_that_differ_are_named():
    before, after = (
        run_of(cell={"ours": row(1.0, kernels=kernels, peak_bytes=peak), "theirs": row(1.0, peak_bytes=2 * peak - 1000)})
        for kernels, peak in ((8, 1000), (9, 1005))
    )
    after["machine"]["torch"] = "2.14"
    for record, sent in ((before, 400), (after, 100)):
        record["communication"] = {"2 processes": {"GAM": {"bytes": sent, "ms": 1.0}}}
    said = text(before, after)
    assert "optimizer: cell: ours: kernels 8 -> 9" in said
    assert "peak bytes" not in said.replace("theirs: peak bytes 1000 -> 1010", "")
    assert "communication: 2 processes: GAM: bytes 400 -> 100" in said
    assert "Not the same torch: 2.13 and 2.14." in said


def test_comparison_on_the_command_line(tmp_path, capsys):
    slower = run_of(cell=BEFORE | {"ours": row(4.8, 4.9, 4.7)})
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, record in zip(paths, (run_of(cell=BEFORE), slower), strict=True):
        path.write_text(json.dumps(record))
    main([*map(str, paths)])
    assert "optimizer: cell: ours: takes 1.20 times as long" in capsys.readouterr().out


def test_a_record_has_not_moved_from_itself_and_has_every_table_and_picture(tmp_path):
    record = json.loads(RECORDED.read_text())
    assert text(record, record).startswith("0 of ")
    assert text(record, record).count("\n") == 0
    write(record, tmp_path / "recorded.json")
    document = (tmp_path / "recorded.md").read_text()
    for heading in ("Training steps", "The optimizer alone", "Kernels", "Scaling", "Communication", "Left out"):
        assert f"## {heading}" in document
    assert tables_are_rectangular(document)
    recorded = RECORDED.with_suffix(".md").read_text()  # it has times of communication too, which are not measured any more
    assert document.split("## Communication")[0] == recorded.split("## Communication")[0]
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {f"recorded-{name}.png" for name in ("overhead", "roofline", "scaling")}


def test_the_report_of_a_run_that_was_cut():
    """Of contestants some blocks or the base may be missing."""
    record = run_of(**{"resnet50, SGD": BEFORE})
    left = {"contestant": "ours", "why": "no time left for it"}
    record["suites"]["optimizer"] |= {"failed": "killed: why", "left_out": [left | {"cell": "tiny, SGD", "block": 0}]}
    record["suites"]["optimizer"]["left_out"].append(left | {"cell": "resnet50, SGD", "block": 2})
    facts = {"images": 8, "passes": 4, "steps": 1}
    cell = {
        "forward and backward": row(1.0, **facts),
        "base": row(1.0, **facts),
        "SAM": {**row(2.0, **facts), "blocks": {"7": 2.0}},
    }
    record["suites"]["training"] = {"cells": {"a": cell, "b": {"SAM": row(2.0, **facts)}}, "left_out": [], "failed": ""}
    record["communication"] = {"4 processes": {"failed": "not done after 60 s"}}
    document = tables.document(record)
    assert tables_are_rectangular(document)
    assert "- optimizer: killed: why\n- optimizer: tiny, SGD: no time left for it" in document
    assert "- optimizer: resnet50, SGD, block 3: ours: no time left for it" in document
    assert "failed: not done after 60 s" in document
    assert "4 (3.92 .. 4.08)" in document
    assert figures.overhead({name: suite["cells"] for name, suite in record["suites"].items()}) is not None


def test_the_report_of_a_gpu(tmp_path):
    facts = {"flops": 50, "bytes": 100, "kernels": 1, "copies": 0, "host_ms": 0.02, "elements": 25 * 10**6}
    kernels = {
        f"{v}, {backend}": row(1.0, kernel=v, backend=backend, **facts) for backend in ("cuda", "triton") for v in KERNELS
    }
    record = run_of()
    record["machine"]["gpu"] = "a GPU"
    cell = {"yardstick": row(1.0, bytes=100, elements=25 * 10**6), **kernels}
    suite = {"cells": {"25000000 elements in 16 tensors, float32, cuda, triton": cell}, "left_out": [], "failed": ""}
    record["suites"] = {"kernels": suite}
    write(record, tmp_path / "a-gpu.json")
    assert {p.name for p in tmp_path.iterdir()} == {"a-gpu.json", "a-gpu.md", "a-gpu-roofline.png"}
    document = (tmp_path / "a-gpu.md").read_text()
    assert tables_are_rectangular(document)
    assert "| kernels | copies | host ms |" in document
    assert "| 1 | 0 | 0.020 |" in document
