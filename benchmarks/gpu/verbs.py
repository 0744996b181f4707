"""Bandwidth of every verb in every room, beside a device-to-device copy of the same size in the same rounds.

    python -m benchmarks.gpu.verbs --out verbs.json [--device cuda] [--sizes 1000000 25000000] [--rounds 20]

Bytes are what the operands hold, each read or written once. Operands are 16 tensors of equal size; between timings the L2
cache is overwritten. The JSON is rewritten after every size and dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, rooms_on
from benchmarks.measure import machine, quantiles
from gam_fused import rooms
from gam_fused.constants import Algorithm, Column, Control
from gam_fused.tensor_lists import EMPTY, Layout, TensorList

TENSORS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY = "copy"


@dataclass
class Verb:
    """What one launch does: `run(room, operands)`, and the names of the operands it reads and writes."""

    run: Callable[[Any, Operands], None]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()


class Operands:
    """Lists of N elements by name; lists of the optimizer's own last, gradients do not. `acc` is float32 for bfloat16."""

    LASTING = ("theta", "backup", "first", "second")

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device):
        self.device, size = device, elements // TENSORS
        self.layout = Layout([size] * TENSORS, [0] * TENSORS, [True] * TENSORS)
        self.lists: dict[str, TensorList] = {}
        for number, name in enumerate((*self.LASTING, "x", "y", "acc")):
            kind = torch.promote_types(dtype, torch.float32) if name == "acc" else dtype
            generator = torch.Generator(device).manual_seed(number)
            tensors = [
                torch.randn(size, generator=generator, device=device).abs_().mul_(1e-2).to(kind) for _ in range(TENSORS)
            ]
            self.lists[name] = TensorList(tensors, lasting=name in self.LASTING)
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.steps = TensorList([torch.zeros((), device=device) for _ in range(TENSORS)], lasting=True)
        self.partials = torch.zeros(6, self.layout.chunks, **options)
        self.sums = torch.zeros(self.layout.chunks, **options)
        self.finished = torch.ones(6, self.layout.chunks, **options)
        control = torch.zeros(len(Control), dtype=torch.float64)
        control[Control.LOSS_SCALE], control[Control.EPS] = 1.0, 1e-12
        row = dict.fromkeys(Column, 0.5) | dict.fromkeys(
            (Column.RADIUS_0, Column.RADIUS_1, Column.RADIUS_2, Column.LR), 1e-4
        )
        row |= {Column.FLAGS: 0.0, Column.WEIGHT_DECAY: 1e-4, Column.EPS: 1e-8}
        self.control = control.to(device)
        self.coefficients = torch.tensor([[row[c] for c in Column]], dtype=torch.float64).to(device)

    def __getitem__(self, name: str) -> TensorList:
        """The list `name`; gradients as a list that is new, as they are in every pass."""
        return self.lists[name] if name in self.LASTING else TensorList(self.lists[name].tensors)

    def bytes_of(self, names: Iterable[str]) -> int:
        return sum(t.nbytes for name in names for t in self.lists[name].tensors)


def _norm(*names: str) -> Verb:
    def run(room: Any, o: Operands) -> None:
        x, y = o[names[0]], o[names[1]] if len(names) > 1 else EMPTY
        room.squared_norm(o.layout, x, y, EMPTY, o.partials[:2])

    return Verb(run, names)


def _products() -> Verb:
    def run(room: Any, o: Operands) -> None:
        room.direction_products(o.layout, o["x"], o["y"], o["acc"], o.coefficients, o.partials)

    return Verb(run, ("x", "y", "acc"))


