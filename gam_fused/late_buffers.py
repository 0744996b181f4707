"""Buffers that the first pass of a step registers: what they held when it did, which is where later passes start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_module_registration_hook
from torch.nn.parameter import is_lazy

from gam_fused.module_tree import Owner


class LateBuffers:
    """Buffers that the first pass registers, and what they held when it did.

    Attributes:
        any: whether there are such, or modules that may hold some.
    """

    def __init__(self) -> None:
        self.any = False
        self._initial: list[tuple[Owner, str, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = (
            register_module_buffer_registration_hook(self._buffer),
            register_module_module_registration_hook(self._module),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> None:
        if name in module._buffers:  # one that is replaced
            return
        self.any = True
        if buffer is not None and not is_lazy(buffer):
            self._initial.append((module._buffers, name, buffer.detach().clone()))

    def _module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        self.any = True
        for m in child.modules() if child is not None else ():
            for key, buffer in m._buffers.items():
                if buffer is not None and not is_lazy(buffer):
                    self._initial.append((m._buffers, key, buffer.detach().clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        for owner, name, initial in self._initial:
            t = owner.get(name)
            if t is not None and t.shape == initial.shape:
                t.copy_(initial)
