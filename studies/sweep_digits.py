"""The sweep from which the package's defaults are chosen: `python -m studies.sweep_digits` (about 12 minutes, two cores).

Every run trains on four fifths of the training pool of the digits, with wrong labels, and is judged on the other fifth; five
seeds take the five folds in turn. The test images are not loaded. Seeds start at 100, so that the main job (seeds 0, 1, ...)
draws other wrong labels and other weights. Writes sweep_digits.csv, .json and .png.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from examples.digits.jobs import default_workers, run_all
from examples.digits.methods import UNBOUNDED, Method
from examples.digits.report import document, summary
from examples.digits.training import Settings
from studies.sweep_plot import save

FIRST_SEED = 100
RHO_PRIME = 0.05


def grid() -> list[Method]:
    """What is tried. The order is kept in the results."""
    fd, acc = "finite_difference", "accelerated"
    methods = [Method("base")]
    methods += [Method(fd, options=gam(r, a)) for r, a in product((0.05, 0.1, 0.2, 0.5), (0.5, 1.0, 2.0, 3.0))]
    methods += [Method(fd, options=gam(0.2, a, probe)) for probe, a in product((0.02, 0.1), (1.0, 2.0))]
    methods += [Method("sam_gam", options=gam(0.2, a)) for a in (1.0, 2.0)]
    methods += [Method("exact", options=gam(0.2, a, None)) for a in (1.0, 2.0)]
    methods += [Method("sam", options={"rho": rho}) for rho in (0.05, 0.1, 0.2, 0.5)]
    methods += [Method(acc, options=gam(r, a, probe)) for r, probe, a in product((0.2, 0.5), (0.05, 0.1), (0.3, 0.6))]

    methods += [Method("base", "AdamW", base_options=lr) for lr in ({"lr": 5e-4}, {}, {"lr": 2e-3}, {"lr": 5e-3})]
    methods += [Method(fd, "AdamW", options=gam(r, a)) for r, a in product((0.1, 0.2), (1.0, 2.0))]
    methods += [Method("sam", "AdamW", options={"rho": rho}) for rho in (0.1, 0.2)]
    methods += [Method(acc, "AdamW", options=gam(0.2, 0.3, 0.1))]

    fast = {"lr": 0.1}  # twice the learning rate: the margin to divergence
    methods += [Method("base", base_options=fast)]
    methods += [
        Method(fd, options=gam(r, a), base_options=fast) for r, a in ((0.2, 1.0), (0.2, 2.0), (0.2, 3.0), (0.5, 1.0))
    ]
    methods += [Method("sam_gam", options=gam(0.2, 1.0), base_options=fast)]
    methods += [Method("exact", options=gam(0.2, 1.0, None), base_options=fast)]
    methods += [Method("sam", options={"rho": rho}, base_options=fast) for rho in (0.2, 0.5)]
    methods += [Method(acc, options=gam(r, 0.3, 0.1), base_options=fast) for r in (0.2, 0.5)]
    return methods


def gam(rho: float, alpha: float, rho_prime: float | None = RHO_PRIME) -> dict[str, float]:
    """Options of a GAM method without a bound; `rho_prime=None` leaves that out."""
    return {"rho": rho, "alpha": alpha, **UNBOUNDED} | ({} if rho_prime is None else {"rho_prime": rho_prime})


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line per setting."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header = ["optimizer", "lr", "rho", "rho_prime", "alpha", "seeds", "diverged"]
        writer.writerow([*header, "validation_accuracy", "sd", "eigenvalue", "eigenvalue_sd", "step_ms", "times_base"])
        for r in rows:
            options = r["options"]
            values = [
                r["label"],
                r["base_options"].get("lr", ""),
                *(options.get(k, "") for k in ("rho", "rho_prime", "alpha")),
            ]
            numbers = [r[k] for k in ("test", "test_sd", "eigenvalue", "eigenvalue_sd", "step_ms", "cost")]
            shown = ["" if v is None or math.isnan(v) else f"{v:.4g}" for v in numbers]
            writer.writerow([*values, r["seeds"], r["diverged"], *shown])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.sweep_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=5, help="multiples of 5 use every fold equally (5)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=default_workers())
    options = parser.parse_args(arguments)
    settings = Settings(epochs=options.epochs, validation=True, curves=False)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    start = time.perf_counter()
    runs = run_all([(method, seed, settings) for seed in seeds for method in grid()], options.workers)
    wall_s = round(time.perf_counter() - start, 1)
    result = document(runs, summary(runs), settings, workers=options.workers, wall_s=wall_s)
    for run in result["runs"]:
        del run["curves"]
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(summary(runs), options.out / "sweep_digits.csv")
    (options.out / "sweep_digits.json").write_text(json.dumps(result, indent=1) + "\n")
    save(result, options.out / "sweep_digits.png")
    print((options.out / "sweep_digits.csv").read_text())


if __name__ == "__main__":
    main()
