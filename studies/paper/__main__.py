"""The paper's tables and figures in small: `python -m studies.paper` (under an hour on two cores).

Hyperparameters are chosen on validation data, and what was chosen runs on test data with other seeds. Runs are kept in
paper.jsonl as they finish: what was stopped goes on where it was. Writes paper.json, paper.md and a picture per figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.digits.jobs import default_workers
from examples.digits.machine import machine
from examples.digits.report import document, without_nan
from studies.defaults.contender import Contender
from studies.paper import figures, report
from studies.paper.jobs import Job, note, run, with_nan
from studies.paper.networks import NETWORKS
from studies.paper.parts import PARTS
from studies.store import Run, Store

FOLDER = Path(__file__).parents[1] / "results"
QUICK_STEPS = 30
FIGURE_COST = 25.0  # measures take as long as about so many trainings of a conv net with the base optimizer


def expected_seconds(jobs: Sequence[Job], seconds: dict[str, float]) -> list[float]:
    """What each job takes, from the seconds of a training of its network with the base optimizer alone."""
    figure = [FIGURE_COST if job.split == "figure" else 0.0 for job in jobs]
    return [(job.contender.passes + more) * seconds[job.network] for job, more in zip(jobs, figure, strict=True)]


class Pace:
    """Tells what is going on, and what is left by the passes of the runs."""

    def __init__(self, store: Store, workers: int, limit: int | None) -> None:
        self.store, self.workers, self.limit, self.start = store, workers, limit, time.perf_counter()

    def complete(self, title: str, jobs: Sequence[Job]) -> list[Run]:
        """Runs what is missing of a stage."""

        def weights(missing: Sequence[Job]) -> list[float]:
            seconds = self._seconds(missing)
            result = expected_seconds(missing, seconds)
            spent = (time.perf_counter() - self.start) / 60
            minutes = sum(result) / self.workers / 60
            print(f"[{spent:.0f} min] {title}: {len(missing)} of {len(jobs)} runs, about {minutes:.1f} min", flush=True)
            return result

        return self.store.complete([job._replace(limit=self.limit) for job in jobs], self.workers, weights)

    def _seconds(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Of a training with the base optimizer alone, by network: from the runs so far, or one that is not recorded."""
        known: dict[str, list[float]] = {}
        for record in self.store.runs():
            if record["split"] == "validation" and record["kind"] == "base":
                known.setdefault(record["network"], []).append(record["cpu_s"])
        for name in {job.network for job in jobs} - known.keys():
            record = run(name, Contender("base"), 0, "validation", 1.0, 20)
            known[name] = [record["cpu_s"] * 15]
        return {name: statistics.median(values) for name, values in known.items()}


def complete(options: argparse.Namespace, store: Store) -> dict[str, list[Run]]:
    """All runs of the parts asked for."""
    pace = Pace(store, options.workers, QUICK_STEPS if options.quick else None)
    result: dict[str, list[Run]] = {}
    for i, name in enumerate(options.only, 1):
        stages = PARTS[name]()
        runs: list[Run] = []
        for j, stage in enumerate(stages, 1):
            jobs = thinned(stage(runs)) if options.quick else stage(runs)
            runs += pace.complete(f"part {i} of {len(options.only)}, {name}, stage {j} of {len(stages)}", jobs)
        result[name] = runs
    return result


def thinned(jobs: Sequence[Job]) -> list[Job]:
    """One job of each kind for each network and split, and for each interval and part of a training."""
    kept: dict[Any, Job] = {}
    for job in jobs:
        options = job.contender.options
        kept.setdefault((job.network, job.split, job.part, job.contender.kind, options.get("interval")), job)
    return list(kept.values())


def gathered(parts: dict[str, list[Run]], **facts: Any) -> dict[str, Any]:
    """The document: every run once, and what follows from them."""
    runs = list({run["digest"]: run for part in parts.values() for run in part}.values())
    settings = {name: NETWORKS[name].settings() for name in dict.fromkeys(run["network"] for run in runs)}
    shared = {
        "commits": sorted({run["commit"] for run in runs}),
        "cpu_minutes": round(sum(r["cpu_s"] for r in runs) / 60, 1),
    }
    digests = {name: [run["digest"] for run in part] for name, part in parts.items()}
    result = document(runs, [], settings, parts=list(parts), digests=digests, **shared, **facts)
    result["machine"]["mlxtend"] = metadata.version("mlxtend")
    return result


def page_of(result: Mapping[str, Any]) -> str:
    """The page, from the document as it is written."""
    runs = {record["digest"]: with_nan(record) for record in result["runs"]}
    return report.page({name: [runs[digest] for digest in found] for name, found in result["digests"].items()}, result)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at a time, one thread each")
    parser.add_argument(
        "--quick", action="store_true", help=f"one run of each kind, {QUICK_STEPS} steps each: shows that it works"
    )
    options = parser.parse_args(given)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    start = time.perf_counter()
    store = Store(options.out / "paper.jsonl", run, note, with_nan, {"commit": machine()["commit"]})
    parts = complete(options, store)
    result = gathered(parts, workers=options.workers, wall_s=round(time.perf_counter() - start, 1))
    page = page_of(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "paper.json").write_text(json.dumps(without_nan(result)) + "\n")
    (options.out / "paper.md").write_text(page)
    figures.save(parts, result, options.out)
    print(page)


if __name__ == "__main__":
    main()
