"""Buckets: the parameters of one device, dtype and kind of layout, with everything the verbs need for them.

A `Plan` is built once from the param groups and kept while they stay as they are. What does not change between steps
(parameters, optimizer state, backup) is listed here once, with its addresses; only gradients are listed anew.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gam_fused import sharding
from gam_fused.base_optimizers import FusedBase
from gam_fused.constants import GUARD, Column, Control
from gam_fused.distributed import Replicas
from gam_fused.model_buffers import BufferLayout
from gam_fused.parameters import Groups, is_dtensor
from gam_fused.rooms import room
from gam_fused.tensor_lists import EMPTY, Layout, TensorList, flat_views, is_dense, upload

SLOTS = GUARD + 1  # reductions of one step: three ascents, and the guard of the last gradient
Table = list[list[float | Tensor]]


class Device:
    """What the buckets of one device share: coefficient tables and the columns of partial sums of all buckets."""

    def __init__(self, device: torch.device, columns: int):
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.device = device
        self.partials = torch.zeros(SLOTS, 6, columns, **options)
        self.realised = torch.zeros(SLOTS - 1, columns, **options)
        self.direction = torch.zeros(columns, **options)
        self.tables: dict[str, Tensor] = {}
        self._values: dict[str, list[list[float]]] = {}
        self._parts: dict[tuple, Tensor] = {}

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
            fresh = upload(torch.tensor(numbers, dtype=torch.float64), self.device)
            if kind in self.tables:
                self.tables[kind].copy_(fresh)
            else:
                self.tables[kind] = fresh
        for row, values in enumerate(rows):
            lr = values[Column.LR]
            if isinstance(lr, Tensor):
                self.tables[kind][row, Column.LR].copy_(lr.detach().squeeze())


class Bucket:
    """One device, dtype, kind of layout and way of sharding. T parameters, N elements (of a DTensor: on this rank).

    Attributes:
        theta, backup: the parameters (of DTensors: the local shards), and their copies in one flat buffer (allocated at the
            first ascent).
        sharded: whether the parameters are DTensors. reduction_groups: over which ranks its sums are to be added.
        verbs: the room that serves this bucket.
        control: its control block. Every bucket sees the sums of all, so all blocks of an optimizer tell the same.
        columns: its columns of the shared partial sums.
        backed_up: whether `backup` holds this step's theta.
    """

    def __init__(self, params: list[Tensor], groups: list[int], counted: list[bool], backend: str):
        self.params, self.groups = params, groups
        self.sharded, self.reduction_groups = is_dtensor(params[0]), sharding.reduction_groups(params[0])
        locals_ = [sharding.local(p) for p in params]
        self.theta = TensorList(locals_, lasting=True)
        self.memory = self.memory_now()
        self.dtype, self.device, self.dense = params[0].dtype, locals_[0].device, is_dense(locals_[0])
        self.strides = [p.stride() if self.dense else torch.empty(p.shape, device="meta").stride() for p in locals_]
        self.layout = Layout([p.numel() for p in locals_], groups, counted)
        self.verbs = room(backend, self.device, dense=self.dense)
        self.control = torch.zeros(len(Control), dtype=torch.float64, device=self.device)
        self.columns = slice(0, 0)
        self.shared: Device
        self.backed_up = False
        self.steps_buffer = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.steps = TensorList(list(self.steps_buffer), lasting=True)
        self.state_lists: tuple[TensorList, ...] = (EMPTY, EMPTY, EMPTY)
        self.shard_index = sharding.shard_index(params[0])
        self.exchange: Any = None  # where `distributed` averages over ranks
        self._backup: TensorList | None = None
        self._accumulator: TensorList | None = None
        self._state_refs: list[tuple[dict[str, Any], str, Tensor]] = []
        self._entries: list[dict[str, Any]] = []
        self._listed: list[bool] | None = None

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
        for target, source in zip(targets, gradients.tensors, strict=True):
            if target is not None:
                target.copy_(source)
        return self._accumulator if all(t is not None for t in targets) else TensorList(targets)

    def zeros(self, i: int) -> Tensor:
        """A zero gradient for parameter `i`."""
        return _like(None, self.theta.tensors[i], self.strides[i])

    def memory_now(self) -> list[list]:
        """Where the parameters lie now, and how; `p.data` may be set to another part of the same memory."""
        params = [sharding.local(p) for p in self.params] if self.sharded else self.params
        return [list(map(look, params)) for look in (Tensor.data_ptr, Tensor.numel, Tensor.stride)]

    def part(self, name: str, slot: int | None = None, rows: int | None = None) -> Tensor:
        """This bucket's columns of what the buckets of its device share; see `Device.part`."""
        return self.shared.part(name, slot, rows, self.columns)

    def ensure_state(
        self, base: FusedBase, state: dict[Tensor, dict[str, Any]], param_groups: Groups, active: list[bool]
    ) -> None:
        """Create what the update needs for the active parameters, in torch's own layout, and list it.

        State that is already there (a checkpoint, another device) is adopted: brought to the parameter's dtype, device and
        strides where it differs, in place of the old entry.
        """
        if self._state_is_current(state, active):
            return
        self._state_refs = []
        columns: tuple[list[Tensor | None], ...] = ([], [], [])
        for i, (p, group) in enumerate(zip(self.params, self.groups, strict=True)):
            entry = state[p] if active[i] or p in state else {}
            keys = base.state_keys(param_groups[group])
            fresh = all(key is None or entry.get(key) is None for key in keys)
            for column, key in zip(columns, keys, strict=True):
                if key is None or (not active[i] and entry.get(key) is None):
                    column.append(None)
                    continue
                column.append(self._adopt(entry, key, i))
                self._state_refs.append((entry, key, entry[key]))
            if entry or active[i]:
                self._adopt_step(i, base.step_key, entry, fresh)
        self.state_lists = tuple(TensorList(c, lasting=True) if any(t is not None for t in c) else EMPTY for c in columns)
        self._listed, self._entries = list(active), list(state.values())

    def _adopt(self, entry: dict[str, Any], key: str, i: int) -> Tensor:
        """The state tensor `key` of parameter `i` as the verbs take it, in memory that `entry` holds too."""
        p, present = self.params[i], entry.get(key)  # p is a DTensor in a sharded bucket
        if not self.sharded:
            entry[key] = value = _like(present, p, self.strides[i])
            return value
        shard = sharding.adopt(present, p)
        value = _like(shard, self.theta.tensors[i], self.strides[i])
        if present is None or value is not shard or not sharding.alike(present, p):
            entry[key] = sharding.like(value, p)
        return value

    def _adopt_step(self, i: int, key: str, entry: dict[str, Any], fresh: bool) -> None:
        counter = self.steps.tensors[i]
        if not key:
            if fresh:
                counter.zero_()
            else:
                counter.clamp_(min=1)
            return
        loaded = entry.get(key)
        if loaded is not counter:
            counter.copy_(torch.as_tensor(0.0 if loaded is None else loaded))
        entry[key] = counter
        self._state_refs.append((entry, key, counter))

    def _state_is_current(self, state: dict[Tensor, dict[str, Any]], active: list[bool]) -> bool:
        listed = self._listed
        if listed is None or (listed != active and any(now and not then for now, then in zip(active, listed, strict=True))):
            return False
        # By identity of the entries, not through `state[p]`: hashing a tensor is a Python call.
        if len(state) != len(self._entries) or not all(map(operator.is_, state.values(), self._entries)):
            return False
        return all(entry.get(key) is value for entry, key, value in self._state_refs)


