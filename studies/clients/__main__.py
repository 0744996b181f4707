"""FusedGAM in the place of the base optimizer of small clients: `python -m studies.clients` (minutes on two cores).

Writes clients.json and clients.md.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.digits.jobs import default_workers
from examples.digits.report import document
from gam_fused.methods import TAKES
from studies.clients.catalogue import CLIENTS
from studies.clients.report import page, result_rows
from studies.clients.training import run_all

DEFAULTS: list[dict[str, Any]] = [
    {"method": name} for name in ("finite_difference", "accelerated", "exact", "sam", "gradient_penalty", "gsam")
]


def options_of(text: str) -> dict[str, Any]:
    """One set of FusedGAM's arguments."""
    options = json.loads(text)
    if not isinstance(options, dict) or options.get("method", "finite_difference") not in TAKES:
        raise ValueError(text)
    return options


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.clients", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS), help="(all)")
    parser.add_argument(
        "--options", type=options_of, action="append", metavar="JSON", help="FusedGAM's arguments, a row each (all defaults)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="(3)")
    parser.add_argument("--steps", type=int, help="of every client (each client's own)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at a time, one thread each")
    options = parser.parse_args(given)
    if min(options.seeds, options.workers, options.steps or 1) < 1:
        parser.error("counts must be at least 1")
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    start = time.perf_counter()
    compared = [None, *(options.options or DEFAULTS)]
    jobs = [(c, o, seed, options.steps) for seed in range(options.seeds) for c in options.clients for o in compared]
    runs = run_all(jobs, options.workers)
    rows = result_rows(runs)
    facts = {"workers": options.workers, "wall_s": round(time.perf_counter() - start, 1)}
    result = document(runs, rows, {"seeds": options.seeds, "steps": options.steps}, **facts)
    result["machine"]["mlxtend"] = metadata.version("mlxtend")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "clients.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "clients.md").write_text(page(result, rows))
    print((options.out / "clients.md").read_text())


if __name__ == "__main__":
    main()
