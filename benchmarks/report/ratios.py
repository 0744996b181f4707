"""Ratios of rows that were measured in the same blocks, with their spread."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.contestants import TRAFFIC

Row = dict[str, Any]
Cell = dict[str, Row]


class Ratio(NamedTuple):
    """The median over blocks, with the least and the greatest.

    Of a single block, the low and high that its quantiles allow; of `beyond_passes`, the 20 and 80 % quantiles.
    """

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Ratio:
        return Ratio(*(factor * x for x in self))


def ratio(this: Row, that: Row) -> Ratio | None:
    """How many times as long a step of `this` takes as one of `that`; None where no block measured both."""
    blocks = [b for b in this["blocks"] if b in that["blocks"]]
    steps = that.get("steps", 1) / this.get("steps", 1)
    values = [steps * this["blocks"][b] / that["blocks"][b] for b in blocks]
    if len(values) != 1:
        return Ratio(statistics.median(values), min(values), max(values)) if values else None
    if this is that:
        return Ratio(1.0, 1.0, 1.0)
    return Ratio(values[0], steps * this["ms_q20"] / that["ms_q80"], steps * this["ms_q80"] / that["ms_q20"])


def ms_per_step(row: Row) -> tuple[float, float, float]:
    """Milliseconds of one step: median, 20 and 80 % quantile."""
    return tuple(row[key] / row.get("steps", 1) for key in ("ms", "ms_q20", "ms_q80"))  # type: ignore[return-value]


def beyond_passes(row: Row) -> Ratio | None:
    """A step's time over that of the forwards and backwards within it, the rest being the optimizer's."""
    return Ratio(*row["over_passes"]) if "over_passes" in row else None


def share_of_yardstick(row: Row, yardstick: Row) -> Ratio | None:
    """Bytes per second over the yardstick's, of a kernel (its bytes are known) or a step (by docs/design.md's counts).

    None where nothing is known, and below a million elements, which tell of launches rather than of memory.
    """
    if "bytes" not in row and row.get("elements", 0) < 10**6:
        return None
    taken = ratio(yardstick, row)
    moved = row.get("bytes") or traffic(row)
    return taken.times(moved / (yardstick.get("bytes") or 12 * yardstick["elements"])) if taken and moved else None


def traffic(row: Row) -> float | None:
    """Bytes a step of a compiled backend reads and writes, float32; AdamW's second moment is one read and one write more."""
    if row.get("method") not in TRAFFIC or row["by"] not in ("cpp", "cuda", "triton"):
        return None
    return 4 * row["elements"] * (TRAFFIC[row["method"]] + (2 if row["base"] == "AdamW" else 0))
