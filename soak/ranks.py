"""A training over two ranks in which steps fail at random, on one rank or on both; no bit is lost and replicas stay equal.

After a failure on both they go on together; with "local" a rank that failed alone steps again while the other waits. Any
other failure of one rank ends the process group: both start anew from the last checkpoint in a new one.
"""

from __future__ import annotations

import gc
import itertools
import random
import re
import tempfile
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from gam_helpers import PASSES
from rank_faults import GONE, PLACES, Fault, Training, hang_up
from ranks import agree, fingerprint, full, group
from ranks import run as on_ranks

from soak.faults import EXCEPTIONS, NOT_FINITE, bits_lost, memory_slopes, resident
from soak.turns import Turns

TRAININGS = [
    ("local", "finite_difference", "adamw"),
    ("fsdp", "accelerated", "sgd"),
    ("global", "finite_difference", "sgd"),
    ("local", "accelerated", "foreign"),
    ("fsdp", "finite_difference", "foreign"),
    ("global", "exact", "adamw"),
    ("local", "exact", "sgd"),
    ("fsdp", "sam", "adamw"),
    ("global", "gsam", "foreign"),
]
KINDS = {"step": 8, "both": 3, "number": 3, "alone": 3, "end": 2}
MEMORY = 500  # bytes a turn that Python's memory may grow; torch keeps 2 KB of each process group, one in 9 turns


class Rank:
    """One rank's part: what is random (the same on both ranks), what trainings have saved, and what was found."""

    def __init__(self, rank: int, number: int, turns: Turns, folder: str):
        self.rank, self.turns, self.folder = rank, turns, folder
        self.chance = random.Random(number)
        self.kinds, self.lost = Counter[str](), 0
        self.saved: dict[int, Any] = {}  # what each training held when it was saved
        self.losses: dict[int, list[float]] = {}
        self.marks: list[tuple[int, int, int]] = []  # turn, traced bytes, resident bytes, between process groups

    def go(self, numbers: Iterator[int]) -> None:
        """The trainings in turn, each in a process group of its own, as long as rank 0 says."""
        groups, going = itertools.count(), True
        while going:
            number = next(groups)
            i = number % len(TRAININGS)
            with group(self.rank, 2, f"{self.folder}/group-{number}"):
                training = self.begin(i)
                on = True
                while on and (going := self.goes_on(numbers)):
                    on = self.turn(i, training)
            del training  # holds the connections
            gc.collect()
            self.marks.append((sum(self.kinds.values()), tracemalloc.get_traced_memory()[0], resident()))

    def goes_on(self, numbers: Iterator[int]) -> bool:
        going = torch.tensor(int(self.rank == 0 and next(numbers, None) is not None))
        dist.broadcast(going, 0)
        return bool(going)

    def begin(self, i: int) -> Training:
        """A new training, or from its last checkpoint."""
        training = Training(*TRAININGS[i])
        if i in self.saved:
            training.load(f"{self.folder}/{i}")
            self.note(training, "restart", bits_lost(training.now(), self.saved[i]))
        else:
            self.losses[i] = [training.step().item()]
        return training

    def save(self, i: int, training: Training) -> None:
        training.save(f"{self.folder}/{i}")
        self.saved[i] = training.now()

    def turn(self, i: int, training: Training) -> bool:
        """One step, or failure. Returns whether the process group goes on."""
        kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "alone" and training.way != "local":
            kind = "both"
        self.kinds[kind] += 1
        number, error = self.chance.randrange(PASSES[training.method]), self.chance.choice(EXCEPTIONS)
        places = [p for p in PLACES if p != "backward" or training.method != "exact"]
        if kind != "end":
            places.remove("collective")
        if kind == "both" and training.way == "global":
            places.remove("inside backward")  # after which DDP itself does not go on
        fault, bad = Fault(number, self.chance.choice(places), error), self.rank == self.chance.randrange(2)
        not_finite = Fault(number, "number", self.chance.choice(NOT_FINITE))
        if kind == "end":
            self.save(i, training)
            self.ends(training, fault if bad else None)
            return False
        if kind == "both" or (kind == "alone" and bad):
            self.fails(training, fault)
        elif kind == "number":
            self.skips(training, not_finite if bad else None)
        self.losses[i][1:] = [training.step().item()]
        if not agree(fingerprint(full(training.model.parameters()))):
            self.turns.fail(f"{self.told(training)}, {kind}: replicas differ")
        return True

    def fails(self, training: Training, fault: Fault) -> None:
        before = training.now()
        try:
            training.step(fault)
        except fault.error:
            self.note(training, str(fault), bits_lost(training.now(), before))
        else:
            self.turns.fail(f"{self.told(training)}: {fault} was swallowed")

    def skips(self, training: Training, fault: Fault | None) -> None:
        before, skipped = training.now(), training.optimizer.skipped_steps
        training.step(fault)
        now = training.now()
        self.note(training, "number", sum(bits_lost(now[k], before[k]) for k in ("weights", "state", "buffers")))
        if training.optimizer.skipped_steps != skipped + 1:
            self.turns.fail(f"{self.told(training)}: a step with a number that is not finite was not skipped")

    def ends(self, training: Training, fault: Fault | None) -> None:
        """One rank fails and closes its connections. The other's step fails too, or was whole already."""
        before, steps = training.now(), training.optimizer.session.steps_taken
        try:
            training.step(fault)
        except BaseException as error:
            if (fault is None or fault.place == "collective") and not re.search(GONE, str(error)):
                self.turns.fail(f"{self.told(training)}: {type(error).__name__}: {error}")
        if training.optimizer.session.steps_taken == steps:
            self.note(training, str(fault), bits_lost(training.now(), before))
        if fault:
            hang_up()

    def note(self, training: Training, what: str, lost: int) -> None:
        self.lost += lost
        if lost:
            self.turns.fail(f"{self.told(training)}, {what}: {lost} bits are not as they should be")

    def told(self, training: Training) -> str:
        return f"rank {self.rank}, {training.way}, {training.method}"

    def figures(self) -> dict[str, Any]:
        enough = self.turns.done > 60 * len(TRAININGS)
        fell = [losses[-1] < losses[0] for losses in self.losses.values()]
        if enough and not all(fell):
            self.turns.fail(f"rank {self.rank}: losses fell in {sum(fell)} of {len(fell)} trainings: {self.losses}")
        traced, whole = memory_slopes(self.marks if len(self.marks) > 4 * len(TRAININGS) else [])
        if traced > MEMORY:
            self.turns.fail(f"rank {self.rank}: Python's memory grows by {traced:.0f} bytes a turn")
        figures = {"kinds": dict(self.kinds), "bits_lost": self.lost, "traced_bytes_per_turn": traced}
        return self.turns.figures(**figures, resident_bytes_per_turn=whole, losses_fell=f"{sum(fell)} of {len(fell)}")


def _on_rank(rank: int, seconds: float, number: int, count: int | None, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # of torch.distributed.checkpoint, about tensors that are not sharded
    dist.barrier()  # the time starts when both are there
    turns = Turns("ranks", seconds, count)
    part = Rank(rank, number, turns, folder)
    tracemalloc.start()
    part.go(iter(turns))
    turns.done = sum(part.kinds.values())
    return part.figures()


def run(seconds: float = float("inf"), number: int = 0, count: int | None = None) -> dict[str, Any]:
    """Turn by turn: one training takes a step, or fails to, on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = on_ranks(2, _on_rank, seconds, number, count, folder, limit=seconds + 240)
    for name in ("failed", "bits_lost", "failures"):
        first[name] += second[name]
    return first
