"""Complete lists: every exception in every place of every pass, numbers that are not finite in every parameter."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from gam_helpers import EVERY_PASS, weights

from soak.faults import BACKENDS, BASES, EXCEPTIONS, NOT_FINITE, Number, Training, places_of, with_fault, with_gradient

ONCE = ("step hook", "base")  # places that are no part of a pass
PARAMETERS = 6  # of the net of `Training`
ENDS = (0, -1)  # of a parameter: its first element and its last


class Fault(NamedTuple):
    method: str
    base: str
    backend: str
    k: int  # the pass
    place: str
    error: type[BaseException]


def exceptions() -> list[Fault]:
    return [
        Fault(method, base, backend, k, place, error)
        for (method, k), base, backend, error in itertools.product(EVERY_PASS, BASES, BACKENDS, EXCEPTIONS)
        for place in places_of(method, base)
        if k == 0 or place not in ONCE
    ]


@functools.cache
def training(method: str, base: str, backend: str) -> Training:
    """A training after its first steps, and as many more as cases before have added."""
    started = Training(method, base, backend)
    started.step(), started.step()
    assert len(weights(started.optimizer)) == PARAMETERS
    return started


def loses_nothing(case: Fault) -> None:
    """No bit of weights, buffers, state and generators; and the next step is made."""
    run = training(*case[:3])
    assert with_fault(run, case.k, case.place, case.error) == 0
    before = weights(run.optimizer)
    run.step()
    assert not all(map(torch.equal, weights(run.optimizer), before)), "the next step moves the weights"


class Spoiled(NamedTuple):
    method: str
    base: str
    backend: str
    k: int  # the pass
    number: Number
    first: bool  # whether in the first step, when there is no state yet


def numbers() -> list[Spoiled]:
    spots = itertools.product(NOT_FINITE, range(PARAMETERS), ENDS)
    places = itertools.product(EVERY_PASS, BASES, BACKENDS, [Number(*spot) for spot in spots], (True, False))
    return [Spoiled(method, base, backend, k, number, first) for (method, k), base, backend, number, first in places]


def leaves_no_trace(case: Spoiled) -> None:
    """No bit of weights and state, and the step is counted."""
    run = Training(*case[:3]) if case.first else training(*case[:3])
    assert with_gradient(run, case.k, case.number) == 0
