"""Which figures moved between two runs on a machine, beyond their noise.

    python -m benchmarks.report.compare before.json after.json

A figure is a contestant's time over that of the first contestant of its cell (the yardstick) in the same block, so that a
machine that was slower as a whole moves nothing but the yardsticks, which are judged by their times. Its noise in a run is
the greatest block over the least, or where a run has one block its 80 % over its 20 % quantile. It moved if its median
changed by more than the noise of the two runs together, and by more than 3 %. Counts, such as of kernels or bytes, moved if
they differ. Contestants that only one of the runs measured are named.
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
COUNTS = ("kernels", "copies", "operators", "peak_bytes", "all_reduces", "bytes")


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
    """Every time that both runs measured, in cells whose yardstick both measured."""
    for suite, cell, old, new in _cells(before, after):
        yardstick = next(iter(old))
        if yardstick not in new:
            continue
        for contestant in old.keys() & new.keys():
            (was, noise), (now, noise_now) = (_figure(rows, contestant, yardstick) for rows in (old, new))
            if was and now:
                yield Change(suite, cell, contestant, now / was, noise * noise_now)


def counts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Counts that differ, as lines."""
    cells = [*_cells(before, after)]
    worlds = before.get("communication", {}), after.get("communication", {})
    cells += [("communication", world, worlds[0][world], worlds[1][world]) for world in worlds[0].keys() & worlds[1].keys()]
    return [
        f"  {suite}: {cell}: {contestant}: {key.replace('_', ' ')} {old[contestant][key]} -> {new[contestant][key]}"
        for suite, cell, old, new in cells
        for contestant in (name for name in old if name in new)
        for key in COUNTS
        if _differ(key, old[contestant].get(key), new[contestant].get(key))
    ]


def _differ(key: str, old: int | None, new: int | None) -> bool:
    """Whether a count differs; peaks of memory by more than 1 %, as what else is alive then is not always the same."""
    if key == "peak_bytes" and old and new:
        return abs(new - old) > 0.01 * old
    return old != new


def one_sided(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Contestants that only one of the runs measured, as lines."""
    lines = []
    for word, these, those in (("gone", before, after), ("new", after, before)):
        for suite, result in these["suites"].items():
            other = those["suites"].get(suite, {"cells": {}})["cells"]
            for cell, rows in result["cells"].items():
                names = [name for name in rows if name not in other.get(cell, {})]
                if names:
                    lines.append(f"  {word}: {suite}: {cell}{'' if cell not in other else ': ' + '; '.join(names)}")
    return lines


def _cells(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str, Cell, Cell]]:
    for suite, result in before["suites"].items():
        later = after["suites"].get(suite, {"cells": {}})["cells"]
        yield from ((suite, cell, rows, later[cell]) for cell, rows in result["cells"].items() if cell in later)


def _figure(cell: Cell, contestant: str, yardstick: str) -> tuple[float, float]:
    """The median over blocks and its noise; 0 where the yardstick has no block in common with it."""
    row = cell[contestant]
    divisors: Row = {} if contestant == yardstick else cell[yardstick]["blocks"]
    values = [ms / divisors.get(block, 1.0) for block, ms in row["blocks"].items() if not divisors or block in divisors]
    if not values:
        return 0.0, 1.0
    noise = max(values) / min(values) if len(values) > 1 else row["ms_q80"] / row["ms_q20"]
    return statistics.median(values), noise


def text(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What moved between two runs, the greatest changes first."""
    lines = [
        f"Not the same {key}: {before['machine'].get(key)} and {after['machine'].get(key)}."
        for key in ("cpu", "gpu", "cores", "threads", "torch")
        if before["machine"].get(key) != after["machine"].get(key)
    ]
    found = list(changes(before, after))
    moved = sorted((c for c in found if c.moved), key=lambda c: -abs(math.log(c.factor)))
    lines.append(f"{len(moved)} of {len(found)} times moved beyond the noise.")
    for c in moved:
        change = f"takes {c.factor:.2f} times as long (noise {1 / c.noise:.2f} .. {c.noise:.2f})"
        lines.append(f"  {c.suite}: {c.cell}: {c.contestant}: {change}")
    for title, more in (("Counts that differ:", counts(before, after)), ("Measured once:", one_sided(before, after))):
        lines += [title, *more] if more else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    print(text(*(json.loads(path.read_text()) for path in (options.before, options.after))))


if __name__ == "__main__":
    main()
