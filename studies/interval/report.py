"""Whether the paper's claims about sparse GAM hold here, and the Markdown page: computed from the rows, nothing assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from examples.digits.report import Run
from studies.interval.estimates import accuracies, paired_difference
from studies.interval.settings import ORACLES, ratio_name

CLAIM = "GAM on 1/10 of the iterations keeps most of the gain at less than 25 % extra cost"
RATIO, MOST, EXTRA_COST = 0.1, 0.5, 0.25
Row = dict[str, Any]


def verdict_of(low: float | None, high: float | None, threshold: float, above: bool) -> str:
    """Does the whole interval lie on the claimed side of the threshold, on the other, or on both?"""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "not decided"
    if low > threshold:
        return "confirmed" if above else "refuted"
    if high < threshold:
        return "refuted" if above else "confirmed"
    return "not decided"


def both(first: str, second: str) -> str:
    """The verdict on a claim of two parts."""
    verdicts = {first, second}
    return "refuted" if "refuted" in verdicts else "confirmed" if verdicts == {"confirmed"} else "not decided"


def find(rows: Sequence[Row], oracle: str, ratio: float) -> Row | None:
    """The row of the chosen alpha; None where every alpha diverged in the sweep."""
    return next((r for r in rows if (r["oracle"], r["ratio"]) == (oracle, ratio) and r["chosen"]), None)


def claims(rows: Sequence[Row], oracles: Sequence[str]) -> list[dict[str, Any]]:
    """The claim on each oracle: its two parts judged by the ends of their intervals, and all of it in a sentence."""
    result = []
    for key in oracles:
        sparse, full = find(rows, key, RATIO), find(rows, key, 1.0)
        if sparse is None or full is None:
            text = f"{ORACLES[key].label}: not decided, every alpha that was tried diverged."
            result.append({"claim": CLAIM, "oracle": key, "verdict": "not decided", "text": text})
            continue
        kept, gain, extra = sparse["kept"], full["over_alone"], sparse["cost"]
        most = verdict_of(kept["low"], kept["high"], MOST, above=True) if kept else "not decided"
        cheap = verdict_of(extra["q20"] - 1, extra["q80"] - 1, EXTRA_COST, above=False)
        verdict = both(most, cheap)
        if kept:
            part = f"{percent(kept)} of the gain is kept; most of it (over half): {most}"
        else:
            part = "the full gain is not above zero beyond doubt, so there is none to keep most of: not decided"
        text = (
            f"{ORACLES[key].label}: **{verdict}**. GAM on every step (alpha {full['alpha']:g}) gains {points(gain)} points; "
            f"on {ratio_name(RATIO)} (alpha {sparse['alpha']:g}) {points(sparse['over_alone'])}, and against every step "
            f"{points(sparse['over_full'])}: {part}. Extra cost {extra_cost(extra)}, by gradient passes "
            f"{100 * (sparse['cost_by_passes'] - 1):+.0f} %; below 25 %: {cheap}."
        )
        parts = {"keeps_most": most, "cheap": cheap, "kept": kept, "full_gain": gain, "cost": extra}
        result.append({"claim": CLAIM, "oracle": key, "verdict": verdict, **parts, "text": text})
    return result


def against_sam(rows: Sequence[Row], runs: Sequence[Run], oracles: Sequence[str]) -> list[dict[str, Any]]:
    """The paper's other claim on this figure: SGD with sparse GAM outperforms SAM at a lower cost."""
    result = []
    sparse = find(rows, "sgd", RATIO)
    for key in oracles:
        if key == "sgd" or sparse is None:
            continue
        alone = find(rows, key, 0.0)
        mine = accuracies(runs, ORACLES["sgd"].method(RATIO, sparse["alpha"]))
        difference = paired_difference(mine, accuracies(runs, ORACLES[key].alone))
        better = verdict_of(difference["low"], difference["high"], 0.0, above=True)
        these, those = sparse["cost_over_sgd"], alone["cost_over_sgd"]
        cheap = "confirmed" if these["q80"] < those["q20"] else "refuted" if these["q20"] > those["q80"] else "not decided"
        verdict = both(better, cheap)
        text = (
            f"SGD with GAM on {ratio_name(RATIO)} against {ORACLES[key].label} alone: **{verdict}**. "
            f"{points(difference)} points ({better}) at {these['value']:.2f} against {those['value']:.2f} times the cost of "
            f"SGD ({cheap})."
        )
        claim = "SGD with GAM on 1/10 of the iterations outperforms SAM at a lower cost"
        result.append({"claim": claim, "oracle": key, "verdict": verdict, "difference": difference, "text": text})
    return result


