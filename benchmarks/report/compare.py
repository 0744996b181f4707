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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.ratios import Cell, Row

LEAST = math.log(1.03)
COUNTS = ("kernels", "copies", "operators", "peak_bytes", "all_reduces", "bytes")
Record = dict[str, Any]
Key = tuple[str, str, str]  # suite, cell, contestant


class Change(NamedTuple):
    """A figure in two runs: `factor` is after / before, `noise` the factor that noise explains."""

    key: Key
    factor: float
    noise: float

    @property
    def moved(self) -> bool:
        return abs(math.log(self.factor)) > max(math.log(self.noise), LEAST)


def figures(record: Record) -> dict[Key, tuple[Row, Cell]]:
    """Every row of a run, and the cell it is in."""
    suites = {name: suite["cells"] for name, suite in record["suites"].items()}
    suites["communication"] = {w: rows for w, rows in record.get("communication", {}).items() if "failed" not in rows}
    cells = ((suite, cell, rows) for suite, cells in suites.items() for cell, rows in cells.items())
    return {(suite, cell, name): (row, rows) for suite, cell, rows in cells for name, row in rows.items()}


def changes(before: Record, after: Record) -> list[Change]:
    """Every time that both runs measured, in cells whose yardstick both measured."""
    old, new = figures(before), figures(after)
    result = []
    for key in (key for key in old if key in new and "blocks" in old[key][0]):
        yardstick = next(iter(old[key][1]))
        if yardstick in new[key][1]:
            (was, noise), (now, noise_now) = (_figure(*run[key], yardstick) for run in (old, new))
            result += [Change(key, now / was, noise * noise_now)] if was and now else []
    return result


def _figure(row: Row, cell: Cell, yardstick: str) -> tuple[float, float]:
    """The median over blocks and its noise; 0 where the yardstick has no block in common with it."""
    divisors = cell[yardstick]["blocks"] if row is not cell[yardstick] else dict.fromkeys(row["blocks"], 1.0)
    values = [ms / divisors[block] for block, ms in row["blocks"].items() if block in divisors]
    if not values:
        return 0.0, 1.0
    noise = max(values) / min(values) if len(values) > 1 else row["ms_q80"] / row["ms_q20"]
    return statistics.median(values), noise


def counts(before: Record, after: Record) -> list[str]:
    """Counts that differ, as lines."""
    old, new = ({key: row for key, (row, _) in figures(record).items()} for record in (before, after))
    return [
        f"  {': '.join(key)}: {count.replace('_', ' ')} {old[key][count]} -> {new[key][count]}"
        for key in old
        for count in COUNTS
        if key in new and _differ(count, old[key].get(count), new[key].get(count))
    ]


def _differ(key: str, old: int | None, new: int | None) -> bool:
    """Whether a count that both runs have differs; peaks of memory by over 1 %, as what else is alive varies."""
    return None not in (old, new) and abs(new - old) > (0.01 * old if key == "peak_bytes" else 0)


def _only(word: str, these: Iterable[Key], those: Iterable[Key]) -> list[str]:
    """What only `these` have: whole cells by their names, of others the contestants."""
    there, cells = set(those), {key[:2] for key in those}
    missing: dict[str, list[str]] = {}
    for suite, cell, name in (key for key in these if key not in there):
        missing.setdefault(f"{suite}: {cell}", []).extend([name] if (suite, cell) in cells else [])
    return [f"  {word}: {cell}{': ' * bool(names)}{'; '.join(names)}" for cell, names in missing.items()]


def text(before: Record, after: Record) -> str:
    """What moved between two runs, the greatest changes first."""
    machines = before["machine"], after["machine"]
    keys = ("cpu", "gpu", "cores", "threads", "torch")
    lines = ["Not the same {}: {} and {}.".format(k, *(m.get(k) for m in machines)) for k in keys]
    lines = [line for k, line in zip(keys, lines, strict=True) if machines[0].get(k) != machines[1].get(k)]
    found = changes(before, after)
    moved = sorted((c for c in found if c.moved), key=lambda c: -abs(math.log(c.factor)))
    lines.append(f"{len(moved)} of {len(found)} times moved beyond the noise.")
    for c in moved:
        lines.append(f"  {': '.join(c.key)}: takes {c.factor:.2f} times as long (noise {1 / c.noise:.2f} .. {c.noise:.2f})")
    old, new = figures(before), figures(after)
    only = [*_only("gone", old, new), *_only("new", new, old)]
    for title, more in (("Counts that differ:", counts(before, after)), ("Measured once:", only)):
        lines += [title, *more] if more else []
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(given)
    print(text(*(json.loads(path.read_text()) for path in (options.before, options.after))))


if __name__ == "__main__":
    main()
