"""The best contender of each kind, by validation data alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from studies.defaults.contender import KINDS, SAM_KINDS, Contender, contender_of, key_of
from studies.defaults.networks import NETWORKS

Run = dict[str, Any]


def groups(runs: Iterable[Run], network: str, split: str) -> dict[str, list[Run]]:
    """The runs of one network on one kind of data, by contender, each group in the order of seeds."""
    result: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if (run["network"], run["split"]) == (network, split):
            result.setdefault(key_of(run), []).append(run)
    return result


def scores(runs: Sequence[Run], network: str) -> dict[str, float]:
    """Mean validation metric, higher is better, of each contender none of whose runs failed and that has all seeds."""
    found = groups(runs, network, "validation")
    seeds = max(map(len, found.values()), default=0)
    complete = {key: group for key, group in found.items() if len(group) == seeds and not any(r["failed"] for r in group)}
    return {key: NETWORKS[network].sign * statistics.fmean(r["value"] for r in group) for key, group in complete.items()}


def chosen(runs: Sequence[Run], network: str) -> dict[str, Contender]:
    """By kind, the contender of the best score; of equals the cheapest. A kind all of which failed is left out."""
    result = {}
    for kind in KINDS:
        best = _best(runs, network, (kind,))
        if best:
            result[kind] = best
    return result


def best_sam(runs: Sequence[Run], network: str) -> Contender | None:
    """The best of all kinds of SAM by validation."""
    return _best(runs, network, SAM_KINDS)


def _best(runs: Sequence[Run], network: str, kinds: Sequence[str]) -> Contender | None:
    score = scores(runs, network)
    by_key = {key_of(run): contender_of(run) for run in runs if run["network"] == network and run["kind"] in kinds}
    tried = [contender for key, contender in by_key.items() if key in score]
    return max(tried, key=lambda c: (score[c.key], -c.cost), default=None)
