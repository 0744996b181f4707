"""The runs on disk, a line each as they finish, so that a study that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.digits.jobs import run_all
from examples.digits.report import without_nan
from studies.defaults.networks import NETWORKS
from studies.defaults.training import Job, run

Run = dict[str, Any]
NUMBERS = ("value", "loss", "eigenvalue")  # may be NaN, which JSON does not have


class Store:
    """Runs in a file of JSON lines.

    Args:
        facts: written with every run, such as the commit.
    """

    def __init__(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        self.path, self.facts = path, facts or {}

    def runs(self) -> list[Run]:
        """All that are recorded. A last line that was cut off is no run."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [with_nan(json.loads(line)) for line in lines]

    def append(self, result: Run) -> None:
        """Writes one run at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text() if self.path.exists() else ""
        if kept and not kept.endswith("\n"):
            self.path.write_text(kept[: kept.rfind("\n") + 1])
        with self.path.open("a") as file:
            file.write(json.dumps(without_nan({**result, **self.facts})) + "\n")

    def of(self, jobs: Sequence[Job]) -> list[Run]:
        """The recorded runs of these jobs, each once."""
        found = {recorded["digest"]: recorded for recorded in self.runs()}
        return [found[digest] for digest in dict.fromkeys(job.digest for job in jobs) if digest in found]

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of `jobs` that are not recorded, each once, in their order."""
        have = {recorded["digest"] for recorded in self.runs()}
        return list({job.digest: job for job in jobs if job.digest not in have}.values())

    def complete(self, jobs: Sequence[Job], workers: int, weights: Callable[[Sequence[Job]], list[float]]) -> list[Run]:
        """Runs what is missing, with a progress bar by `weights`; all runs of `jobs`."""
        missing = self.missing(jobs)
        if missing:
            run_all(missing, workers, run, note, weights(missing), self.append)
        return self.of(jobs)


def note(result: Run) -> str:
    """What the progress bar tells."""
    value = f"{result['value']:.3f}" if NETWORKS[result["network"]].metric == "loss" else f"{100 * result['value']:.1f} %"
    return f"{result['network']}, {result['kind']}: {value}"


def with_nan(recorded: Run) -> Run:
    """NaN where a number was not finite; an eigenvalue that was not measured stays None."""
    measured = NETWORKS[recorded["network"]].eigenvalue and recorded["split"] == "test"
    lost = {key for key in NUMBERS if recorded[key] is None and (key != "eigenvalue" or measured)}
    return recorded | dict.fromkeys(lost, math.nan)
