"""Which figures moved between two runs on a machine, beyond their noise.

    python -m benchmarks.report.compare before.json after.json

A figure is a contestant's time over that of the first contestant of its cell (the yardstick) in the same block, so that a
machine that was slower as a whole moves nothing but the yardsticks, which are judged by their times. Its noise in a run is
the greatest block over the least, or where a run has one block its 80 % over its 20 % quantile. It moved if its median
changed by more than the noise of the two runs together, and by more than 3 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.ratios import Cell, Row

LEAST = math.log(1.03)


class Change(NamedTuple):
    """A figure in two runs: `factor` is after / before, `noise` the factor that noise explains."""

    suite: str
    cell: str
    contestant: str
    factor: float
    noise: float

    @property
    def moved(self) -> bool:
        return abs(math.log(self.factor)) > max(math.log(self.noise), LEAST)


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Every figure that both runs measured."""
    for suite in before["suites"].keys() & after["suites"].keys():
        cells, later = before["suites"][suite]["cells"], after["suites"][suite]["cells"]
        for cell in cells.keys() & later.keys():
            for contestant in cells[cell]:
                if contestant in later[cell]:
                    (old, old_noise), (new, new_noise) = _figure(cells[cell], contestant), _figure(later[cell], contestant)
                    if old and new:
                        yield Change(suite, cell, contestant, new / old, old_noise * new_noise)


def _figure(cell: Cell, contestant: str) -> tuple[float, float]:
    """The median over blocks and its noise; 0 where the yardstick has no block in common with it."""
    yardstick, row = next(iter(cell)), cell[contestant]
    divisors: Row = {} if contestant == yardstick else cell[yardstick]["blocks"]
    values = [ms / divisors.get(block, 1.0) for block, ms in row["blocks"].items() if not divisors or block in divisors]
    if not values:
        return 0.0, 1.0
    noise = max(values) / min(values) if len(values) > 1 else row["ms_q80"] / row["ms_q20"]
    return statistics.median(values), noise


def text(found: list[Change]) -> str:
    """The figures that moved, the greatest changes first."""
    moved = sorted((c for c in found if c.moved), key=lambda c: -abs(math.log(c.factor)))
    lines = [f"{len(moved)} of {len(found)} figures moved beyond the noise."]
    for c in moved:
        way = "slower" if c.factor > 1 else "faster"
        change = f"{100 * abs(c.factor - 1):.0f} % {way} (noise {100 * (c.noise - 1):.0f} %)"
        lines.append(f"  {c.suite}: {c.cell}: {c.contestant}: {change}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    for key in ("cpu", "gpu", "cores", "threads", "torch"):
        if before["machine"].get(key) != after["machine"].get(key):
            print(f"Not the same {key}: {before['machine'].get(key)} and {after['machine'].get(key)}.")
    print(text(list(changes(before, after))))


if __name__ == "__main__":
    main()
