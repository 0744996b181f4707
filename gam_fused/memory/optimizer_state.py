"""The state of a fused base optimizer for one block, as the kernels take it, in torch's own layout and in torch's own dicts.

Kernels decide on the device whether a step is skipped, so state is created before it is known whether it is needed. That is
told apart by what is there: an entry made here whose parameter has not been updated yet is *unstarted*, and torch would have
none. State that was there before (a checkpoint, another plan) never is.
"""

from __future__ import annotations

import operator
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_fused.backends.tensor_lists import EMPTY, TensorList
from gam_fused.checks import Groups, describe
from gam_fused.parallel import dtensor
from gam_fused.parallel.dtensor import check_can_be_written

if TYPE_CHECKING:
    from gam_fused.backends.base_optimizers import FusedBase
    from gam_fused.memory.blocks import Block

States = MutableMapping[Any, dict[str, Any]]


class BlockState:
    """State tensors and step counts of a block's parameters.

    Attributes:
        lists: the state tensors, in the kernels' order; `EMPTY` where no parameter needs one.
        steps: 0-d float32 tensors, updates so far of each parameter; for SGD, whether its momentum has started.
        counts: the memory of all `steps`.
    """

    def __init__(self, block: Block):
        self._block = block
        self.counts = torch.zeros(len(block.params), dtype=torch.float32, device=block.device)
        self.steps = TensorList(list(self.counts), lasting=True, views_of=self.counts)
        self.lists: tuple[TensorList, ...] = (EMPTY, EMPTY, EMPTY)
        self._unstarted: dict[int, dict[str, Any]] = {}  # entries made here, by parameter, that may not have been used yet
        self._refs: list[tuple[dict[str, Any], str, Tensor]] = []
        self._columns: list[tuple[Any, list[Any], list[Tensor]]] = []  # `_refs` by key: what looks it up, entries, tensors
        self._entries: list[dict[str, Any]] = []
        self._listed: list[bool] | None = None
        self._keys: Sequence[tuple[str | None, ...]] = ()

    def ensure(
        self, base: FusedBase, keys: Sequence[tuple[str | None, ...]], states: States, groups: Groups, active: list[bool]
    ) -> None:
        """Create what the update needs for the active parameters, and list it.

        State that is already there is adopted: brought to the parameter's dtype, device and strides where it differs, in
        place of the old entry.

        Args:
            keys: `FusedBase.state_keys` of each param group.

        Raises:
            KeyError: a parameter's state lacks a tensor that it should have had from its first update on; as torch.
            ValueError: state that was made in ``torch.inference_mode()``.
        """
        if self.is_current(keys, states, active):
            return
        if keys != self._keys:
            self.drop_unstarted(states)
        b = self._block
        for p, group in zip(b.params, b.groups, strict=True):
            _check_complete(base, keys[group], states.get(p), p, groups)
        self._keys, self._refs, self._listed = keys, [], None
        columns: tuple[list[Tensor | None], ...] = ([], [], [])
        try:
            for i, group in enumerate(b.groups):
                self._list(i, base, keys[group], states, groups, active[i], columns)
        except BaseException:  # out of memory
            self.drop_unstarted(states)
            raise
        self.lists = tuple(map(_as_list, columns))
        self._listed, self._entries = list(active), list(states.values())
        self._columns = _by_key(self._refs)

    def is_current(self, keys: Sequence[tuple[str | None, ...]], states: States, active: list[bool] | None = None) -> bool:
        """Whether what is listed is what there is, and what the parameters in `active` (by default, the listed) need."""
        listed = self._listed
        if listed is None or keys != self._keys:
            return False
        if (
            active is not None
            and listed != active
            and any(now and not then for now, then in zip(active, listed, strict=True))
        ):
            return False
        # By identity of the entries, not through `states[p]`: hashing a tensor is a Python call.
        if len(states) != len(self._entries) or not all(map(operator.is_, states.values(), self._entries)):
            return False
        try:
            return all(all(map(operator.is_, map(look_up, owners), tensors)) for look_up, owners, tensors in self._columns)
        except KeyError:
            return False

    def drop_unstarted(self, states: States) -> None:
        """Remove state made here whose parameter has not been updated yet. Waits for the device, if there may be such."""
        if not self._unstarted:
            return
        counts = self.counts.tolist()
        for i, entry in self._unstarted.items():
            p = self._block.params[i]
            if counts[i] != 0 or states.get(p) is not entry:
                continue
            self._listed = None
            for key in [key for owner, key, _ in self._refs if owner is entry]:
                entry.pop(key, None)
            if not entry:
                del states[p]
        self._unstarted = {}

    def _list(
        self,
        i: int,
        base: FusedBase,
        keys: tuple[str | None, ...],
        states: States,
        groups: Groups,
        active: bool,
        columns: tuple[list[Tensor | None], ...],
    ) -> None:
        p = self._block.params[i]
        entry = states.get(p)
        present = entry is not None and any(entry.get(key) is not None for key in keys if key)
        needed = any(keys) and (active or present)
        if not needed:
            for column in columns:
                column.append(None)
            return
        if entry is None:
            entry = states.setdefault(p, {})
        if not present:
            self.steps.tensors[i].zero_()
            self._unstarted[i] = entry
        for column, key in zip(columns, keys, strict=True):
            column.append(None if key is None else self._adopt(entry, key, i))
            if key:
                check_can_be_written(key, entry[key], p, groups)  # the kernel would, before autograd is told
                self._refs.append((entry, key, entry[key]))
        self._count(i, base.step_key, entry)

    def _adopt(self, entry: dict[str, Any], key: str, i: int) -> Tensor:
        """The state tensor `key` of parameter `i` as the kernels take it, in memory that `entry` holds too."""
        b, present = self._block, entry.get(key)
        p = b.params[i]  # a DTensor in a sharded block
        if not b.sharded:
            entry[key] = value = like(present, p, b.strides[i])
            return value
        shard = dtensor.adopt(present, p)
        value = like(shard, b.theta.tensors[i], b.strides[i])
        if present is None or value is not shard or not dtensor.alike(present, p):
            entry[key] = dtensor.like(value, p)
        return value

    def _count(self, i: int, key: str, entry: dict[str, Any]) -> None:
        counter = self.steps.tensors[i]
        if not key:
            if self._unstarted.get(i) is not entry:
                counter.clamp_(min=1)
            return
        loaded = entry.get(key)
        if isinstance(loaded, Tensor) and loaded is not counter:
            counter.copy_(loaded.reshape(()))
        elif loaded is None or not isinstance(loaded, Tensor):
            counter.fill_(0.0 if loaded is None else float(loaded))
        entry[key] = counter
        self._refs.append((entry, key, counter))


