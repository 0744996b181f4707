"""Properties of whole steps, on random cases."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import ulp
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from gam_fused import available_backends
from soak.cases import DTYPES, RUNS, Case, cases
from soak.turns import Turns

FLOAT64 = 1e-9  # of a tensor's norm, as in tests/test_against_float64.py
BACKENDS = [name for name in ("reference", "torch", "cpp") if not available_backends()[name]]
FAST = BACKENDS[-1]
LUCK = 4  # other values on which plain torch's error is taken too: on a few numbers it may be small by luck


def near(actual: list[Tensor], wanted: list[Tensor], what: str) -> None:
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        error = (a.double() - w).norm().item()
        assert error <= FLOAT64 * max(w.norm().item(), 1.0), f"{what}: tensor {i} is off by {error:.3g}"


def float64_steps(case: Case) -> None:
    """Every backend takes the steps that the independent implementation takes."""
    exact = case.exact()
    for backend in BACKENDS:
        near(case.run(backend), exact, backend)


def worst(actual: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> float:
    """The largest error in units of the last place of the tensor's largest weight."""
    pairs = [(a, w) for a, w in zip(actual, exact, strict=True) if w.numel()]
    return max(((a.double() - w).abs().max() / ulp(w.abs().max(), dtype)).item() for a, w in pairs)


def tolerance_rule(case: Case) -> None:
    """Below float64: at most twice the error of plain torch, plus one unit in the last place."""
    others = [replace(case, seed=case.seed + 10_001 * (1 + i)) for i in range(LUCK)]
    allowed = 1 + 2 * max(worst(c.run("torch", 1), c.exact(1), case.dtype) for c in (case, *others))
    error = worst(case.run(FAST, 1), case.exact(1), case.dtype)
    assert error <= allowed, f"{FAST} is {error:.1f} ulp off, allowed are {allowed:.1f}"


def equal_bits(a: list[Tensor], b: list[Tensor], what: str) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"{what}: {int((x != y).sum())} of {x.numel()} numbers of tensor {i} differ"


def scale_invariance(case: Case) -> None:
    """A loss that is 2^k times as large, with a step size 2^k times as small, takes the same step, bit for bit."""
    plain = [{**g, "weight_decay": 0.0} for g in case.group_options]
    options = {k: v for k, v in case.options.items() if k != "max_grad_norm"} | {"xi": 0.0}
    case = replace(case, base="sgd", options=options, group_options=[sgd(g) for g in plain])
    for backend in BACKENDS:
        wanted = case.run(backend)
        for factor in (2.0**6, 2.0**-5):
            groups = [{**g, "lr": g["lr"] / factor} for g in case.group_options]
            scaled = replace(case, scale=factor, group_options=groups)
            equal_bits(scaled.run(backend), wanted, f"{backend}, loss times {factor}")


def sgd(group: dict) -> dict:
    """The same group for SGD."""
    names = ("momentum", "dampening", "nesterov", "weight_decay", "rho", "lr", "perturb", "maximize")
    return {k: v for k, v in group.items() if k in names}


def order_and_groups(case: Case) -> None:
    """Another order of the parameters, and groups cut in two, change rounding only."""
    chance = random.Random(case.seed)
    order = list(range(len(case.tensors)))
    chance.shuffle(order)

    def halves(params: list[Tensor]) -> list[dict]:
        cut = []
        for group in case.param_groups(params):
            middle = chance.randint(0, len(group["params"]))
            parts = group["params"][:middle], group["params"][middle:]
            cut += [{**group, "params": part} for part in parts if part]
        return cut

    for backend in BACKENDS:
        wanted = case.run(backend)
        ordered = case.run(backend, groups=lambda params: case.param_groups(params, order))
        near(ordered, wanted, f"{backend}, another order")
        near(case.run(backend, groups=halves), wanted, f"{backend}, groups cut in two")


def threads_and_runs(case: Case) -> None:
    """The same bits whatever the number of threads, and every time."""
    wanted = case.run(FAST, 2)
    for threads in (1, 2, 3, 5):
        equal_bits(case.run(FAST, 2, threads=threads), wanted, f"{threads} threads")


# Each property, and what it is tried on.
PROPERTIES: dict[str, tuple[Callable[[Case], None], Any]] = {
    "steps in float64": (float64_steps, cases()),
    "the tolerance rule": (tolerance_rule, cases(tuple(DTYPES))),
    "scale of the loss": (scale_invariance, cases((torch.float64, torch.float32))),
    "order and groups": (order_and_groups, cases()),
    "threads and runs": (threads_and_runs, cases((torch.float32, torch.bfloat16), large=True)),
}


def attempt(name: str, examples: int, number: int | None = None) -> int:
    """Try a property on so many cases, always the same ones without a number. Returns on how many it was tried.

    Raises:
        AssertionError: what the smallest failing case found; its notes tell the case.
    """
    check, strategy = PROPERTIES[name]
    tried = 0

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=number is None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(strategy)
    def tries(case: Case) -> None:
        nonlocal tried
        tried += 1
        check(case)

    (tries if number is None else seed(number)(tries))()
    return tried


def run(seconds: float, number: int = 0) -> dict[str, Any]:
    turns, tried = Turns("properties", seconds), dict.fromkeys(PROPERTIES, 0)
    RUNS.clear()
    for turn in turns:
        name = list(PROPERTIES)[turn % len(PROPERTIES)]
        try:
            tried[name] += attempt(name, 10, 1000 * number + turn)
        except Exception as error:
            turns.fail(f"{name}: {error}\n" + "\n".join(getattr(error, "__notes__", [])))
    return turns.figures(cases=tried, runs=dict(RUNS))
