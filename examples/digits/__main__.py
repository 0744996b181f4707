"""Trains every method on both base optimizers; prints one table, writes `digits.json` and `digits.png`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from examples.digits import plot
from examples.digits.jobs import default_workers, run_all
from examples.digits.methods import BASES, METHODS, Method
from examples.digits.report import document, row_key, summary, table
from examples.digits.timing import step_times
from examples.digits.training import Settings

TIMING = "ms per step: medians, all methods in turn in one process with one thread, after the runs"
QUICK_METHODS = ("base", "sam", "finite_difference", "finite_difference_part")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="SGD and AdamW against SAM and GAM on scikit-learn's digits, a fifth of the training labels wrong.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for digits.json and digits.png (out/)")
    parser.add_argument("--seeds", type=int, help="runs per method (5)")
    parser.add_argument("--epochs", type=int, default=30, help="(30)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(all)")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="(all)")
    parser.add_argument("--quick", action="store_true", help=f"unless given: 2 seeds of {', '.join(QUICK_METHODS)} only")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="runs at a time, one thread each (cores, <= 8)"
    )
    options = parser.parse_args(arguments)
    seeds = options.seeds or (2 if options.quick else 5)
    settings = Settings(epochs=options.epochs)
    if min(seeds, settings.epochs, options.workers) < 1:
        parser.error("--seeds, --epochs and --workers must be at least 1")

    names = options.methods or (QUICK_METHODS if options.quick else METHODS)
    methods = [Method(name, base) for base in options.bases for name in names]
    print(f"Training {len(methods)} methods, {seeds} seeds each, {settings.epochs} epochs:", flush=True)
    start = time.perf_counter()
    # Seed by seed, so that an interrupted machine disturbs all methods alike.
    runs = run_all([(method, seed, settings) for seed in range(seeds) for method in methods], options.workers)
    print("Timing their steps ...", flush=True)
    times = step_times(methods, settings.batch_size)
    rows = summary(runs, {row_key(asdict(m)): ms for m, ms in zip(methods, times, strict=True)})
    wall_s = time.perf_counter() - start
    result = document(runs, rows, settings, workers=options.workers, wall_s=round(wall_s, 1), timing=TIMING)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "digits.json").write_text(json.dumps(result, indent=1) + "\n")
    plot.save(result, options.out / "digits.png")
    print(f"\n{table(rows)}\n")
    print(f"{seeds} seeds, {settings.epochs} epochs, {wall_s:.0f} s. {TIMING}.")
    print(f"Wrote {options.out / 'digits.json'} and {options.out / 'digits.png'}.")


if __name__ == "__main__":
    main()
