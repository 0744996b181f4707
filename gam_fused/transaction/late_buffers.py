"""Buffers and parameters that the first pass of a step registers: later passes start from their initial values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from gam_fused.torch_private import buffers_in, parameters_in
from gam_fused.transaction.module_tree import Owner
from gam_fused.transaction.snapshots import part

if TYPE_CHECKING:
    from gam_fused.transaction.model_state import BufferLayout


class LateBuffers:
    """What the first pass registers, and its initial values.

    Attributes:
        any: whether there may be some, in the model or in modules that a closure makes for its own use.
    """

    def __init__(self, layout: BufferLayout) -> None:
        self.any = False
        self._layout = layout
        self._known: set[int] = set()  # ids of the dicts of the model's modules; made when asked for
        self._initial: list[tuple[Owner, str, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = (
            register_module_buffer_registration_hook(self._buffer),
            register_module_parameter_registration_hook(self._parameter),
            register_module_module_registration_hook(self._module),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> None:
        self._note(buffers_in(module), name, buffer)

    def _parameter(self, module: nn.Module, name: str, parameter: Tensor | None) -> None:
        self._note(parameters_in(module), name, parameter)

    def _module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        self.any = True
        self._known = self._known or set(map(id, self._layout.owners))
        for m in child.modules() if child is not None else ():
            if id(buffers_in(m)) in self._known:  # the closure has put a part of the model into another module
                continue
            for owner in (buffers_in(m), parameters_in(m)):
                for key, t in owner.items():
                    self._keep(owner, key, t)

    def keep(self, after: BufferLayout) -> None:
        """After the first pass: keep only those of the model."""
        self._initial = [entry for entry in self._initial if after.tracks(*entry[:2])]

    def _note(self, owner: Owner, name: str, t: Tensor | None) -> None:
        if name in owner or self._layout.has(owner, name):  # one that is replaced, or taken out and put in again
            return
        if any(known is owner and key == name for known, key, _ in self._initial):
            return
        self.any = True
        self._keep(owner, name, t)

    def _keep(self, owner: Owner, name: str, t: Tensor | None) -> None:
        if t is not None and not is_lazy(t) and t.device.type != "meta":
            self._initial.append((owner, name, t.detach().clone()))

    def put_back(self) -> None:
        for owner, name, initial in self._initial:
            t = owner.get(name)
            if t is None or is_lazy(t):
                continue
            if t.shape == initial.shape:
                part(t).copy_(part(initial))
            else:  # it has grown
                t.data = initial.clone()
