"""Lists that are run to their end, in random order: how much of each was done within the time is what the part tells."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from soak import conformance, interruptions
from soak.turns import Turns

# The cases of each, and what checks one.
LISTS: dict[str, tuple[Callable[[], list], Callable[[Any], None]]] = {
    "checkpoints into another backend": (conformance.loads, conformance.goes_on_elsewhere),
    "schedulers against torch": (conformance.scheduled, conformance.follows_torch),
    "losses in the right direction": (conformance.directions, conformance.goes_where_it_should),
    "exceptions": (interruptions.exceptions, interruptions.loses_nothing),
    "numbers that are not finite": (interruptions.numbers, interruptions.leaves_no_trace),
}


def run(seconds: float = float("inf"), number: int = 0, count: int | None = None) -> dict[str, Any]:
    """`count`: so many of each."""
    cases = {name: made() for name, (made, _) in LISTS.items()}
    for some in cases.values():
        random.Random(number).shuffle(some)
    todo = [(name, case) for name, some in cases.items() for case in some[:count]]
    turns, done = Turns("lists", seconds, len(todo)), Counter[str]()
    for turn in turns:
        name, case = todo[turn]
        try:
            LISTS[name][1](case)
        except Exception as error:
            turns.fail(f"{name}, {case}: {type(error).__name__}: {error}")
        done[name] += 1
    return turns.figures(done={name: f"{done[name]} of {len(some)}" for name, some in cases.items()})
