"""From runs to rows: the choice of alpha, paired differences, the part of the full gain that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from examples.digits.methods import Method
from examples.digits.report import Run, diverged, mean_sd, row_key
from studies.interval.settings import GAM, ORACLES, RATIOS

LEVEL = 0.95
RESAMPLES = 10_000
Estimate = dict[str, float]  # value, and the ends of its 95 % interval: low, high


def paired_difference(these: Sequence[float], those: Sequence[float]) -> Estimate:
    """Mean of this - that over seeds, with Student's interval; the ends are NaN for one seed."""
    differences = [a - b for a, b in zip(these, those, strict=True)]
    mean, sd = mean_sd(differences)
    n = len(differences)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return {"value": mean, "low": mean - reach, "high": mean + reach}


def part_kept(sparse: Sequence[float], alone: Sequence[float], full: Sequence[float]) -> Estimate | None:
    """(sparse - alone) / (full - alone) of the mean accuracies; the interval is a paired bootstrap over seeds (percentiles).

    None where the full gain is not distinguishable from zero or is a loss: then there is no gain to keep a part of.
    """
    if not paired_difference(full, alone)["low"] > 0:
        return None
    accuracies = np.array([sparse, alone, full], dtype=np.float64)  # [3, seeds]
    seeds = accuracies.shape[1]
    picks = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    r, zero, one = accuracies[:, picks].mean(axis=2)  # each [resamples]
    parts = (r - zero)[one > zero] / (one - zero)[one > zero]
    low, high = np.quantile(parts, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    r, zero, one = accuracies.mean(axis=1)
    return {"value": float((r - zero) / (one - zero)), "low": low, "high": high}


def sweep_rows(runs: Sequence[Run], oracles: Sequence[str]) -> list[dict[str, Any]]:
    """One row per oracle, ratio and alpha that was tried, with its validation accuracy and how many runs diverged."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(row_key(run), []).append(run)
    rows = []
    for key in oracles:
        for ratio in RATIOS:
            for alpha in sorted({run["options"]["alpha"] for run in runs if "alpha" in run["options"]}):
                group = groups.get(row_key(asdict(ORACLES[key].method(ratio, alpha))))
                if group:
                    accuracy, sd = mean_sd([run["test"] for run in group])
                    row = {"oracle": key, "ratio": ratio, "alpha": alpha, "seeds": len(group)}
                    failed = sum(map(diverged, group))
                    rows.append({**row, "validation": accuracy, "validation_sd": sd, "diverged": failed})
    return rows


def chosen_alpha(rows: Sequence[dict[str, Any]], oracle: str, ratio: float) -> float | None:
    """The alpha of the best validation accuracy among those at which no run diverged; the smaller one of equals."""
    good = [r for r in rows if (r["oracle"], r["ratio"]) == (oracle, ratio) and not r["diverged"]]
    return max(good, key=lambda r: (r["validation"], -r["alpha"]))["alpha"] if good else None


def judged(rows: Sequence[dict[str, Any]], oracles: Sequence[str]) -> list[tuple[str, float, float | None]]:
    """(oracle, ratio, alpha) to be judged on the test images: the oracle alone, chosen alphas, and the default alpha."""
    result: list[tuple[str, float, float | None]] = []
    for key in oracles:
        result.append((key, 0.0, None))
        for ratio in RATIOS:
            alphas = {chosen_alpha(rows, key, ratio), GAM.alpha} - {None}
            result += [(key, ratio, alpha) for alpha in sorted(alphas)]
    return result


def accuracies(runs: Sequence[Run], method: Method) -> list[float]:
    """Test accuracies of one setting, in the order of seeds."""
    key = row_key(asdict(method))
    return [run["test"] for run in sorted(runs, key=lambda run: run["seed"]) if row_key(run) == key]


def result_rows(
    runs: Sequence[Run], sweep: Sequence[dict[str, Any]], oracles: Sequence[str], windows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per setting judged on the test images, compared with the same oracle alone and with full GAM at its alpha."""
    costs = {(w["oracle"], w["ratio"]): w for w in windows}
    rows = []
    for key, ratio, alpha in judged(sweep, oracles):
        oracle, best, best_full = ORACLES[key], chosen_alpha(sweep, key, ratio), chosen_alpha(sweep, key, 1.0)
        method = oracle.method(ratio, alpha or GAM.alpha)
        group = [run for run in runs if row_key(run) == row_key(asdict(method))]
        mine, alone = accuracies(runs, method), accuracies(runs, oracle.alone)
        full = None if best_full is None else accuracies(runs, oracle.method(1.0, best_full))
        accuracy, accuracy_sd = mean_sd(mine)
        eigenvalue, eigenvalue_sd = mean_sd([run["eigenvalue"] for run in group])
        row = {"oracle": key, "ratio": ratio, "alpha": alpha, "chosen": alpha == best if ratio else True}
        row |= {"seeds": len(mine), "diverged": sum(map(diverged, group)), "test": accuracy, "test_sd": accuracy_sd}
        row |= {"eigenvalue": eigenvalue, "eigenvalue_sd": eigenvalue_sd}
        row["over_alone"] = paired_difference(mine, alone) if ratio else None
        row["over_full"] = paired_difference(mine, full) if full and (ratio, alpha) != (1.0, best_full) else None
        row["kept"] = part_kept(mine, alone, full) if full and 0 < ratio < 1 else None
        cost = costs[key, ratio]
        row |= {"cost": cost["over_alone"], "cost_over_sgd": cost["over_sgd"], "cost_by_passes": cost["passes_over_alone"]}
        rows.append(row)
    return rows