def _perturb(ascent: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Verb:
    def run(room: Any, o: Operands) -> None:
        base, y = (o["backup"], o["y"]) if ascent == 1 else (EMPTY, EMPTY)
        acc, backup = o["acc"] if ascent == 2 else EMPTY, o["backup"] if ascent == 0 else EMPTY
        tail = (o.coefficients, o.finished[:2], o.control, o.sums, ascent, False)
        room.perturb_(o.layout, o["theta"], base, o["x"], y, acc, backup, *tail)

    return Verb(run, reads, writes)


def _update(algorithm: Algorithm, *, x1: bool) -> Verb:
    adam = algorithm == Algorithm.ADAM
    state = ("first", "second") if adam else ("first",)

    def run(room: Any, o: Operands) -> None:
        lists = (o["theta"], o["backup"], o["y"] if x1 else EMPTY, o["x"], o["acc"])
        tail = (o.steps, o.coefficients, o.finished[: 6 if x1 else 2], o.control, o.sums, algorithm)
        room.combined_update_(o.layout, *lists, o["first"], o["second"] if adam else EMPTY, EMPTY, *tail)

    return Verb(run, ("backup", *(("y",) if x1 else ()), "x", "acc", *state), ("theta", *state))


def _combine() -> Verb:
    def run(room: Any, o: Operands) -> None:
        x = o["x"]
        room.combine_(o.layout, x, EMPTY, x, o["acc"], o.coefficients, o.finished[:2], o.control, o.sums)

    return Verb(run, ("x", "acc"), ("x",))


VERBS = {
    "squared_norm": _norm("x"),
    "squared_norm of a difference": _norm("x", "y"),
    "direction_products": _products(),
    "perturb_, first": _perturb(0, ("theta", "x"), ("theta", "backup")),
    "perturb_, second": _perturb(1, ("backup", "x", "y"), ("theta",)),
    "perturb_, third": _perturb(2, ("theta", "x", "acc"), ("theta", "acc")),
    "combined_update_, SGD, finite_difference": _update(Algorithm.SGD, x1=False),
    "combined_update_, SGD, accelerated": _update(Algorithm.SGD, x1=True),
    "combined_update_, Adam, finite_difference": _update(Algorithm.ADAM, x1=False),
    "combine_": _combine(),
    "restore_": Verb(lambda room, o: room.restore_(o.layout, o["theta"], o["backup"]), ("backup",), ("theta",)),
}


def measure(elements: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Quantiles, GB/s and percent of the copy's rate for every verb and room; every round runs all of them."""
    clock, o = Clock(device), Operands(elements, dtype, device)
    source, target = (torch.cat(o.lists[name].tensors) for name in ("x", "y"))
    entries: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(source)}
    moved = {COPY: 2 * source.nbytes}
    for name, verb in VERBS.items():
        for room in rooms_on(device):
            key = f"{name} | {room}"
            entries[key] = lambda verb=verb, room=room: verb.run(rooms._ROOMS[room][0], o)
            moved[key] = o.bytes_of(verb.reads) + o.bytes_of(verb.writes)
    seconds: dict[str, list[float]] = {key: [] for key in entries}
    for number in range(rounds + 2):  # two to warm up: Triton compiles in the first
        for key, run in entries.items():
            taken = clock.kernel(lambda: None, run)
            if number > 1:
                seconds[key].append(taken)
    rates = {key: [moved[key] / t for t in seconds[key]] for key in entries}
    rows = {}
    for key in entries:
        percent = [100 * rate / copy for rate, copy in zip(rates[key], rates[COPY], strict=True)]
        rate = {"GB_per_s": statistics.median(rates[key]) / 1e9, "percent_of_copy": statistics.median(percent)}
        rows[key] = quantiles(seconds[key]) | rate | {"bytes": moved[key]}
    return rows


def needed(elements: int, dtype: torch.dtype) -> int:
    """Bytes of the operands, the copy, and the torch room's intermediates in float32."""
    return elements * (8 * dtype.itemsize + 4 + 6 * 4) + (512 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000_000, 1_000_000, 250_000_000])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for elements in arguments.sizes:
        for name, dtype in DTYPES.items():
            key, free = f"{elements} elements, {name}", Clock(arguments.device).free()
            if needed(elements, dtype) > free:
                results[key] = f"skipped: needs {needed(elements, dtype) / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            else:
                results[key] = measure(elements, dtype, arguments.device, arguments.rounds)
            arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
            print(f"{key}: done")


if __name__ == "__main__":
    main()
