"""The optimizer's own cost against the number of parameters, and against that of the tensors they are cut into."""

from __future__ import annotations

from typing import Any

from benchmarks.bench_optimizer import measure_step
from benchmarks.cases import Case, Plan, blocks_of
from benchmarks.clock import Clock, backends_on
from benchmarks.contestants import FOREACH, TORCH_FUSED, Implementation

PARAMETERS = [(10**exponent, 100) for exponent in (5, 6, 7, 8, 9)]
TENSORS = [(10**6, 10), (10**6, 1000), (10**6, 5000)]  # with (10^6, 100) of the above


def cases(plan: Plan) -> list[Case]:
    """Small ones first."""
    backend = backends_on(plan.device)[0]
    contestants = [Implementation("SGD", "base", TORCH_FUSED)]
    contestants += [
        Implementation("SGD", method, by) for method in ("sam", "finite_difference") for by in (FOREACH, backend)
    ]
    sizes = [(10**4, 10)] if plan.rehearse else sorted(PARAMETERS + TENSORS)
    result = []
    for elements, tensors in sizes:
        shapes = ((elements // tensors,),) * tensors
        entries: dict[str, Any] = {str(i): (shapes, i) for i in contestants}
        result += blocks_of(f"{elements} elements in {tensors} tensors", entries, plan)
    return result


def bench_scaling(benchmark: Any, case: Case, plan: Plan, clock: Clock) -> None:
    shapes, implementation = case.what
    measure_step(benchmark, case, plan, clock, shapes, implementation)
