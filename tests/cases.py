"""Shapes, dtypes, a problem for the kernels, and the tolerance rule, shared by the tests of all backends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gam_fused import backends
from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, SquaredNorm
from gam_fused.backends.tensor_lists import EMPTY, Layout, TensorList
from gam_fused.constants import Algorithm, Column, Control, Flag

# The backends that serve CPU tensors, which is where these problems are.
BACKENDS = [
    name
    for name, (backend, devices) in backends._BACKENDS.items()
    if name != "reference" and (devices is None or "cpu" in devices) and not backend.reason()
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Shapes of the tensors of one list, by what is awkward about them.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one element": [(1,)],
    "0-dim": [(), (5,), ()],
    "empty tensors": [(0,), (3,), (2, 0), (4100,), (0,)],
    "chunk edges": [(4095,), (4096,), (4097,), (1,), (8192,)],
    "one large": [(40_000,)],
    "many chunks": [(60_001,), (10_003,), (150, 3)],
    "many small": [(7,)] * 100,
    "misaligned": [(4099,), (33,), (1000, 9)],
    "channels_last": [(16, 3, 5, 5), (8, 16, 7, 7)],
    "transposed": [(17, 300), (64, 65)],
}


EXTRA_BACKENDS: dict[str, Any] = {}  # backends that only tests have


def get_backend(name: str) -> Any:
    """The backend `name`: what has the kernels."""
    return EXTRA_BACKENDS[name] if name in EXTRA_BACKENDS else backends._BACKENDS[name][0]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """An uninitialised tensor that lies in memory as `kind`, a key of `SHAPES`, says."""
    if kind == "misaligned":
        count = torch.Size(shape).numel()
        return torch.empty(count + 1, dtype=dtype)[1:].view(shape)
    if kind == "channels_last":
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    if kind == "transposed":
        return torch.empty(shape[::-1], dtype=dtype).t()
    return torch.empty(shape, dtype=dtype)


@dataclass
class Problem:
    """Operands of the kernels. The same values in every dtype: rounded to `rounded_to`, then held in `dtype`.

    `missing` leaves gradients out here and there; some tensors get none at all.
    """

    kind: str
    dtype: torch.dtype
    rounded_to: torch.dtype
    missing: bool = True
    flags: int = 0
    loss_scale: float = 1.0
    max_norm: float = 0.0
    radii: float = 0.1
    steps_so_far: float = 0.0
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        shapes = SHAPES[self.kind]
        count = range(len(shapes))
        self.layout = Layout([torch.Size(s).numel() for s in shapes], [i % 3 for i in count], [i % 4 != 3 for i in count])
        self.control = torch.zeros(len(Control), dtype=torch.float64)
        self.control[Control.LOSS_SCALE] = self.loss_scale
        self.control[Control.EPS] = 1e-12
        self.control[Control.MAX_NORM] = self.max_norm
        self.control[Control.NOISE_SEED] = 1234
        self.coefficients = self._coefficients()
        self.steps = TensorList([torch.tensor(self.steps_so_far) for _ in shapes])
        self.partials = torch.full((6, 3), 7.0, dtype=torch.float64)[:, 1:2]  # one block's column of several
        self.sums = torch.full((1,), 7.0, dtype=torch.float64)

    def _coefficients(self) -> Tensor:
        rows = []
        for group in range(3):
            row = dict.fromkeys(Column, 0.0)
            for column in (Column.RADIUS_0, Column.RADIUS_1, Column.RADIUS_2):
                row[column] = self.radii * (group - 1)  # one group minimises, one stays, one maximises
            row |= {Column.FOLD_0: 0.5, Column.FOLD_2: 0.25 + group, Column.DIRECTION_G1: 0.6, Column.DIRECTION_LAST: 0.4}
            row |= {Column.DIRECTION_FOLDED: -0.3, Column.FLAGS: float(self.flags), Column.LR: 0.1 / (1 + group)}
            row |= {Column.WEIGHT_DECAY: 0.01 * group, Column.MOMENTUM: 0.9, Column.DAMPENING: 0.1 * group}
            row |= {Column.BETA1: 0.9, Column.BETA2: 0.99, Column.EPS: 1e-4}
            rows.append([row[column] for column in Column])
        return torch.tensor(rows, dtype=torch.float64)

    def values(self, seed: int, *, gradient: bool = False, positive: bool = False, compute: bool = False) -> TensorList:
        """Random values. gradient: may be missing, and carries the loss scale. compute: in the dtype of `folded`."""
        generator = torch.Generator().manual_seed(seed)
        dtype, rounded_to = self.dtype, self.rounded_to
        if compute and rounded_to != torch.float64:
            dtype, rounded_to = torch.promote_types(self.dtype, torch.float32), torch.float32
        tensors: list[Tensor | None] = []
        for i, shape in enumerate(SHAPES[self.kind]):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            value = (value.abs() if positive else value) * (self.loss_scale if gradient else 1.0)
            tensor = allocate(shape, dtype, self.kind).copy_(value.to(rounded_to))
            absent = self.missing and gradient and ((i + seed) % 5 == 0 or i % 7 == 6)
            tensors.append(None if absent else tensor)
        return TensorList(tensors)

    def finished(self, *totals: float) -> Tensor:
        """Complete partial sums [len(totals), P] with these totals."""
        partials = torch.zeros(len(totals), 5, dtype=torch.float64)
        partials[:, 2] = torch.tensor(totals, dtype=torch.float64)
        return partials


def run_squared_norm(backend, p: Problem, *, y: bool, weight: bool) -> dict:
    partials = p.partials[:2]
    backend.squared_norm(
        SquaredNorm(
            layout=p.layout,
            x=p.values(1, gradient=True),
            y=p.values(2, gradient=True) if y else EMPTY,
            weight=p.values(3) if weight else EMPTY,
            partials=partials,
        )
    )
    return {"partials": partials.sum(1)}


def run_direction_products(backend, p: Problem, *, g1: bool, folded: bool = True) -> dict:
    partials = p.partials if g1 else p.partials[:2]
    backend.direction_products(
        DirectionProducts(
            layout=p.layout,
            g1=p.values(1, gradient=True) if g1 else EMPTY,
            last=p.values(2, gradient=True),
            folded=p.values(3, gradient=True, compute=True) if folded else EMPTY,
            coefficients=p.coefficients,
            partials=partials,
        )
    )
    return {"partials": partials.sum(1)}


def run_perturb(backend, p: Problem, *, ascent: int, adaptive: bool = False, total: float = 9.0) -> dict:
    """Ascent 0 backs up, 1 starts from the backup with a difference, 2 starts from theta and folds."""
    theta, base, backup, x = p.values(0), p.values(5), p.values(6), p.values(1, gradient=True)
    y, folded = p.values(2, gradient=True), p.values(3, compute=True)
    backend.perturb_(
        Perturb(
            layout=p.layout,
            theta=theta,
            base=base if ascent == 1 else EMPTY,
            x=x,
            y=y if ascent == 1 else EMPTY,
            folded=folded if ascent == 2 else EMPTY,
            backup=backup if ascent == 0 else EMPTY,
            coefficients=p.coefficients,
            partials=p.finished(total * p.loss_scale**2, 1.0),
            control=p.control,
            realised=p.sums,
            ascent=ascent,
            adaptive=adaptive,
        )
    )
    return {"theta": theta, "backup": backup, "folded": folded, "realised": p.sums.sum(), "control": p.control}


def run_combined_update(
    backend,
    p: Problem,
    algorithm: Algorithm,
    *,
    g1: bool,
    totals: tuple[float, ...],
    state: bool = True,
    backup: bool = True,
) -> dict:
    theta = p.values(0)
    state1, state2, state3 = (p.values(7), p.values(8, positive=True), p.values(9, positive=True)) if state else (EMPTY,) * 3
    backend.combined_update_(
        CombinedUpdate(
            layout=p.layout,
            theta=theta,
            backup=p.values(5) if backup else EMPTY,
            g1=p.values(1, gradient=True) if g1 else EMPTY,
            last=p.values(2, gradient=True),
            folded=p.values(3, gradient=True, compute=True),
            state1=state1,
            state2=state2 if algorithm == Algorithm.ADAM else EMPTY,
            state3=state3 if p.flags & Flag.AMSGRAD else EMPTY,
            steps=p.steps,
            coefficients=p.coefficients,
            partials=p.finished(*[t * p.loss_scale**2 for t in totals]),
            control=p.control,
            direction=p.sums,
            algorithm=algorithm,
        )
    )
    kept = TensorList([s for s, size in zip(p.steps.tensors, p.layout.sizes, strict=True) if size])
    state = {"state1": state1, "state2": state2, "state3": state3}
    return {"theta": theta, **state, "steps": kept, "direction": p.sums.sum(), "control": p.control}


def run_combine(backend, p: Problem, *, g1: bool, totals: tuple[float, ...]) -> dict:
    """`out` is last itself, as the optimizer has it."""
    last = p.values(2, gradient=True)
    backend.combine_(
        Combine(
            layout=p.layout,
            out=last,
            g1=p.values(1, gradient=True) if g1 else EMPTY,
            last=last,
            folded=p.values(3, gradient=True, compute=True),
            coefficients=p.coefficients,
            partials=p.finished(*[t * p.loss_scale**2 for t in totals]),
            control=p.control,
            direction=p.sums,
        )
    )
    return {"out": last, "direction": p.sums.sum(), "control": p.control}


def _flat(value: TensorList | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    tensors = value.tensors if isinstance(value, TensorList) else [value]
    return torch.cat([torch.zeros(0, dtype=dtype), *[t.reshape(-1).to(dtype) for t in tensors if t is not None]])


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from |x| to the next number of `dtype`, for every element of a float64 tensor."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


def errors(result: dict, exact: dict) -> dict[str, Tensor]:
    """|result - exact| of every element, over the largest exact one."""
    flat = {name: _flat(wanted) for name, wanted in exact.items()}
    return {
        name: (_flat(result[name]) - wanted).abs() / wanted.abs().max().clamp(min=1e-300)
        for name, wanted in flat.items()
        if wanted.numel()
    }


def assert_as_precise_as_torch(actual: dict, exact: dict, torch_error: dict[str, float], dtype: torch.dtype) -> None:
    """The tolerance rule: at most twice the error of plain torch at the same precision, plus one ulp."""
    for name, error in errors(actual, exact).items():
        single = dtype != torch.float64 and name in ("folded", "partials", "realised", "direction", "control")
        wanted = _flat(exact[name])
        largest = wanted.abs().max().clamp(min=1e-300)
        step = ulp(wanted, torch.float32 if single else dtype) / largest
        worst = (error - step).argmax()
        assert (error <= 2 * torch_error[name] + step).all(), (
            f"{name}[{worst}]: {_flat(actual[name])[worst]} is {error[worst] / step[worst]:.1f} ulp from {wanted[worst]}; "
            f"torch's largest error is {torch_error[name] / step[worst]:.1f}"
        )


def assert_same_bits(actual: dict, expected: dict) -> None:
    for name, wanted in expected.items():
        assert torch.equal(_flat(actual[name]), _flat(wanted)), name
