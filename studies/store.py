"""The runs of a study on disk, a line each as they finish, so that a study that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from examples.digits.jobs import run_all
from examples.digits.report import without_nan

Run = dict[str, Any]


class Job(Protocol):
    """What is run: a tuple, the arguments of `Store.run`."""

    @property
    def digest(self) -> str:
        """Equal for equal jobs, and recorded with the run."""


class Store:
    """Runs in a file of JSON lines.

    Args:
        run: a job's fields -> its record, with the job's "digest"; a function that processes can be given.
        note: what the progress bar tells of a record.
        read: gives numbers that are not finite back to a record, as JSON has none.
        facts: written with every run, such as the commit.
    """

    def __init__(
        self,
        path: Path,
        run: Callable[..., Run],
        note: Callable[[Run], str],
        read: Callable[[Run], Run],
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.run, self.note, self.read, self.facts = path, run, note, read, facts or {}

    def runs(self) -> list[Run]:
        """All that are recorded. A last line that was cut off is no run."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [self.read(json.loads(line)) for line in lines]

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

    def missing(self, jobs: Sequence[Any]) -> list[Any]:
        """Those of `jobs` that are not recorded, each once, in their order."""
        have = {recorded["digest"] for recorded in self.runs()}
        return list({job.digest: job for job in jobs if job.digest not in have}.values())

    def complete(self, jobs: Sequence[Any], workers: int, weights: Callable[[Sequence[Any]], list[float]]) -> list[Run]:
        """Runs what is missing, with a progress bar by `weights`; all runs of `jobs`."""
        missing = self.missing(jobs)
        if missing:
            run_all(missing, workers, self.run, self.note, weights(missing), self.append)
        return self.of(jobs)
