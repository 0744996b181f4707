"""Complete lists, not random ones: losses go where they should, schedulers act as on torch's optimizers, checkpoints of one
backend go on in another. The tests of conformance run parts of them.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gam_helpers import METHODS, batch, close, make, mlp, regression
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop, lr_scheduler
from torch.optim.swa_utils import SWALR
from torch_optim import NAMES, OF_TORCH, REFUSED, Linear, info_of

from gam_fused import FusedGAM, FusedSAM, available_backends

BACKENDS = [name for name in ("reference", "torch", "cpp") if not available_backends()[name]]


def advance(scheduler: Any, loss: Tensor) -> None:
    scheduler.step(loss) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


# -- The loss goes where it should, in every configuration that torch tests, with and without every set of its schedulers. --


class Direction(NamedTuple):
    method: str
    base: str
    backend: str
    configuration: int  # of torch's list for the base
    schedulers: int  # of torch's list for SGD, which is the longest; -1: none


def directions() -> list[Direction]:
    sets = range(-1, len(OF_TORCH["SGD"].scheduler_inputs))
    bases = {name: range(len(OF_TORCH[name].optim_inputs_func("cpu"))) for name in ("SGD", "Adam", "AdamW")}
    kinds = itertools.product(METHODS, bases, BACKENDS)
    return [Direction(*kind, c, s) for kind in kinds for c in bases[kind[1]] for s in sets]


def goes_where_it_should(case: Direction, steps: int = 6) -> None:
    info = info_of(*case[:3])
    given = info.optim_inputs_func("cpu")[case.configuration]
    problem = Linear()
    optimizer = info.optim_cls(problem.params, **copy.deepcopy(given.kwargs))
    made = OF_TORCH["SGD"].scheduler_inputs[case.schedulers] if case.schedulers >= 0 else ()
    schedulers = [scheduler(optimizer) for scheduler in made]
    first = problem().item()
    for _ in range(steps):
        loss = optimizer.step(problem)
        for s in schedulers:
            advance(s, loss)
    risen = problem().item() - first
    assert risen * (1 if given.kwargs["base_kwargs"].get("maximize") else -1) > 0, f"{given.desc}: {risen}"


# -- Schedulers, on FusedSAM at radius 0 and FusedGAM at alpha 0, which are the base optimizer, against the base alone. --


def cycles(optimizer: Optimizer) -> bool:
    """Whether there is a momentum that a scheduler can cycle."""
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def cyclic(mode: str) -> Callable[[Optimizer], Any]:
    return lambda o: lr_scheduler.CyclicLR(
        o, 1e-3, 1e-2, step_size_up=2, mode=mode, gamma=0.9, cycle_momentum=cycles(o), base_momentum=0.7, max_momentum=0.95
    )


def one_cycle(**options: Any) -> Callable[[Optimizer], Any]:
    return lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8, cycle_momentum=cycles(o), **options)


def one_after_another(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def both_at_once(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.4, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.4, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "CyclicLR": cyclic("triangular"),
    "CyclicLR, triangular2": cyclic("triangular2"),
    "CyclicLR, exp_range": cyclic("exp_range"),
    "OneCycleLR": one_cycle(),
    "OneCycleLR, linear, three phases": one_cycle(anneal_strategy="linear", three_phase=True),
    "SequentialLR": one_after_another,
    "ChainedScheduler": both_at_once,
    "SWALR": lambda o: SWALR(o, 1e-3, anneal_epochs=3),
}
BASES = [name for name in NAMES if name not in REFUSED and name in OF_TORCH]


def scheduled() -> list[tuple[str, str, str]]:
    return list(itertools.product(SCHEDULERS, BASES, ("sam", "finite_difference")))


def follows_torch(case: tuple[str, str, str]) -> None:
    """The same settings in every step, the same weights to rounding."""
    scheduler, base, method = case
    kind, mine, theirs = OF_TORCH[base].optim_cls, Linear(torch.float64), Linear(torch.float64)
    options: dict[str, Any] = {"base_kwargs": {"lr": 0.005} | ({"momentum": 0.9} if base in ("SGD", "RMSprop") else {})}
    if method == "sam":
        optimizer: FusedGAM = FusedSAM(mine.params, kind, **options)
        optimizer.param_groups[0][optimizer.rho_key] = 0.0
    else:
        optimizer = FusedGAM(mine.params, kind, max_ratio=None, **options)
        optimizer.alpha = 0.0  # some bases have an alpha, too
    plain = kind(theirs.params, **options["base_kwargs"])

    def closure() -> Tensor:
        plain.zero_grad()
        loss = theirs()
        loss.backward()
        return loss

    pair = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](plain)
    for _ in range(6):
        losses = optimizer.step(mine), plain.step(closure)
        for s, loss in zip(pair, losses, strict=True):
            advance(s, loss.detach())
        for key in ("lr", "momentum", "betas"):
            assert optimizer.param_groups[0].get(key) == plain.param_groups[0].get(key), key
        for p, q in zip(mine.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


# -- A checkpoint that one backend has left goes on in another. --

KEPT: dict[str, tuple[type[Optimizer], dict]] = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "SGD, nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "Adam, amsgrad": (Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (AdamW, {"lr": 0.01}),
    "Adamax": (Adamax, {"lr": 0.01}),
    "RMSprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
}


def loads() -> list[tuple[str, str, str, str]]:
    pairs = itertools.permutations(BACKENDS, 2)
    return [(method, base, *pair) for pair in pairs for method in METHODS for base in KEPT]


def goes_on_elsewhere(case: tuple[str, str, str, str]) -> None:
    """Three steps in one backend, a file, three steps in the other: weights and state of six steps in the first."""
    method, base, first, second = case
    kind, options = KEPT[base]
    data = batch(dtype=torch.float64)
    models = [mlp(torch.float64, seed) for seed in (0, 1)]
    mine, other = (
        make(m.parameters(), kind, method, backend=b, interval=2, **options)
        for m, b in zip(models, (first, second), strict=True)
    )
    steps = [lambda o=o, m=m: o.step(regression(m, *data)) for o, m in zip((mine, other), models, strict=True)]
    for _ in range(3):
        steps[0]()
    file = io.BytesIO()
    torch.save([models[0].state_dict(), mine.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    other.load_state_dict(state)
    for _ in range(3):
        steps[0](), steps[1]()
    close(list(models[1].parameters()), list(models[0].parameters()), 1e-9)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert other.state[q].keys() == mine.state[p].keys()
        for key, value in mine.state[p].items():
            torch.testing.assert_close(other.state[q][key], value, rtol=1e-8, atol=1e-11, msg=key)
    assert other.session.steps_taken == mine.session.steps_taken == 6