def _as_list(column: list[Tensor | None]) -> TensorList:
    there = [t is not None for t in column]
    return TensorList(column, lasting=True, complete=all(there)) if any(there) else EMPTY


def _by_key(refs: list[tuple[dict[str, Any], str, Tensor]]) -> list[tuple[Any, list[Any], list[Tensor]]]:
    columns: dict[str, tuple[Any, list[Any], list[Tensor]]] = {}
    for owner, key, tensor in refs:
        _, owners, tensors = columns.setdefault(key, (operator.itemgetter(key), [], []))
        owners.append(owner)
        tensors.append(tensor)
    return list(columns.values())


def _check_complete(
    base: FusedBase, keys: tuple[str | None, ...], entry: dict[str, Any] | None, p: Tensor, groups: Groups
) -> None:
    if not entry or not base.step_key:
        return
    for key in (base.step_key, *keys):
        if key and entry.get(key) is None:
            hint = "; amsgrad was switched on after the first update" if key == "max_exp_avg_sq" else ""
            raise KeyError(
                f"the optimizer state of {describe(p, groups)} has no {key!r}{hint}: torch's own optimizer would fail here "
                "too. Delete the parameter's state to initialize it again, or load a complete state dict"
            )


def like(value: Tensor | None, p: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`value`, or zeros, in the dtype and on the device of `p`, with the strides `stride`."""
    if value is None:
        return torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).zero_()
    if value.stride() == stride and value.dtype is p.dtype and value.device == p.device:
        return value
    return torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(value)
