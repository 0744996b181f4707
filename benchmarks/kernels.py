"""One launch of every kernel: its operands, the bytes they hold and the arithmetic it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gam_fused.backends.tensor_lists import EMPTY, Layout, TensorList
from gam_fused.constants import Algorithm, Column, Control


@dataclass
class Kernel:
    """What one launch does.

    Attributes:
        run: called with the backend and the operands.
        flops: additions, multiplications, divisions and square roots for an element.
        reads: names of the operands it reads once.
        writes: of those it writes once.
    """

    run: Callable[[Any, Operands], None]
    flops: int
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()


class Operands:
    """Lists of N elements by name; lists of the optimizer's own last, gradients do not. `acc` is float32 for bfloat16."""

    LASTING = ("theta", "backup", "first", "second")

    def __init__(self, elements: int, tensors: int, dtype: torch.dtype, device: torch.device):
        self.device, size = device, elements // tensors
        self.elements = size * tensors
        self.layout = Layout([size] * tensors, [0] * tensors, [True] * tensors)
        self.lists: dict[str, TensorList] = {}
        for number, name in enumerate((*self.LASTING, "x", "y", "acc")):
            kind = torch.promote_types(dtype, torch.float32) if name == "acc" else dtype
            generator = torch.Generator(device).manual_seed(number)
            values = torch.rand(self.elements, generator=generator, device=device).mul_(1e-2).to(kind)
            parts = [part.clone() for part in values.split(size)]
            self.lists[name] = TensorList(parts, lasting=name in self.LASTING)
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.steps = TensorList([torch.zeros((), device=device) for _ in range(tensors)], lasting=True)
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

    def moved(self, kernel: Kernel) -> int:
        """Bytes that one launch of `kernel` reads and writes, each operand once."""
        return self._bytes(kernel.reads) + self._bytes(kernel.writes)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(t.nbytes for name in names for t in self.lists[name].tensors)


def _norm(*names: str) -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        x, y = o[names[0]], o[names[1]] if len(names) > 1 else EMPTY
        backend.squared_norm(o.layout, x, y, EMPTY, o.partials[:2])

    return Kernel(run, 2 if len(names) == 1 else 3, names)


def _products() -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        backend.direction_products(o.layout, o["x"], o["y"], o["acc"], o.coefficients, o.partials)

    return Kernel(run, 9, ("x", "y", "acc"))  # h+ of 3 operations, three products summed


def _perturb(ascent: int, flops: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        base, y = (o["backup"], o["y"]) if ascent == 1 else (EMPTY, EMPTY)
        acc, backup = o["acc"] if ascent == 2 else EMPTY, o["backup"] if ascent == 0 else EMPTY
        tail = (o.coefficients, o.finished[:2], o.control, o.sums, ascent, False)
        backend.perturb_(o.layout, o["theta"], base, o["x"], y, acc, backup, *tail)

    return Kernel(run, flops, reads, writes)


def _update(algorithm: Algorithm, *, x1: bool) -> Kernel:
    adam = algorithm == Algorithm.ADAM
    state = ("first", "second") if adam else ("first",)

    def run(backend: Any, o: Operands) -> None:
        lists = (o["theta"], o["backup"], o["y"] if x1 else EMPTY, o["x"], o["acc"])
        tail = (o.steps, o.coefficients, o.finished[: 6 if x1 else 2], o.control, o.sums, algorithm)
        backend.combined_update_(o.layout, *lists, o["first"], o["second"] if adam else EMPTY, EMPTY, *tail)

    flops = (7 if x1 else 4) + (14 if adam else 5)  # the direction, then the base optimizer
    return Kernel(run, flops, ("backup", *(("y",) if x1 else ()), "x", "acc", *state), ("theta", *state))


def _combine() -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        x = o["x"]
        backend.combine_(o.layout, x, EMPTY, x, o["acc"], o.coefficients, o.finished[:2], o.control, o.sums)

    return Kernel(run, 4, ("x", "acc"), ("x",))


KERNELS = {
    "squared_norm": _norm("x"),
    "squared_norm of a difference": _norm("x", "y"),
    "direction_products": _products(),
    "perturb_, first": _perturb(0, 2, ("theta", "x"), ("theta", "backup")),
    "perturb_, second": _perturb(1, 3, ("backup", "x", "y"), ("theta",)),
    "perturb_, third": _perturb(2, 5, ("theta", "x", "acc"), ("theta", "acc")),
    "combined_update_, SGD, finite_difference": _update(Algorithm.SGD, x1=False),
    "combined_update_, SGD, accelerated": _update(Algorithm.SGD, x1=True),
    "combined_update_, Adam, finite_difference": _update(Algorithm.ADAM, x1=False),
    "combine_": _combine(),
    "restore_": Kernel(lambda backend, o: backend.restore_(o.layout, o["theta"], o["backup"]), 0, ("backup",), ("theta",)),
}
