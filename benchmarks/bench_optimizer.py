"""Whole steps of an optimizer alone, gradients prepared: torch's own, the baselines, and FusedGAM in every backend.

A step is timed until its work is done. From a million elements on the last-level cache is flushed before each; smaller
ones run warm. On a GPU host time is told beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import Case, Plan, blocks_of
from benchmarks.clock import Clock, backends_on, launches
from benchmarks.contestants import PASSES, Gradients, Implementation, elements, main_methods, parameters, triad
from benchmarks.networks import Shapes, shapes

YARDSTICK, CLOSURE = "triad", "closures alone, 4 passes"
METHODS = ("sam", "finite_difference", "accelerated")
MAIN = ("tiny, SGD", "resnet50, SGD", "resnet50, AdamW")
LATER = ("vit_b_32, SGD", "transformer_1b, SGD", "tiny, AdamW", "vit_b_32, AdamW", "transformer_1b, AdamW")


def cases(plan: Plan) -> list[Case]:
    """The important cells first, and of those the ones that are soon measured."""
    backends = backends_on(plan.device)
    first = sorted(MAIN, key=lambda cell: cell.startswith("tiny") and plan.device.type == "cuda")
    main, later = ({cell: [*main_methods(cell.split(", ")[1], backends)] for cell in cells} for cells in (first, LATER))
    both = [Implementation("SGD", method, backends[0], flatten) for method in METHODS for flatten in (False, True)]
    every = [Implementation("SGD", method, backend) for backend in backends for method in METHODS]
    groups = main | {f"{network}, SGD, flatten": both for network in ("tiny", "resnet50")}
    groups |= {f"{network}, SGD, backends": every for network in ("tiny", "resnet50")} | later
    result = []
    for cell, implementations in groups.items():
        network = cell.split(", ")[0]
        if network == "tiny" or not plan.rehearse:
            entries: dict[str, Any] = {YARDSTICK: (network, None), CLOSURE: (network, None)}
            result += blocks_of(cell, entries | {str(i): (network, i) for i in implementations}, plan)
    return result


def bench_step(benchmark: Any, case: Case, plan: Plan, clock: Clock) -> None:
    network, implementation = case.what
    benchmark.extra_info["network"] = network
    measure_step(benchmark, case, plan, clock, shapes(network), implementation)


def measure_step(
    benchmark: Any, case: Case, plan: Plan, clock: Clock, sizes: Shapes, implementation: Implementation | None
) -> None:
    """Measure `implementation` on parameters of the given shapes; None for the yardstick and the closure alone."""
    copies = implementation.copies if implementation else 3 if case.contestant == YARDSTICK else 6
    if (needed := 4 * elements(sizes) * copies) > (free := clock.free()):
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
    facts: dict[str, Any] = {"tensors": len(sizes), "elements": elements(sizes)}
    if implementation:
        i = implementation
        prepare, run = i.on(parameters(sizes, plan.device))
        facts |= {"base": i.base, "method": i.method, "by": i.by, "flatten": i.flatten, "passes": PASSES[i.method]}
    elif case.contestant == YARDSTICK:
        prepare, run = (lambda: None), triad(elements(sizes), plan.device)
    else:
        gradients = Gradients(parameters(sizes, plan.device))
        prepare, run = gradients.prepare, gradients.closures_alone
    if elements(sizes) >= 10**6:
        prepare = _cold(prepare, clock)
    for _ in range(2):
        prepare()
        run()
    if case.block == 0:
        prepare()
        facts |= launches(run)
    if clock.on_gpu:
        facts["host_ms"] = 1e3 * statistics.median(clock.host(prepare, run) for _ in range(5))
    benchmark.extra_info.update(facts)
    rounds = 2 if plan.rehearse else 50 if elements(sizes) < 10**6 else 5
    benchmark.pedantic(run, setup=prepare, rounds=rounds, warmup_rounds=1)


def _cold(prepare: Callable[[], object], clock: Clock) -> Callable[[], None]:
    def prepared_and_cold() -> None:
        prepare()
        clock.flush_caches()

    return prepared_and_cold
