"""From runs to rows: means, costs and paired differences on test data; grids on validation data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from examples.digits.report import mean_sd
from studies.defaults.choose import Run, best_sam, chosen, groups
from studies.defaults.contender import GIVEN, Contender
from studies.defaults.contenders import fixed
from studies.defaults.networks import NETWORKS
from studies.interval.estimates import Estimate, paired_difference

Row = dict[str, Any]
Cell = dict[str, Any]  # value, alpha and failed runs of a setting on validation data


def networks_of(runs: Iterable[Run]) -> list[str]:
    """The networks there are runs of."""
    return list(dict.fromkeys(run["network"] for run in runs))


def result_rows(runs: Sequence[Run], network: str) -> list[Row]:
    """One row for the base as it is given, each default and the best of each kind, as far as they have test runs.

    Differences are to the best base and to the best SAM of any kind, both by validation, over the seeds that both have.
    """
    picks, tests = chosen(runs, network), groups(runs, network, "test")
    given = tests.get(Contender(GIVEN).key)
    base, sam = picks.get("base"), best_sam(runs, network)
    rows = []
    for contender in [*fixed(), *picks.values()]:
        group = tests.get(contender.key)
        if group:
            row = _row(network, contender, group, given)
            row["over_base"] = _over(group, tests.get(base.key) if base else None)
            row["over_sam"] = _over(group, tests.get(sam.key) if sam else None)
            row["is_best_sam"] = contender == sam
            rows.append(row)
    return rows


def _row(network: str, contender: Contender, group: Sequence[Run], given: Sequence[Run] | None) -> Row:
    value, sd = mean_sd([run["value"] for run in group])
    row = {"network": network, "kind": contender.kind, "label": contender.label, "seeds": len(group)}
    row |= {"value": value, "sd": sd, "passes": contender.passes, "cost": contender.cost}
    if all(run["eigenvalue"] is not None for run in group):
        row["eigenvalue"], row["eigenvalue_sd"] = mean_sd([run["eigenvalue"] for run in group])
    row["time"] = _training_ms(group) / _training_ms(given) if given else math.nan
    return row | {"failed": sum(run["failed"] for run in group), "skipped": sum(run["skipped_steps"] for run in group)}


def _training_ms(group: Sequence[Run]) -> float:
    return float(statistics.median(run["step_ms"] * run["steps"] for run in group))


def _over(group: Sequence[Run], other: Sequence[Run] | None) -> Estimate | None:
    """Paired over the seeds that both have; None against itself, and where the other is not there."""
    if not other or other is group:
        return None
    these, those = ({run["seed"]: run["value"] for run in runs} for runs in (group, other))
    seeds = sorted(these.keys() & those.keys())
    return paired_difference([these[s] for s in seeds], [those[s] for s in seeds]) if seeds else None


def gam_grid(runs: Iterable[Run], network: str) -> dict[tuple[float, float, float | None], Cell]:
    """By (rho, f, max_ratio), GAM in every step on validation data at the alpha that is best there."""
    return _cells(runs, network, ("gam", "gam_part"), lambda o: (o["rho"], o.get("flatness_fraction", 1.0), _bound(o)))


def interval_grid(runs: Iterable[Run], network: str) -> dict[tuple[int, float, Any, float | None], Cell]:
    """By (interval, rho, alpha, max_ratio), GAM in some steps on validation data."""
    return _cells(runs, network, ("gam_interval",), lambda o: (o["interval"], o["rho"], o["alpha"], _bound(o)))


def _bound(options: dict[str, Any]) -> float | None:
    return options.get("max_ratio")


def _cells(
    runs: Iterable[Run], network: str, kinds: Sequence[str], place: Callable[[dict[str, Any]], Any]
) -> dict[Any, Cell]:
    """The best contender of each place: without failures before with, then by the metric."""
    cells: dict[Any, tuple[tuple[bool, float], Cell]] = {}
    for group in groups(runs, network, "validation").values():
        if group[0]["kind"] in kinds:
            options, failed = group[0]["options"], sum(run["failed"] for run in group)
            value = mean_sd([run["value"] for run in group])[0]
            cell = {"value": value, "alpha": options["alpha"], "failed": failed, "seeds": len(group)}
            rank = (failed == 0, -math.inf if math.isnan(value) else NETWORKS[network].sign * value)
            where = place(options)
            if where not in cells or rank > cells[where][0]:
                cells[where] = rank, cell
    return {where: cell for where, (_, cell) in cells.items()}
