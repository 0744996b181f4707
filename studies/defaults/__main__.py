"""Defaults, and accuracy against gradient passes, on six networks: `python -m studies.defaults` (70 minutes, two cores).

tune: contenders on validation data, seeds from 100. report: the best of each kind, and the package's defaults, on test data,
seeds 0, 1, ... evaluate: tables and pictures from the runs that are there. Runs are kept in defaults.jsonl as they finish:
a study that was stopped goes on where it was. Writes defaults.json, .md, .png and defaults_grid.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.digits.jobs import default_workers
from examples.digits.machine import machine
from examples.digits.report import document, without_nan
from studies.defaults import plot, report
from studies.defaults.choose import chosen
from studies.defaults.jobs import expected_seconds, pass_seconds, reported, tuning
from studies.defaults.networks import NETWORKS
from studies.defaults.rows import result_rows
from studies.defaults.store import store as stored
from studies.defaults.store import with_nan
from studies.defaults.training import Job
from studies.store import Run, Store

STAGES = ("tune", "report", "evaluate")
QUICK_STEPS, QUICK_SEEDS, QUICK_NETWORKS = 12, 1, ("digits", "mnist")
FOLDER = Path(__file__).parents[1] / "results"


def plan(options: argparse.Namespace, store: Store) -> tuple[list[Job], list[Job]]:
    """All runs on validation data, and those on test data as they follow from the validation runs that are there."""
    limit = QUICK_STEPS if options.quick else None
    seeds = options.seeds or (QUICK_SEEDS if options.quick else None)
    tuned = tuning(options.networks, options.quick, limit)
    return tuned, reported(options.networks, store.of(tuned), seeds, limit)


def complete(store: Store, stage: str, jobs: Sequence[Job], workers: int) -> None:
    """Runs what is missing of a stage, and tells first how long that may take."""

    def weights(missing: Sequence[Job]) -> list[float]:
        passes = {name: pass_seconds(name) for name in dict.fromkeys(job.network for job in missing)}
        result = expected_seconds(missing, passes)
        speeds = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in passes.items())
        minutes = sum(result) / workers / 60
        print(
            f"{stage}: {len(missing)} of {len(jobs)} runs, by passes {minutes:.0f} minutes; ms a pass: {speeds}", flush=True
        )
        return result

    store.complete(jobs, workers, weights)


def gathered(options: argparse.Namespace, store: Store) -> dict[str, Any]:
    """The document of the runs that are there, without what follows from them."""
    tuned, reports = plan(options, store)
    runs = store.of([*tuned, *reports])
    settings = {name: NETWORKS[name].settings() for name in options.networks}
    commits = sorted({run["commit"] for run in runs})
    seconds = sum(run["seconds"] for run in runs)
    result = document(runs, [], settings, workers=options.workers, run_hours=round(seconds / 3600, 2), commits=commits)
    result["machine"]["mlxtend"] = metadata.version("mlxtend")
    return result


def evaluate(result: dict[str, Any]) -> dict[str, Any]:
    """The document with everything that follows from its runs."""
    runs: list[Run] = [with_nan(run) for run in result["runs"]]
    names = list(result["settings"])
    best = {name: {kind: contender.label for kind, contender in chosen(runs, name).items()} for name in names}
    rows = [row for name in names for row in result_rows(runs, name)]
    return {**result, "chosen": best, "rows": rows, "runs": runs}


def write(result: dict[str, Any], folder: Path) -> None:
    """defaults.json, .md, .png and defaults_grid.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "defaults.json").write_text(json.dumps(without_nan(result), indent=1) + "\n")
    (folder / "defaults.md").write_text(report.page(result))
    plot.save(result, folder / "defaults.png")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.defaults", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)} (all, in this order)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help=f"(all; with --quick: {', '.join(QUICK_NETWORKS)})")
    parser.add_argument("--seeds", type=int, help="runs per contender on test data (5 or 10, by network)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at a time, one thread each")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute: twelve steps a run, one contender of each kind, one seed unless given",
    )
    parser.add_argument("--out", type=Path, help="folder of runs and results (studies/results; with --quick: out)")
    options = parser.parse_args(given)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if min(options.workers, math.inf if options.seeds is None else options.seeds) < 1:
        parser.error("--seeds and --workers must be at least 1")
    options.stages = options.stages or list(STAGES)
    options.networks = options.networks or list(QUICK_NETWORKS if options.quick else NETWORKS)
    options.out = options.out or (Path("out") if options.quick else FOLDER)
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    store = stored(options.out / "defaults.jsonl", {"commit": machine()["commit"]})
    for stage, part in (("tune", 0), ("report", 1)):
        if stage in options.stages:
            complete(store, stage, plan(options, store)[part], options.workers)
    if "evaluate" in options.stages:
        write(evaluate(gathered(options, store)), options.out)
        print((options.out / "defaults.md").read_text())


if __name__ == "__main__":
    main()
