"""Buffers of the model move once per step (DESIGN section 3, point 3): what they hold before it and after its first pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gam_fused.parameters import is_dtensor
from gam_fused.sharding import local
from gam_fused.tensor_lists import moved

Memory = dict[tuple, tuple[Tensor, list[Tensor]]]  # by dtype and device: a flat buffer, and its views in the buffers' shapes


class Buffers:
    """What the buffers of modules hold before a step, and after its first pass.

    Args:
        layout: the `layout` of an earlier object for the same modules. Its memory is used again, so that object's snapshots
            are lost, unless a buffer has come, gone or been replaced since.
    """

    def __init__(self, modules: Iterable[nn.Module], layout: BufferLayout | None = None):
        self._modules = list(modules)
        owners = _owners(self._modules)
        self.layout = layout if layout and layout.reusable and layout.describes(owners) else BufferLayout(owners)
        self._before = self.layout.snapshot(0)
        self._after_first: _Snapshot | None = None

    @property
    def devices(self) -> set[torch.device]:
        return self.layout.devices

    def _now(self) -> _Snapshot:
        owners = _owners(self._modules)
        return (self.layout if self.layout.describes(owners) else BufferLayout(owners)).snapshot(1)

    def first_pass_done(self) -> None:
        self._after_first = self._now()

    def finish(self, skipped: Tensor) -> None:
        """After the step: as the first pass left them, or, where `skipped` is not 0, as before the step.

        Args:
            skipped: 0-d, on any device; the host waits for it only where a buffer lies on the CPU and it does not, and where
                the first pass replaced a buffer, changed how one lies, or wrote to a sparse or quantized one.
        """
        after = self._after_first or self._now()
        if skipped.device.type == "cpu" or after.layout is not self.layout:
            (self._before if skipped else after).restore()
        else:
            after.select(skipped, self._before)
            after.restore()

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._before.restore()


def _owners(roots: Iterable[nn.Module]) -> list[dict[str, Tensor | None]]:
    """The `_buffers` of all modules below `roots`, each once."""
    owners, known = [], set()
    waiting: list[nn.Module | None] = list(roots)
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in known:
            continue
        known.add(id(module))
        waiting += module._modules.values()
        if any(getattr(type(module), name) is not getattr(nn.Module, name) for name in ("modules", "named_modules")):
            waiting += module.modules()  # it names more than its own
        if module._buffers:
            owners.append(module._buffers)
    return owners


class BufferLayout:
    """Which tensors stand under which names, and memory for two snapshots of them: flat copies, one per dtype and device.

    Attributes:
        entries: (the `_buffers` it stands in, name, tensor or None, its shape) of each.
        strided: those with a place in the flat copies, by dtype and device. others: sparse and quantized ones.
        reusable: whether copies are made of the tensors themselves, not of views or shards that may come to lie elsewhere.
    """

    def __init__(self, owners: list[dict[str, Tensor | None]]):
        self._signature = _signature(owners)  # ids stay taken while `entries` holds the tensors
        entries = [(owner, name, t) for owner in owners for name, t in owner.items() if t is None or not is_lazy(t)]
        self.entries = [(owner, name, t, None if t is None else t.shape) for owner, name, t in entries]
        tensors = [t for _, _, t in entries if t is not None]
        self.devices = {t.device for t in tensors}
        self.strided: dict[tuple, list[Tensor]] = defaultdict(list)
        self.others: list[Tensor] = []
        for t in tensors:
            part = _part(t)
            if part.layout is torch.strided and not part.is_quantized:
                self.strided[t.dtype, part.device].append(t)
            else:
                self.others.append(part)
        self.reusable = all(_part(t) is t for t in tensors)
        self._memory: dict[int, Memory] = {}

    def describes(self, owners: list[dict[str, Tensor | None]]) -> bool:
        """Whether the same tensor objects, lying in the same way, stand under the same names."""
        return self._signature == _signature(owners)

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """What is copied of `tensors`."""
        return tensors if self.reusable else [_part(t) for t in tensors]

    def snapshot(self, number: int) -> _Snapshot:
        """What the buffers hold now, in memory `number`."""
        if number not in self._memory:
            self._memory[number] = {kind: _room_for(self.parts(tensors)) for kind, tensors in self.strided.items()}
        return _Snapshot(self, self._memory[number])


def _signature(owners: list[dict[str, Tensor | None]]) -> list[tuple]:
    return [(id(owner), *owner, *map(_look, owner.values())) for owner in owners]


def _look(t: Tensor | None) -> Any:
    """What tells whether memory made for a buffer still fits it. A lazy one becomes a tensor in place."""
    if t is None:
        return None
    if is_lazy(t):
        return "lazy"
    return id(t), t.dtype, t.device, t.shape, t.stride() if t.layout is torch.strided else t.layout


def _part(t: Tensor) -> Tensor:
    """The elements of `t` that this rank holds, each once: what an expanded tensor repeats cannot be written to."""
    part = local(t) if is_dtensor(t) else t
    if part.layout is torch.strided:
        for dim, (stride, size) in enumerate(zip(part.stride(), part.shape, strict=True)):
            if stride == 0 and size > 1:
                part = part.narrow(dim, 0, 1)
    return part


def _room_for(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat buffer, and views of it in the shapes of `tensors`."""
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    pieces = flat.split([t.numel() for t in tensors])
    return flat, [piece.view(t.shape) for t, piece in zip(tensors, pieces, strict=True)]


class _Snapshot:
    """The buffers of `layout`, copied into `memory`."""

    @torch.no_grad()
    def __init__(self, layout: BufferLayout, memory: Memory):
        self.layout, self._memory = layout, memory
        for kind, tensors in layout.strided.items():
            torch._foreach_copy_(memory[kind][1], layout.parts(tensors))
        self._others = [(t, t.detach().clone(), t._version) for t in layout.others]

    def select(self, skipped: Tensor, before: _Snapshot) -> None:
        """Become `before`, of the same layout, where `skipped` is not 0."""
        for kind, (flat, _) in self._memory.items():
            flag = moved(skipped, flat.device) != 0
            torch.where(flag, before._memory[kind][0], flat, out=flat)
        if any(now[2] != then[2] for now, then in zip(self._others, before._others, strict=True)) and skipped:
            self._others = before._others

    @torch.no_grad()
    def restore(self) -> None:
        for owner, name, t, shape in self.layout.entries:
            if owner.get(name) is not t:
                owner[name] = t
            if t is not None and shape is not None and t.shape != shape:
                t.resize_(shape)
        for kind, tensors in self.layout.strided.items():
            torch._foreach_copy_(self.layout.parts(tensors), self._memory[kind][1])
        for t, copy, version in self._others:
            if t._version != version:
                t.copy_(copy)
