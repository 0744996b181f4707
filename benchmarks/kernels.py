"""One launch of every kernel: its operands, the bytes they hold and the arithmetic it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
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
    """Lists of N elements by name; lists of the optimizer's own last, gradients do not. `folded` is float32 for bfloat16."""

    LASTING = ("theta", "backup", "state1", "state2")

    def __init__(self, elements: int, tensors: int, dtype: torch.dtype, device: torch.device):
        self.device, size = device, elements // tensors
        self.elements = size * tensors
        self.layout = Layout([size] * tensors, [0] * tensors, [True] * tensors)
        self.lists: dict[str, TensorList] = {}
        for number, name in enumerate((*self.LASTING, "x", "y", "folded")):
            kind = torch.promote_types(dtype, torch.float32) if name == "folded" else dtype
            generator = torch.Generator(device).manual_seed(number)
            values = torch.rand(self.elements, generator=generator, device=device).mul_(1e-2).to(kind)
            parts = [part.clone() for part in values.split(size)]
            self.lists[name] = TensorList(parts, lasting=name in self.LASTING)
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.steps = TensorList([torch.zeros((), device=device) for _ in range(tensors)], lasting=True)
        self.partials = torch.zeros(6, 1, **options)
        self.sums = torch.zeros(1, **options)
        self.finished = torch.ones(6, 1, **options)
        control = torch.zeros(len(Control), dtype=torch.float64)
        control[Control.LOSS_SCALE], control[Control.EPS] = 1.0, 1e-12
        row = dict.fromkeys(Column, 0.5) | dict.fromkeys(
            (Column.RADIUS_0, Column.RADIUS_1, Column.RADIUS_2, Column.LR), 1e-4
        )
        row |= {Column.FLAGS: 0.0, Column.WEIGHT_DECAY: 1e-4, Column.EPS: 1e-8}
        self.control = control.to(device)
        self.coefficients = torch.tensor([[row[c] for c in Column]], dtype=torch.float64).to(device)
        self.tables = {"coefficients": self.coefficients, "control": self.control}

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
        backend.squared_norm(SquaredNorm(layout=o.layout, x=x, y=y, partials=o.partials[:2]))

    return Kernel(run, 2 if len(names) == 1 else 3, names)


def _products() -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        lists = {"g1": o["x"], "last": o["y"], "folded": o["folded"]}
        backend.direction_products(
            DirectionProducts(layout=o.layout, **lists, coefficients=o.coefficients, partials=o.partials)
        )

    return Kernel(run, 9, ("x", "y", "folded"))  # h+ of 3 operations, three products summed


def _perturb(ascent: int, flops: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        extra = {0: {"backup": o["backup"]}, 1: {"base": o["backup"], "y": o["y"]}, 2: {"folded": o["folded"]}}[ascent]
        tables = {**o.tables, "partials": o.finished[:2], "realised": o.sums}
        backend.perturb_(Perturb(layout=o.layout, theta=o["theta"], x=o["x"], **extra, **tables, ascent=ascent))

    return Kernel(run, flops, reads, writes)


def _update(algorithm: Algorithm, *, g1: bool) -> Kernel:
    adam = algorithm == Algorithm.ADAM
    state = ("state1", "state2") if adam else ("state1",)

    def run(backend: Any, o: Operands) -> None:
        lists = {"theta": o["theta"], "backup": o["backup"], "last": o["x"], "folded": o["folded"], "steps": o.steps}
        lists |= {name: o[name] for name in state} | ({"g1": o["y"]} if g1 else {})
        tables = {**o.tables, "partials": o.finished[: 6 if g1 else 2], "direction": o.sums}
        backend.combined_update_(CombinedUpdate(layout=o.layout, **lists, **tables, algorithm=algorithm))

    flops = (7 if g1 else 4) + (14 if adam else 5)  # the direction, then the base optimizer
    return Kernel(run, flops, ("backup", *(("y",) if g1 else ()), "x", "folded", *state), ("theta", *state))


def _combine() -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        x = o["x"]
        tables = {**o.tables, "partials": o.finished[:2], "direction": o.sums}
        backend.combine_(Combine(layout=o.layout, out=x, last=x, folded=o["folded"], **tables))

    return Kernel(run, 4, ("x", "folded"), ("x",))


def _restore() -> Kernel:
    def run(backend: Any, o: Operands) -> None:
        backend.restore_(Restore(layout=o.layout, theta=o["theta"], backup=o["backup"]))

    return Kernel(run, 0, ("backup",), ("theta",))


KERNELS = {
    "squared_norm": _norm("x"),
    "squared_norm of a difference": _norm("x", "y"),
    "direction_products": _products(),
    "perturb_, first": _perturb(0, 2, ("theta", "x"), ("theta", "backup")),
    "perturb_, second": _perturb(1, 3, ("backup", "x", "y"), ("theta",)),
    "perturb_, third": _perturb(2, 5, ("theta", "x", "folded"), ("theta", "folded")),
    "combined_update_, SGD, finite_difference": _update(Algorithm.SGD, g1=False),
    "combined_update_, SGD, accelerated": _update(Algorithm.SGD, g1=True),
    "combined_update_, Adam, finite_difference": _update(Algorithm.ADAM, g1=False),
    "combine_": _combine(),
    "restore_": _restore(),
}
