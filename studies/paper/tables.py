"""From runs to rows, and to differences between methods with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from examples.digits.report import mean_sd
from studies.defaults.networks import Network
from studies.interval.estimates import Estimate, paired_difference
from studies.paper.contenders import KINDS
from studies.store import Run

Row = dict[str, Any]


def on_test(runs: Iterable[Run], network: Network, interval: int = 1) -> dict[str, list[Run]]:
    """The runs on test data by kind, each in the order of seeds, with GAM in every `interval`-th step where there is GAM."""
    found: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if (run["network"], run["split"]) == (network.name, "test"):
            with_gam = run["kind"] in ("gam", "sam_gam")
            if run["options"].get("interval", 1) == (interval if with_gam else 1):
                found[run["kind"]].append(run)
    return {kind: group for kind, group in found.items() if group}


def rows(runs: Sequence[Run], networks: Iterable[Network]) -> list[Row]:
    """A row per network and kind: mean and sd of the test accuracy, and the hyperparameters that were chosen."""
    result = []
    for network in networks:
        for kind, group in on_test(runs, network).items():
            value, sd = mean_sd([run["value"] for run in group])
            row = {"network": network.name, "title": network.title, "kind": kind, "label": group[0]["label"]}
            failed = sum(run["failed"] for run in group)
            result.append({**row, "value": value, "sd": sd, "seeds": len(group), "failed": failed})
    return result


def with_both(runs: Sequence[Run], networks: Iterable[Network], kind: str, other: str) -> list[Network]:
    """The networks that have runs of both on test data: not those of which every setting of one failed in validation."""
    return [network for network in networks if {kind, other} <= on_test(runs, network).keys()]


def difference(runs: Sequence[Run], networks: Iterable[Network], kind: str, other: str) -> Estimate | None:
    """Mean over the networks `with_both` of kind - other in test accuracy; None without one.

    The 95 % interval is Student's, of the seeds' own means. The networks are fixed: it says nothing of other networks.
    """
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for network in with_both(runs, networks, kind, other):
        groups = on_test(runs, network)
        those = {run["seed"]: run["value"] for run in groups[other]}
        for run in groups[kind]:
            by_seed.setdefault(run["seed"], []).append((run["value"], those[run["seed"]]))
    these, others = ([statistics.fmean(pair[i] for pair in pairs) for pairs in by_seed.values()] for i in (0, 1))
    return paired_difference(these, others) if these else None


def accuracies(runs: Iterable[Run], network: Network, kind: str, interval: int = 1) -> list[float]:
    """Of one kind on test data, in the order of seeds."""
    return [run["value"] for run in on_test(runs, network, interval).get(kind, [])]


def verdict(estimate: Estimate | None) -> str:
    """Whether a difference that the paper finds to be above zero is: "agrees", "disagrees", "undecided", "not run"."""
    if estimate is None or math.isnan(estimate["value"]):
        return "not run"
    if math.isnan(estimate["low"]):
        return "undecided"
    if estimate["low"] > 0:
        return "agrees"
    return "disagrees" if estimate["high"] < 0 else "undecided"
