"""Blocks: the parameters of one device, dtype and kind of layout, with everything the kernels need for them.

What does not change between steps (parameters, optimizer state, backup) is listed here once, with its addresses; only
gradients are listed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends import backend_for
from gam_fused.backends.operands import Restore
from gam_fused.backends.tensor_lists import Layout, TensorList, flat_views, is_dense
from gam_fused.backends.uploads import upload
from gam_fused.checks import Groups, describe
from gam_fused.constants import GUARD, Column, Control
from gam_fused.memory.gradients import Strides
from gam_fused.memory.likeness import Remembered
from gam_fused.memory.optimizer_state import BlockState, like
from gam_fused.parallel import dtensor
from gam_fused.parallel.dtensor import is_dtensor

SLOTS = GUARD + 1  # reductions of one step: three ascents, and the guard of the last gradient
Table = list[list[float | Tensor]]


class Device:
    """What the blocks of one device share: coefficient tables, and the sums of all blocks, a column for each."""

    def __init__(self, device: torch.device, blocks: int):
        self.device = device
        self.partials = torch.zeros(SLOTS, 6, blocks, dtype=torch.float64, device=device)
        self.realised = torch.zeros(SLOTS - 1, blocks, dtype=torch.float64, device=device)
        self.direction = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.tables: dict[str, Tensor] = {}
        self._values: dict[str, list[list[float]]] = {}
        self._parts: dict[tuple[Any, ...], Tensor] = {}

    def part(self, name: str, slot: int | None = None, rows: int | None = None, columns: slice = slice(None)) -> Tensor:
        """`columns` of "partials" (its first `rows` of `slot`), "realised" (of `slot`) or "direction".

        Views are kept: making one takes the host as long as launching a kernel.
        """
        key = (name, slot, rows, columns.start, columns.stop)
        if key not in self._parts:
            whole: Tensor = getattr(self, name)
            of_slot = whole if slot is None else whole[slot]
            self._parts[key] = (of_slot if rows is None else of_slot[:rows])[..., columns]
        return self._parts[key]

    def upload(self, kind: str, rows: Table) -> None:
        """Bring the coefficient table `kind` up to date; a tensor lr is copied on the device, the rest when it changed."""
        numbers = [[0.0 if isinstance(v, Tensor) else v for v in row] for row in rows]
        if self._values.get(kind) != numbers:
            self._values[kind] = numbers
            fresh = upload(torch.tensor(numbers, dtype=torch.float64, device="cpu"), self.device)
            if kind in self.tables:
                self.tables[kind].copy_(fresh)
            else:
                self.tables[kind] = fresh
        for row, values in enumerate(rows):
            lr = values[Column.LR]
            if isinstance(lr, Tensor):
                self.tables[kind][row, Column.LR].copy_(lr.detach().squeeze())


class Block:
    """One device, dtype, kind of layout and way of sharding. T parameters, N elements (of a DTensor: on this rank).

    Attributes:
        theta, backup: the parameters (of DTensors: the local shards), and their copies in one flat buffer (allocated at the
            first ascent).
        sharded: whether the parameters are DTensors. reduction_groups: over which ranks its sums are to be added.
        kernels: the backend that serves this block.
        control: its control block. Every block sees the sums of all, so all blocks of an optimizer tell the same.
        column: its column of the shared sums.
        backed_up: whether `backup` holds this step's theta.
    """

    def __init__(self, params: list[Tensor], groups: list[int], counted: list[bool], backend: str):
        self.params, self.groups = params, groups
        self.sharded, self.reduction_groups = is_dtensor(params[0]), dtensor.reduction_groups(params[0])
        locals_ = [dtensor.local(p) for p in params]
        self.theta = TensorList(locals_, lasting=True, complete=True)
        self.dtype, self.device, self.dense = params[0].dtype, locals_[0].device, is_dense(locals_[0])
        self.strides = Strides(locals_, self.dense)
        self.addresses = self.addresses_now()
        self._order = self._order_of(locals_)
        self._lie_alike = Remembered(lambda params: self._order_of(params) == self._order)
        self.layout = Layout([p.numel() for p in locals_], groups, counted)
        self.kernels = backend_for(backend, self.device, dense=self.dense)
        self.control = torch.zeros(len(Control), dtype=torch.float64, device=self.device)
        self.column = slice(0, 0)
        self.shared: Device
        self.backed_up = False
        self._parts: dict[tuple[Any, ...], Tensor] = {}
        self._slots: dict[int, Tensor] = {}  # views of the control block, kept as parts are
        self.state = BlockState(self)
        self.shard_index = dtensor.shard_index(params[0])
        self.average: Any = None  # where `step.averaging` averages d over ranks
        self._backup: TensorList | None = None
        self._accumulator: TensorList | None = None
        self._unscaled_control: Tensor | None = None

    @property
    def backup(self) -> TensorList:
        if self._backup is None:
            self._backup = TensorList(flat_views(self.theta.tensors)[1], lasting=True)
        return self._backup

    def accumulator(self, gradients: TensorList) -> TensorList:
        """`gradients` to accumulate into: themselves, or a float32 copy of low-precision ones; None stays None."""
        if self.dtype in (torch.float32, torch.float64):
            return gradients
        if self._accumulator is None:
            self._accumulator = TensorList(flat_views(self.theta.tensors, torch.float32)[1], lasting=True)
        targets = [t if g is not None else None for t, g in zip(self._accumulator.tensors, gradients.tensors, strict=True)]
        if there := [g for g in gradients.tensors if g is not None]:
            torch._foreach_copy_([t for t in targets if t is not None], there)
        return self._accumulator if all(t is not None for t in targets) else TensorList(targets)

    @property
    def unscaled_control(self) -> Tensor:
        """A control block for combinations that are neither clipped nor divided by the loss scale."""
        if self._unscaled_control is None:
            self._unscaled_control = torch.zeros_like(self.control)
            self._unscaled_control[Control.LOSS_SCALE].fill_(1.0)
        return self._unscaled_control

    def zeros(self, i: int) -> Tensor:
        """A zero gradient for parameter `i`."""
        return like(None, self.theta.tensors[i], self.strides[i])

    def is_in_place(self) -> bool:
        """Whether parameters lie where they did, and in the same way: `p.data` may be another part of the same memory."""
        params = list(map(dtensor.local, self.params)) if self.sharded else self.params
        return list(map(Tensor.data_ptr, params)) == self.addresses and self._lie_alike(params)

    def _order_of(self, params: Sequence[Tensor]) -> list[list[Any]]:
        """How parameters lie in their memory."""
        order: Any = Tensor.is_contiguous if self.strides.row_major and self.dense else Tensor.stride
        return [list(map(Tensor.numel, params)), list(map(order, params))]

    def addresses_now(self) -> list[int]:
        """Where the parameters lie now. `theta` keeps the memory of before, so nothing else can come to lie there."""
        return list(map(Tensor.data_ptr, map(dtensor.local, self.params) if self.sharded else self.params))

    def tell_moved(self, param_groups: Groups) -> str:
        """An error's text: which parameter a closure has moved."""
        moved = zip(self.params, self.theta.tensors, self.addresses_now(), self.addresses, strict=True)
        p, before = next((p, t) for p, t, now, then in moved if now != then)
        was = f"{before.dtype}, {before.device}"
        return (
            f"the closure gave {describe(p, param_groups)} other memory (before: {was}) by assigning its .data, as "
            "module.to() and an RNN's flatten_parameters() do: the optimizer would move other weights than the model's. "
            "Do that before the step"
        )

    def put_back(self) -> None:
        """After a failed step: the parameters as before it, where a kernel has moved them."""
        if self.backed_up:
            self.kernels.restore_(Restore(layout=self.layout, theta=self.theta, backup=self.backup))
            self.backed_up = False

    def set(self, slot: Control, value: float | Tensor) -> None:
        """A slot of the control block <- `value`. Assigning by index copies a number from the host, and waits for that."""
        if slot not in self._slots:
            self._slots[slot] = self.control[slot]
        self._slots[slot].fill_(value)

    def part(self, name: str, slot: int | None = None, rows: int | None = None) -> Tensor:
        """This block's column of what the blocks of its device share; see `Device.part`."""
        key = (name, slot, rows)
        if key not in self._parts:
            self._parts[key] = self.shared.part(name, slot, rows, self.column)
        return self._parts[key]