def _like(value: Tensor | None, p: Tensor, stride: tuple[int, ...]) -> Tensor:
    if value is None:
        return torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).zero_()
    if value.stride() == stride and value.dtype is p.dtype and value.device == p.device:
        return value
    return torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(value)


class Plan:
    """All buckets of an optimizer, and what they were built from."""

    def __init__(self, param_groups: Groups, backend: str):
        self.signature = _signature(param_groups)
        members: dict[tuple, list[tuple[Tensor, int, bool]]] = defaultdict(list)
        for number, group in enumerate(param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    t = sharding.local(p)
                    kind = (t.device, p.dtype, is_dense(t), is_dtensor(p), sharding.reduction_groups(p))
                    members[kind].append((p, number, group["perturb"]))
        self.buckets = []
        for rows in members.values():
            params, groups, counted = map(list, zip(*rows, strict=True))
            self.buckets.append(Bucket(params, groups, counted, backend))
        self.devices: dict[torch.device, Device] = {}
        total = sum(bucket.layout.chunks for bucket in self.buckets)
        start = 0
        for bucket in self.buckets:
            device = bucket.device
            if device not in self.devices:
                self.devices[device] = Device(device, total)
            bucket.shared = self.devices[device]
            bucket.columns = slice(start, start + bucket.layout.chunks)
            start += bucket.layout.chunks
        self.params = [p for bucket in self.buckets for p in bucket.params]
        self.shards = sharding.ShardSums(self.buckets)
        self.replicas: Replicas | None = None  # what the optimizer averages over ranks itself
        self.fsdp_modules: list[Any] = []
        self.buffer_layout: BufferLayout | None = None  # of the last step, with the memory of its two snapshots
        self.settings: list[Any] | None = None  # what the coefficient tables stand for
        self._scalars: tuple[float, float] | None = None

    def no_sync(self) -> AbstractContextManager[None]:
        """For the time of a step."""
        return self.replicas.no_sync() if self.replicas else nullcontext()

    def upload(self, tables: dict[str, Table], eps: float, max_norm: float) -> None:
        """Bring coefficient tables and control blocks up to date; what has not changed is not written."""
        for device in self.devices.values():
            for kind, rows in tables.items():
                device.upload(kind, rows)
        if self._scalars != (eps, max_norm):
            self._scalars = (eps, max_norm)
            for bucket in self.buckets:
                bucket.control[Control.EPS], bucket.control[Control.MAX_NORM] = eps, max_norm

    def is_current(self, param_groups: Groups) -> bool:
        """Whether groups, their parameters and the memory behind them are what the plan was built from."""
        return _signature(param_groups) == self.signature and all(
            bucket.memory_now() == bucket.memory for bucket in self.buckets
        )

    def share(self, slot: int, rows: int) -> None:
        """Add what the ranks with the other shards computed, then give every device the columns of the others.

        There is nothing to do with one device and no shards.
        """
        if self.shards:
            self.shards.add_up(slot, rows)
        if len(self.devices) == 1:
            return
        for bucket in self.buckets:
            for device in self.devices.values():
                if device is not bucket.shared:
                    device.part("partials", slot, rows, bucket.columns).copy_(bucket.part("partials", slot, rows))


def _signature(param_groups: Groups) -> list[tuple[bool, list[int]]]:
    return [(group["perturb"], [id(p) for p in group["params"] if p.requires_grad]) for group in param_groups]
