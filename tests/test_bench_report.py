"""Ratios, shares and comparisons of made-up rows with known answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gam_helpers import tables_are_rectangular

from benchmarks.report import tables
from benchmarks.report.compare import changes, text
from benchmarks.report.ratios import beyond_passes, ms_per_step, ratio, share_of_yardstick


def row(*blocks: float, **facts) -> dict:
    ordered = sorted(blocks)
    quantiles = {"ms_q20": ordered[0], "ms": ordered[len(ordered) // 2], "ms_q80": ordered[-1], "runs": len(blocks)}
    return quantiles | {"blocks": {str(number): ms for number, ms in enumerate(blocks)}} | facts


def test_ratios_are_taken_within_blocks():
    """The machine was twice as slow in the second block: the ratio is not."""
    assert ratio(row(4.0, 8.0), row(2.0, 4.0)) == (2.0, 2.0, 2.0)
    assert ratio(row(2.0, 6.0, 4.0), row(1.0, 2.0, 1.0)) == (3.0, 2.0, 4.0)
    assert ratio(row(1.0), {"blocks": {}}) is None


def test_windows_count_by_the_step():
    window = row(26.0, steps=10, passes=1.3)
    assert ms_per_step(window) == (2.6, 2.6, 2.6)
    assert beyond_passes(window, row(2.0)).value == pytest.approx(1.0)
    assert beyond_passes(row(8.4, passes=4), row(2.0)).value == pytest.approx(1.05)
    assert beyond_passes(row(8.4, passes=None), row(2.0)) is None


def test_shares_of_the_yardstick():
    triad = row(3.0, elements=100)
    step = {"method": "finite_difference", "base": "SGD", "by": "cpp", "elements": 100}
    assert share_of_yardstick(row(24.0, **step), triad).value == pytest.approx(1.0)
    assert share_of_yardstick(row(26.0, **step | {"base": "AdamW"}), triad).value == pytest.approx(1.0)
    assert share_of_yardstick(row(24.0, **step | {"by": "torch._foreach"}), triad) is None
    assert share_of_yardstick(row(2.0, bytes=400), row(1.0, bytes=800)).value == pytest.approx(0.25)


def run_of(**cells: dict) -> dict:
    machine = {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.13", "python": "3.11", "commit": "0", "date": ""}
    return {"machine": machine, "suites": {"optimizer": {"cells": cells, "left_out": {}}}}


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
    found = list(changes(run_of(cell=BEFORE), run_of(cell=after, other=BEFORE)))
    assert len(found) == 3
    assert [change.contestant for change in found if change.moved] == moved
    assert text(found).startswith(f"{len(moved)} of 3 figures moved")


def test_comparison_on_the_command_line(tmp_path):
    slower = run_of(cell=BEFORE | {"ours": row(4.8, 4.9, 4.7)})
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, record in zip(paths, (run_of(cell=BEFORE), slower), strict=True):
        path.write_text(json.dumps(record))
    command = [sys.executable, "-m", "benchmarks.report.compare", *map(str, paths)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "optimizer: cell: ours: 20 % slower" in done.stdout


def test_tables_have_one_width_and_name_what_was_left_out():
    record = run_of(**{"resnet50, SGD": BEFORE})
    record["suites"]["optimizer"]["left_out"] = {"tiny, SGD": {"ours": "no time left for it"}}
    document = tables.document(record)
    assert tables_are_rectangular(document)
    assert "- optimizer: tiny, SGD: no time left for it" in document
    assert "4 (3.92 .. 4.08)" in document
