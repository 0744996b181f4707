"""The runs of this study on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from studies.defaults.networks import NETWORKS
from studies.defaults.training import run
from studies.store import Run, Store

NUMBERS = ("value", "loss", "eigenvalue")  # may be NaN, which JSON does not have


def store(path: Path, facts: dict[str, Any] | None = None) -> Store:
    """The runs in the file `path`."""
    return Store(path, run, note, with_nan, facts)


def note(result: Run) -> str:
    """What the progress bar tells."""
    value = f"{result['value']:.3f}" if NETWORKS[result["network"]].metric == "loss" else f"{100 * result['value']:.1f} %"
    return f"{result['network']}, {result['kind']}: {value}"


def with_nan(recorded: Run) -> Run:
    """NaN where a number was not finite; an eigenvalue that was not measured stays None."""
    measured = NETWORKS[recorded["network"]].eigenvalue and recorded["split"] == "test"
    lost = {key for key in NUMBERS if recorded[key] is None and (key != "eigenvalue" or measured)}
    return recorded | dict.fromkeys(lost, math.nan)
