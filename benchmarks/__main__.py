"""What GAM costs on this machine: one table, in under ten minutes, and pictures. `make bench`.

    python -m benchmarks [--minutes 8] [--suites training optimizer ...] [--out out] [--device cuda]

Suites run one after the other, each with its share of the time and its important cells first; what there was no time for is
listed. More minutes measure more: `make bench ARGS="--minutes 40"` all of it on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import communication
from benchmarks.machine import machine, slug
from benchmarks.report import compare, tables, write
from benchmarks.suites import run_suite

RESULTS = Path(__file__).parent / "results"
SHARES = {"training": 0.42, "optimizer": 0.28, "kernels": 0.15, "scaling": 0.1, "communication": 0.05}  # of the time


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing further begins (8)")
    parser.add_argument("--suites", nargs="+", choices=SHARES, default=list(SHARES), help="(all)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON, Markdown and pictures (out/)")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds after which a case that is late is killed (120)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(a GPU if there is one)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    options = parser.parse_args(given)
    facts = machine(torch.device(options.device))
    record: dict[str, Any] = {"machine": facts, "minutes": options.minutes, "suites": {}}
    path = options.out / f"{slug(facts)}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    left = 60 * options.minutes
    for name in options.suites:
        share = SHARES[name] / sum(SHARES[later] for later in options.suites[options.suites.index(name) :])
        print(f"{name}: {share * left:.0f} s", flush=True)
        start = time.monotonic()
        if name == "communication":
            network, worlds = ("digits", (1, 2)) if options.rehearse else ("resnet18_cifar", (1, 2, 4))
            record[name] = communication.measure(network, worlds, limit=max(share * left, 60))
        else:
            run = {"device": options.device, "rehearse": options.rehearse, "grace": options.grace}
            record["suites"][name] = run_suite(name, seconds=share * left, **run)
        left -= time.monotonic() - start
        path.write_text(json.dumps(record, indent=1) + "\n")  # at once: a run that is stopped leaves what it has measured
    write(record, path)
    print(tables.summary(record))
    print(f"\nWrote {path}, {path.with_suffix('.md').name} and pictures in {path.parent}.")
    before = RESULTS / path.name
    if before.exists() and before.resolve() != path.resolve() and not options.rehearse:
        old = json.loads(before.read_text())
        print(f"Compared with {before.name} of commit {old['machine']['commit']}:\n{compare.text(old, record)}")
    return any(suite["failed"] for suite in record["suites"].values())


if __name__ == "__main__":
    sys.exit(main())
