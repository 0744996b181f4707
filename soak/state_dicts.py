"""State dicts with random damage: an error after which nothing has changed, or a load after which a step works."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import torch
from gam_helpers import METHODS, batch, freeze, make, mlp, regression, weights

from soak.faults import bits_lost
from soak.turns import Turns

BASES = (torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam)
FOREIGN = torch.optim.NAdam
# What is not damaged: flags at which torch looks itself, and settings that ask for more than the step here is given.
FLAGS = {"foreach", "fused", "capturable", "differentiable", "amsgrad", "flatness_fraction"}
REFUSALS = (ValueError, TypeError, KeyError)
VALUES = [None, -1, 0, 3, 2**70, 0.5, float("nan"), float("inf"), "two", True, [], [1], {}, {"a": 1}, (0.1, 0.2), b"x"]
TENSORS = [
    torch.tensor(float("nan")),
    torch.ones(1, 1),
    torch.ones(0),
    torch.ones(7, 7),
    torch.ones(5, 3, dtype=torch.int64),
]


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place inside nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in inner for p in ((*path, k), *paths(v, (*path, k)))]


def damage(state: Any, chance: random.Random) -> str:
    """Change one place; tells which, and how."""
    *outer, last = chance.choice([path for path in paths(state) if path[-1] not in FLAGS])
    place = state
    for key in outer:
        place = place[key]
    old = place[last]
    how = chance.choice(["gone", "other", "other", "tensor", "shape", "dtype"])
    if how == "gone":
        del place[last]
    elif isinstance(old, torch.Tensor) and how in ("shape", "dtype"):
        place[last] = old[None].repeat(2, *[1] * old.dim()) if how == "shape" else old.to(torch.int32)
    else:
        place[last] = copy.deepcopy(chance.choice(TENSORS if how == "tensor" else VALUES))
    was = type(old).__name__ if isinstance(old, dict | list) else repr(old)[:40]
    return f"{[*outer, last]}: {was} {how} {place_of(place, last)}"


def place_of(place: Any, last: Any) -> str:
    present = last in place if isinstance(place, dict) else last < len(place)
    return f"-> {place[last]!r}"[:120] if present else ""


def everything(optimizer: Any) -> list:
    return [freeze(optimizer.state_dict()), weights(optimizer), freeze(dict(vars(optimizer.settings)))]


def run(seconds: float = float("inf"), number: int = 0, count: int | None = None) -> dict[str, Any]:
    turns, outcomes = Turns("state_dicts", seconds, count), Counter[str]()
    for turn in turns:
        chance = random.Random(f"{number} {turn}")
        model, base, method = mlp(), chance.choice(BASES), chance.choice(METHODS)
        loss_fn = regression(model, *batch())
        optimizer = make(model.parameters(), base, method)
        optimizer.step(loss_fn)
        state = copy.deepcopy(optimizer.state_dict())
        told = f"{method}, {base.__name__}: " + "; ".join(damage(state, chance) for _ in range(chance.choice([1, 1, 2])))
        before = everything(optimizer)
        try:
            optimizer.load_state_dict(state)
        except Exception as error:
            outcomes["refused"] += 1
            if not isinstance(error, REFUSALS) or not str(error):
                turns.fail(f"{told}: {type(error).__name__}: {error}")
            if lost := bits_lost(everything(optimizer), before):
                turns.fail(f"{told}: {lost} bits changed by a load that failed with {error}")
            continue
        outcomes["loaded"] += 1
        try:
            optimizer.step(loss_fn)
        except Exception as error:
            if base is FOREIGN:  # what it needs, only it knows; torch loads it likewise
                outcomes["left to the base"] += 1
                continue
            turns.fail(f"{told}: it loads, but the next step fails: {type(error).__name__}: {error}")
    return turns.figures(outcomes=dict(outcomes))
