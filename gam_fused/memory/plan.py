"""A plan: all blocks of an optimizer. Built once from the param groups, and kept while they stay as they are."""

from __future__ import annotations

import operator
from collections import defaultdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.tensor_lists import is_dense
from gam_fused.checks import Groups, describe
from gam_fused.constants import Control
from gam_fused.memory.blocks import Block, Device, Table
from gam_fused.memory.parameters import check_sharded
from gam_fused.memory.reductions import ShardSums
from gam_fused.parallel import dtensor
from gam_fused.parallel.dtensor import is_dtensor


class Plan:
    """All blocks of an optimizer, and what they were built from."""

    def __init__(self, param_groups: Groups, backend: str):
        self._members, self._flags = [list(group["params"]) for group in param_groups], _flags(param_groups)
        members: dict[tuple[Any, ...], list[tuple[Tensor, int, bool]]] = defaultdict(list)
        for number, group in enumerate(param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    t = dtensor.local(p)
                    kind = (t.device, p.dtype, is_dense(t), is_dtensor(p), dtensor.reduction_groups(p))
                    members[kind].append((p, number, group["perturb"]))
        self.blocks = []
        for rows in members.values():
            params, groups, counted = map(list, zip(*rows, strict=True))
            self.blocks.append(Block(params, groups, counted, backend))
        self.devices: dict[torch.device, Device] = {}
        for i, block in enumerate(self.blocks):
            device = block.device
            if device not in self.devices:
                self.devices[device] = Device(device, len(self.blocks))
            block.shared = self.devices[device]
            block.column = slice(i, i + 1)
        self.params = [p for block in self.blocks for p in block.params]
        self.frozen = [p for group in param_groups for p in group["params"] if not p.requires_grad]
        self.shards = ShardSums(self.blocks)
        self.state_keys: list[tuple[str | None, ...]] = []  # of each param group: names of what the fused base keeps
        self._scalars: tuple[float, float] | None = None

    @cached_property
    def skipped(self) -> Tensor:
        """0-d: whether the last update was skipped because a gradient was not finite."""
        return self.blocks[0].control[Control.LAST_SKIPPED]

    def upload(self, tables: dict[str, Table], xi: float, max_norm: float) -> None:
        """Bring coefficient tables and control blocks up to date; what has not changed is not written."""
        for device in self.devices.values():
            for kind, rows in tables.items():
                device.upload(kind, rows)
        if self._scalars != (xi, max_norm):
            self._scalars = (xi, max_norm)
            for block in self.blocks:
                block.set(Control.EPS, xi)
                block.set(Control.MAX_NORM, max_norm)

    def is_current(self, param_groups: Groups) -> bool:
        """Whether groups, their parameters and the memory behind them are what the plan was built from."""
        return (
            self.members_are(param_groups)
            and self._flags == _flags(param_groups)
            and all(block.is_in_place() for block in self.blocks)
        )

    def members_are(self, param_groups: Groups) -> bool:
        """Whether the groups hold the parameters that the plan was built from."""
        return len(param_groups) == len(self._members) and all(
            len(mine) == len(group["params"]) and all(map(operator.is_, mine, group["params"]))
            for mine, group in zip(self._members, param_groups, strict=True)
        )

    def check_in_place(self, param_groups: Groups) -> None:
        """After the passes: the closure has neither moved parameters, nor put others in their place, nor unfrozen any.

        Raises:
            RuntimeError: it has. Names the parameter.
        """
        if not self.members_are(param_groups):
            raise RuntimeError(_replaced(self._members, param_groups))
        for block in self.blocks:
            if block.addresses_now() != block.addresses:
                raise RuntimeError(block.tell_moved(param_groups))
        for p in self.frozen:
            if p.grad is not None:
                raise RuntimeError(
                    f"the closure made {describe(p, param_groups)} require a gradient, which it did not before the step: "
                    "unfreeze parameters before the step, and freeze them after it"
                )

    def check_sharded(self, param_groups: Groups) -> None:
        """After the first pass: raises RuntimeError for a whole weight that FSDP had gathered, and has freed since."""
        for block in self.blocks:
            if not block.sharded:
                check_sharded(block.params, param_groups)

    def put_in_place(self) -> None:
        """Parameters that a closure has given other memory lie in their own again."""
        for block in self.blocks:
            if not block.sharded and not block.is_in_place():
                for p, t in zip(block.params, block.theta.tensors, strict=True):
                    p.data = t

    def share(self, slot: int, rows: int) -> None:
        """Add what the ranks with the other shards computed, then give every device the sums of the others.

        There is nothing to do with one device and no shards.
        """
        if self.shards:
            self.shards.add_up(slot, rows)
        if len(self.devices) == 1:
            return
        for block in self.blocks:
            for device in self.devices.values():
                if device is not block.shared:
                    device.part("partials", slot, rows, block.column).copy_(block.part("partials", slot, rows))


def _flags(param_groups: Groups) -> list[tuple[Any, list[bool]]]:
    return [(group.get("perturb"), list(map(_requires_grad, group["params"]))) for group in param_groups]


_requires_grad = operator.attrgetter("requires_grad")


def _replaced(members: list[list[Tensor]], param_groups: Groups) -> str:
    for row, (mine, group) in enumerate(zip(members, param_groups, strict=False)):
        for i, (p, q) in enumerate(zip(mine, group["params"], strict=False)):
            if p is not q:
                return (
                    f"the closure put another tensor in the place of parameter {i} of group {row} (shape {tuple(p.shape)}, "
                    f"{p.dtype}): passes at other weights than its cannot be made. Replace parameters between steps"
                )
    return "the closure added or removed parameters of the optimizer: do that between steps"
