"""GAM on 0, 1/20, 1/10, 1/2 and all of the steps: `python -m studies.interval` (about 15 minutes on two cores).

First alpha is swept at every ratio on validation folds of the training images, seeds from 100 as in the sweep behind the
defaults; then what was chosen, and the default alpha, is judged on the test images with seeds 0, 1, ...; last the cost is
measured in one process. Writes interval.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.digits.jobs import default_workers, run_all
from examples.digits.report import Run, document, without_nan
from examples.digits.training import Settings
from studies.interval import cost, plot, report
from studies.interval.estimates import chosen_alpha, judged, result_rows, sweep_rows
from studies.interval.settings import ALPHAS, GAM, ORACLES, RATIOS, swept
from studies.sweep_digits import FIRST_SEED

QUICK_ALPHAS = dict.fromkeys(RATIOS, (1.0, 4.0))
KEPT = ("base", "name", "options", "base_options", "label", "seed", "test", "train", "loss", "eigenvalue", "skipped_steps")


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The sweep on the validation folds, then the runs judged on the test images; the document without rows and cost."""
    start = time.perf_counter()
    alphas = QUICK_ALPHAS if options.quick else ALPHAS
    folds = Settings(epochs=options.epochs, validation=True, curves=False)
    final = Settings(epochs=options.epochs, curves=False)
    seeds = range(FIRST_SEED, FIRST_SEED + options.validation_seeds)
    methods = swept(options.oracles, alphas)
    print(f"alpha on validation folds: {len(methods)} settings, {len(seeds)} seeds")
    tried = run_all([(method, seed, folds) for seed in seeds for method in methods], options.workers)
    settings = judged(sweep_rows(tried, options.oracles), options.oracles)
    print(f"on the test images: {len(settings)} settings, {options.seeds} seeds")
    methods = [ORACLES[key].method(ratio, alpha or GAM.alpha) for key, ratio, alpha in settings]
    runs = run_all([(method, seed, final) for seed in range(options.seeds) for method in methods], options.workers)
    facts = {"workers": options.workers, "wall_s": round(time.perf_counter() - start, 1), "oracles": options.oracles}
    sweep = {"settings": asdict(folds), "runs": slim(tried)}
    return document(slim(runs), [], final, **facts, fixed={"rho": GAM.rho, "rho_prime": GAM.rho_prime}, sweep=sweep)


def slim(runs: list[Run]) -> list[Run]:
    """Without curves, and without times taken while other runs were under way."""
    return [{key: run[key] for key in KEPT} for run in runs]


def evaluate(result: dict[str, Any]) -> dict[str, Any]:
    """The document with everything that follows from its runs and its cost windows."""
    oracles, sweep = result["oracles"], result["sweep"]
    for run in (*result["runs"], *sweep["runs"]):  # JSON has no NaN
        run |= {key: math.nan if run[key] is None else run[key] for key in ("loss", "eigenvalue")}
    sweep["rows"] = sweep_rows(sweep["runs"], oracles)
    sweep["chosen"] = [
        {"oracle": o, "ratio": r, "alpha": chosen_alpha(sweep["rows"], o, r)} for o in oracles for r in RATIOS
    ]
    rows = result["rows"] = result_rows(result["runs"], sweep["rows"], oracles, result["timing"]["windows"])
    result["claims"] = report.claims(rows, oracles) + report.against_sam(rows, result["runs"], oracles)
    first = ("machine", "arguments", "workers", "wall_s", "settings", "fixed", "oracles", "claims", "rows", "timing")
    return {key: result[key] for key in (*first, "sweep", "runs")}


def write(result: dict[str, Any], folder: Path) -> None:
    """interval.json, .md and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interval.json").write_text(json.dumps(without_nan(result), indent=1) + "\n")
    (folder / "interval.md").write_text(report.page(result))
    plot.save(result, folder / "interval.png")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.interval", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--oracles", nargs="+", choices=ORACLES, default=list(ORACLES), help="where h_loss comes from (all)")
    parser.add_argument("--seeds", type=int, help="on the test images (10)")
    parser.add_argument("--validation-seeds", type=int, help="multiples of 5 use every fold equally (5)")
    parser.add_argument("--epochs", type=int, help="(30)")
    parser.add_argument("--rounds", type=int, help="of cost windows (31)")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--quick", action="store_true", help="2 seeds, 5 epochs, 3 rounds unless given, and two alphas")
    parser.add_argument(
        "--timing-only", action="store_true", help="measure the cost anew; the runs are those of interval.json"
    )
    options = parser.parse_args(given)
    for name, full, quick in (("seeds", 10, 2), ("validation_seeds", 5, 2), ("epochs", 30, 5), ("rounds", 31, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    if min(options.seeds, options.validation_seeds, options.epochs, options.rounds, options.workers) < 1:
        parser.error("counts must be at least 1")
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    result = json.loads((options.out / "interval.json").read_text()) if options.timing_only else train(options)
    result["timing"] = cost.measure(result["oracles"], options.rounds)
    result = evaluate(result)
    write(result, options.out)
    print((options.out / "interval.md").read_text())


if __name__ == "__main__":
    main()