def points(estimate: dict[str, float] | None) -> str:
    """A difference of accuracies in points, with its interval."""
    if estimate is None:
        return ""
    value = f"{100 * estimate['value']:+.1f}"
    if estimate["low"] is None or math.isnan(estimate["low"]):
        return value
    return f"{value} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"


def percent(estimate: dict[str, float] | None) -> str:
    """A part of one as a percentage, with its interval."""
    if estimate is None:
        return ""
    return f"{100 * estimate['value']:.0f} % [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"


def extra_cost(cost: dict[str, float]) -> str:
    """What comes on top of the oracle alone."""
    value, low, high = (100 * (cost[k] - 1) for k in ("value", "q20", "q80"))
    return f"{value:+.0f} % ({low:+.0f} .. {high:+.0f})"


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per setting judged on the test images."""
    header = (
        "| h_loss from | GAM on | alpha | test accuracy, % | - alone, points | - every step, points | part of the gain kept "
        "| largest eigenvalue | cost / alone (20 .. 80 %) | by passes |"
    )
    lines = [header, "|---" * header.count(" | ") + "|---|"]
    for r in rows:
        alpha = "" if r["alpha"] is None else f"{r['alpha']:g}" + ("" if r["chosen"] else " (default)")
        curvature = "-" if math.isnan(r["eigenvalue"]) else f"{r['eigenvalue']:.2f} +- {r['eigenvalue_sd']:.2f}"
        accuracy = f"{100 * r['test']:.1f} +- {100 * r['test_sd']:.1f}"
        accuracy += f" ({r['diverged']} of {r['seeds']} diverged)" if r["diverged"] else ""
        cost = f"{r['cost']['value']:.2f}" + (f" ({r['cost']['q20']:.2f} .. {r['cost']['q80']:.2f})" if r["ratio"] else "")
        cells = [ORACLES[r["oracle"]].label, ratio_name(r["ratio"]), alpha, accuracy, points(r["over_alone"])]
        cells += [points(r["over_full"]), percent(r["kept"]), curvature, cost, f"{r['cost_by_passes']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(document: dict[str, Any]) -> str:
    """The Markdown page: verdicts, table, what it was measured on."""
    timing, machine = document["timing"], document["machine"]
    seeds = max(r["seeds"] for r in document["rows"])
    folds = max(r["seeds"] for r in document["sweep"]["rows"])
    verdicts = "\n".join(f"- {claim['text']}" for claim in document["claims"])
    settings, fixed, speed = document["settings"], document["fixed"], timing["machine"]
    notes = (
        f"Digits, {100 * settings['noise']:.0f} % of the training labels wrong, {settings['epochs']} epochs. Mean +- sd of "
        f"{seeds} seeds on the test images. Square brackets: 95 % intervals over seeds, of paired differences (Student's t) "
        "and of the part kept (bootstrap); the full gain is that of GAM on every step at its chosen alpha. alpha: the best "
        f"of {folds} other seeds on validation folds, among those at which no run diverged; where the package's default is "
        f"another, it stands beside it. rho {fixed['rho']:g}, rho' {fixed['rho_prime']:g}. Cost: windows of "
        f"{timing['steps_per_window']} steps side by side, {timing['rounds']} rounds, one thread, medians of ratios.\n\n"
        f"Accuracy: {machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}. "
        f"Cost: {speed['cpu']}, torch {speed['torch']}, commit {speed['commit']}, {speed['date']}."
    )
    return f'Claim: "{CLAIM}" (section 5.5 of the paper).\n\n{verdicts}\n\n{table(document["rows"])}\n\n{notes}\n'
