"""Stages with time limits, and the record of them: one JSON, rewritten whenever a stage ends."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL = 20_000  # characters of a stage's output that are kept


@dataclass
class Stage:
    """A command with a time limit.

    Attributes:
        name: its key in the record.
        command: what to run; a nonzero exit status fails the stage.
        limit: seconds after which it and its children are killed; more where earlier stages have left some of theirs, less
            where the whole run's time ends before.
        figures: a JSON file that the command leaves, also when it was cut; its entries go into the record.
        environment: added to this process's own.
        skip: says why it does not run, or "", when its turn has come.
    """

    name: str
    command: list[str]
    limit: float
    figures: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: Callable[[], str] = str


class Record:
    """What is written to `path`: the machine, figures, and for every stage its status, seconds and the end of its output."""

    def __init__(self, path: Path, machine: dict[str, Any], budget: float):
        self.path, self.stages = path, dict[str, dict[str, Any]]()
        self.content: dict[str, Any] = {"machine": machine, "stages": self.stages, "suites": {}}
        self.end = time.monotonic() + budget
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def run(self, stage: Stage, later: float = math.inf) -> None:
        """Run a stage and write down how it went; of the time, all but `later` seconds may be used, or else its limit."""
        left = self.end - time.monotonic()
        if why := stage.skip():
            entry: dict[str, Any] = {"status": f"skipped: {why}", "seconds": 0.0}
        elif left < 1:
            entry = {"status": "failed: no time left for it", "seconds": 0.0}
        else:
            entry = _run(stage, min(max(stage.limit, left - later), left))
        if stage.figures and "output" in entry:
            try:
                self.content = _merged(json.loads(stage.figures.read_text()), self.content)
            except (OSError, ValueError) as error:
                entry["status"] = f"failed: it left no figures ({error})"
        self.stages[stage.name] = entry
        self.write()
        print(f"{stage.name}: {entry['status']} ({entry['seconds']:.0f} s)", flush=True)
        if entry["status"].startswith("failed"):
            print(entry.get("output", ""), flush=True)

    def write(self) -> None:
        """Replaces the file at once: a run that is killed leaves the last whole record."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    @property
    def failed(self) -> list[str]:
        return [name for name, entry in self.stages.items() if entry["status"].startswith("failed")]


def _merged(added: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Both; of an entry that both have, such as the suites, the entries of both."""
    both = {key: added[key] | content[key] for key in added.keys() & content.keys() if isinstance(added[key], dict)}
    return added | content | both


def _run(stage: Stage, limit: float) -> dict[str, Any]:
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            stage.command,
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that compilers and the like end with it
        )
    except OSError as error:
        return {"status": f"failed: {error}", "seconds": 0.0}
    try:
        output, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else f"failed: exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"failed: cut after {limit:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return {"status": status, "seconds": round(time.monotonic() - start, 2), "output": output[-TAIL:]}
