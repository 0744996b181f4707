"""A training in which a step often fails, in every way; after each failure everything is as before, bit for bit."""

from __future__ import annotations

import copy
import gc
import random
import signal
import time
import tracemalloc
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gam_helpers import PASSES, Struck, batch, frozen_without_counters, make, mixed_net, regression, snapshot
from torch import Tensor

from gam_fused import available_backends
from soak.turns import Turns

BACKENDS = [name for name in ("reference", "torch", "cpp") if not available_backends()[name]]
BASES: dict[str, tuple[Any, dict]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "lr": 0.01}),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "lr": 0.01}),
    "adam": (torch.optim.Adam, {"amsgrad": True, "lr": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "foreign": (torch.optim.NAdam, {"lr": 1e-3}),
}
EXCEPTIONS = (ValueError, MemoryError, torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt, SystemExit)
PLACES = ("before", "forward", "backward", "inside backward", "forward hook", "step hook", "base")
NOT_FINITE = (float("inf"), float("-inf"), float("nan"))
POPCOUNT = torch.tensor([n.bit_count() for n in range(256)])


def bits_lost(a: Any, b: Any) -> int:
    """How many bits of two frozen values differ; all of what has another type or shape."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return sum(bits_lost(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return sum(map(bits_lost, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape):
        if torch.equal(a, b):
            return 0
        x, y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return int(POPCOUNT[(x ^ y).long()].sum())
    return 0 if type(a) is type(b) and not isinstance(a, Tensor) and a == b else 64


class Training:
    """A net with dropout and batch norm, and one step of it that fails as it is told to."""

    def __init__(self, method: str, base: str, backend: str):
        self.model, self.method, self.base, self.backend = mixed_net(), method, base, backend
        kind, options = BASES[base]
        self.optimizer = make(self.model.parameters(), kind, method, model=self.model, backend=backend, **options)
        self.loss_fn = regression(self.model, *batch(32))
        self.losses: list[float] = []
        self.fault: tuple[int, str, Any] | None = None  # pass, place, and the exception, or Number
        self.calls = 0
        self.model[0].register_forward_hook(lambda *_: self.strike("forward hook"))
        self.optimizer.register_step_pre_hook(lambda *_: self.strike("step hook"))
        if base == "foreign":
            step = self.optimizer.base_optimizer.step
            self.optimizer.base_optimizer.step = lambda *args: (self.strike("base"), step(*args))[1]

    def __str__(self) -> str:
        return f"{self.method}, {self.base}, {self.backend}"

    def strike(self, place: str) -> None:
        if self.fault and self.fault[1] == place and (place in ("step hook", "base") or self.fault[0] == self.calls - 1):
            raise self.fault[2]("a fault")

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        self.strike("before")
        loss = self.loss_fn()
        self.strike("forward")
        if self.fault and self.fault[0] == self.calls - 1:
            if self.fault[1] == "inside backward":
                loss = Struck.apply(loss, self)
            if self.fault[1] == "number":
                number: Number = self.fault[2]
                loss = loss + list(self.model.parameters())[number.tensor].flatten()[number.element] * number.value
        if self.method != "exact":
            loss.backward()
            self.strike("backward")
        return loss

    def step(self, fault: tuple[int, str, Any] | None = None) -> Tensor:
        self.calls, self.fault = 0, fault
        try:
            return self.optimizer.step(self.closure)
        finally:
            self.fault = None

    def now(self) -> dict:
        return snapshot(self.optimizer, self.model)

    def steps_taken(self) -> int:
        return self.optimizer.state_dict()["param_groups"][0]["gam"]["steps_taken"]

    def put_back(self, weights: dict, state: dict, rng: Tensor) -> None:
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(rng)


class Number(NamedTuple):
    """The gradient of one element of one parameter."""

    value: float
    tensor: int
    element: int


def with_exception(training: Training, chance: random.Random) -> int:
    """One of the exceptions, in some pass or around them. Returns the bits that are not as before."""
    place = chance.choice(places_of(training.method, training.base))
    return with_fault(training, chance.randrange(PASSES[training.method]), place, chance.choice(EXCEPTIONS))


def places_of(method: str, base: str) -> list[str]:
    """Where something may be raised."""
    places = [p for p in PLACES if p != "base" or base == "foreign"]
    return [p for p in places if p != "backward" or method != "exact"]  # its closure does not call it


def with_fault(training: Training, k: int, place: str, error: type[BaseException]) -> int:
    """An exception in pass `k`. Returns the bits that are not as before."""
    fault, before = (k, place, error), training.now()
    try:
        training.step(fault)
    except error:
        now = training.now()
        if fault[1] == "base":  # all passes had been made: what they left stays, but neither weights nor base have changed
            now, before = ([x["weights"], x["state"]["state"]] for x in (now, before))
        return bits_lost(now, before)
    raise AssertionError(f"{fault} was swallowed")


def with_number(training: Training, chance: random.Random) -> int:
    """A number that is not finite in one element of one pass."""
    tensor = chance.randrange(len(shapes := [p.numel() for p in training.model.parameters()]))
    number = Number(chance.choice(NOT_FINITE), tensor, chance.randrange(shapes[tensor]))
    return with_gradient(training, chance.randrange(PASSES[training.method]), number)


def with_gradient(training: Training, k: int, number: Number) -> int:
    """The step is skipped, and counted. Returns the bits that are not as before."""
    before, skipped = frozen_without_counters(training.optimizer), int(training.optimizer.skipped_steps)
    training.step((k, "number", number))
    now = int(training.optimizer.skipped_steps)
    assert now == skipped + 1, f"{now - skipped} steps were counted as skipped"
    return bits_lost(frozen_without_counters(training.optimizer), before)


def with_signal(training: Training, chance: random.Random, lasts: float) -> int:
    """Ctrl-C by a timer at any moment: the step is undone, or whole: what the same step is without it."""
    weights, state = (copy.deepcopy(x.state_dict()) for x in (training.model, training.optimizer))
    before, rng, taken = training.now(), torch.get_rng_state(), training.steps_taken()
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, lasts * chance.random()))
            training.step()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, handler)
    after = training.now()
    if training.steps_taken() == taken:
        return bits_lost(after, before)
    training.put_back(weights, state, rng)
    training.step()
    return bits_lost(training.now(), after)


def resident() -> int:
    """Bytes of memory of this process, where the system tells."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


def run(seconds: float = float("inf"), number: int = 0, count: int | None = None) -> dict[str, Any]:
    """Turn by turn: one training takes a step, or fails to."""
    turns, chance = Turns("faults", seconds, count), random.Random(number)
    torch.manual_seed(number)
    tracemalloc.start()  # before anything is made: what replaces what was not traced would count as growth
    trainings = [Training(*which) for which in product(PASSES, BASES, BACKENDS)]
    kinds, lost, lasts = Counter[str](), 0, {}
    for training in trainings:
        start = time.perf_counter()
        training.losses.append(training.step().item())
        start = time.perf_counter()
        training.losses.append(training.step().item())
        lasts[training] = time.perf_counter() - start
    marks: list[tuple[int, int, int]] = []  # turn, traced bytes, resident bytes
    try:
        for turn in turns:
            training = chance.choice(trainings)
            kind = chance.choices(("step", "exception", "number", "signal"), (4, 3, 2, 1))[0]
            kinds[kind] += 1
            try:
                bits = 0
                if kind == "step":
                    training.losses[2:] = [training.step().item()]
                elif kind == "exception":
                    bits = with_exception(training, chance)
                elif kind == "number":
                    bits = with_number(training, chance)
                else:
                    bits = with_signal(training, chance, lasts[training])
                lost += bits
                if bits:
                    turns.fail(f"{training}, {kind}: {bits} bits are not as they should be")
            except Exception as error:
                turns.fail(f"{training}, {kind}: {type(error).__name__}: {error}")
            if turn % 250 == 249:
                gc.collect()
                marks.append((turn, tracemalloc.get_traced_memory()[0], resident()))
    finally:
        tracemalloc.stop()
    for t in trainings:
        if turns.done > 100 * len(trainings) and not t.losses[-1] < t.losses[0]:
            turns.fail(f"{t}: the loss went from {t.losses[0]:.4f} to {t.losses[-1]:.4f}")
    slopes = dict(zip(("traced_bytes_per_turn", "resident_bytes_per_turn"), memory_slopes(marks), strict=True))
    if slopes["traced_bytes_per_turn"] > 50:
        turns.fail(f"Python's memory grows by {slopes['traced_bytes_per_turn']:.0f} bytes a turn")
    fell = sum(t.losses[-1] < t.losses[0] for t in trainings)
    figures = {"kinds": dict(kinds), "bits_lost": lost, **slopes, "losses_fell": f"{fell} of {len(trainings)}"}
    return turns.figures(**figures)


def memory_slopes(marks: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Bytes a turn over the second half, in which all has been seen once; 0 of too few."""
    marks = marks[len(marks) // 2 :]
    if len(marks) < 4:
        return 0.0, 0.0
    turns = [m[0] for m in marks]
    mean = sum(turns) / len(turns)
    square = sum((t - mean) ** 2 for t in turns)
    return tuple(round(sum((t - mean) * m[i] for t, m in zip(turns, marks, strict=True)) / square, 2) for i in (1, 2))
