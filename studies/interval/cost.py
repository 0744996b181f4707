"""Training speed. Steps differ when GAM is on some of them only, so whole windows are timed, all settings in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.digits.machine import machine
from examples.digits.methods import Method
from examples.digits.report import row_key
from examples.digits.timing import window_times
from examples.digits.training import Settings
from studies.interval.settings import ORACLES, RATIOS, WINDOW


def measure(oracles: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds per step of every oracle and ratio, and how many times the oracle alone, and SGD alone, that is.

    Medians, 20 and 80 % quantiles over rounds; a ratio is one of two windows in the same round, since the machine's speed
    drifts between rounds. alpha does not change the cost.
    """
    settings = [(key, ratio) for key in oracles for ratio in (0.0, *RATIOS)]
    methods = [Method("base")] + [ORACLES[key].method(ratio) for key, ratio in settings]
    methods = list({row_key(asdict(method)): method for method in methods}.values())
    with tqdm(total=(rounds + 1) * len(methods), desc="cost", unit="window", dynamic_ncols=True) as bar:
        times = window_times(methods, Settings().batch_size, WINDOW, rounds, bar.update)
    seconds = dict(zip(map(_key, methods), times, strict=True))
    rows = []
    for key, ratio in settings:
        oracle = ORACLES[key]
        mine, alone = seconds[_key(oracle.method(ratio))], seconds[_key(oracle.alone)]
        q20, ms, q80 = quantiles([1e3 * s / WINDOW for s in mine])
        row = {"oracle": key, "ratio": ratio, "step_ms": {"ms_q20": q20, "ms": ms, "ms_q80": q80}}
        row |= {"over_alone": over(mine, alone), "over_sgd": over(mine, seconds[_key(Method("base"))])}
        rows.append(row | {"passes": oracle.passes(ratio), "passes_over_alone": oracle.passes(ratio) / oracle.passes(0.0)})
    return {"machine": machine() | {"threads": 1}, "steps_per_window": WINDOW, "rounds": rounds, "windows": rows}


def over(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """Median, 20 and 80 % quantiles over rounds of this / that."""
    q20, median, q80 = quantiles([a / b for a, b in zip(these, those, strict=True)])
    return {"value": median, "q20": q20, "q80": q80}


def quantiles(values: Sequence[float]) -> list[float]:
    """At 20, 50 and 80 %."""
    return np.quantile(values, (0.2, 0.5, 0.8)).tolist()


def _key(method: Method) -> str:
    return row_key(asdict(method))
