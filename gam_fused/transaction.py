"""The transaction around a step's passes: the same randomness in each, buffers moved once, everything back on failure.

DESIGN section 3, points 2 to 4. Parameters are guarded by the engine's backup; here is what lies outside the parameters.
"""

from __future__ import annotations

import signal
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gam_fused.parameters import is_dtensor
from gam_fused.sharding import local
from gam_fused.tensor_lists import moved


class RandomState:
    """The generators' states of the CPU and of every given device, saved, replayed and handed back.

    After the step the generators stand where one ordinary pass would have left them, so a run is reproducible whatever
    the number of passes.
    """

    def __init__(self, devices: Iterable[torch.device]):
        self._modules = [(torch.get_device_module(d), d) for d in {d for d in devices if d.type not in ("cpu", "meta")}]
        self._start = self._read()
        self._after_first: list[Tensor] | None = None

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(module.get_rng_state(device) for module, device in self._modules)]

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for (module, device), state in zip(self._modules, states[1:], strict=True):
            module.set_rng_state(state, device)

    def first_pass_done(self) -> None:
        self._after_first = self._read()

    def replay(self) -> None:
        """Before each further pass: as at the start of the first."""
        self._write(self._start)

    def finish(self) -> None:
        """After the step: as the first pass left them."""
        if self._after_first is not None:
            self._write(self._after_first)

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._write(self._start)


class Buffers:
    """Snapshots of a module's buffers, in one flat copy per dtype and device.

    A snapshot records which tensor stood under which name, so buffers that a forward replaces by assignment come back too.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        self._before = self._snapshot()
        self._after_first: _Snapshot | None = None

    @property
    def devices(self) -> set[torch.device]:
        return {t.device for _, _, t in self._before.entries if t is not None}

    def _snapshot(self) -> _Snapshot:
        owners = {id(m): m for root in self._modules for m in root.modules()}
        buffers = ((m._buffers, name, t) for m in owners.values() for name, t in m._buffers.items())
        return _Snapshot([entry for entry in buffers if entry[2] is None or not is_lazy(entry[2])])

    def first_pass_done(self) -> None:
        self._after_first = self._snapshot()

    def finish(self, skipped: Tensor) -> None:
        """After the step: as the first pass left them, or, where `skipped` is not 0, as before the step.

        Args:
            skipped: 0-d, on any device; the host waits for it only where a buffer lies on the CPU and it does not, and where
                a forward replaced a buffer or wrote to a sparse or quantized one.
        """
        after = self._after_first or self._snapshot()
        if after.matches(self._before):
            after.select(skipped, self._before)
            after.restore()
        else:
            (self._before if skipped else after).restore()

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._before.restore()


class _Snapshot:
    def __init__(self, entries: list[tuple[dict[str, Tensor | None], str, Tensor | None]]):
        self.entries = entries
        self._shapes = [None if t is None else t.shape for _, _, t in entries]
        self._kinds: dict[tuple, list[Tensor]] = defaultdict(list)
        self._others = []  # sparse and quantized ones have no flat copy: the tensor, a copy, and which version of it that is
        for _, _, t in entries:
            if t is None:
                continue
            shard = local(t) if is_dtensor(t) else t
            if shard.layout is torch.strided and not shard.is_quantized:
                self._kinds[t.dtype, shard.device].append(_once(shard))
            else:
                self._others.append((shard, shard.detach().clone(), shard._version))
        self._copies = {kind: torch.cat([t.detach().reshape(-1) for t in ts]) for kind, ts in self._kinds.items()}

    def matches(self, other: _Snapshot) -> bool:
        """Whether the same tensors, in the same shapes, stand under the same names."""
        return len(self.entries) == len(other.entries) and all(
            mine is theirs and (mine is None or was == other_was)
            for (_, _, mine), was, (_, _, theirs), other_was in zip(
                self.entries, self._shapes, other.entries, other._shapes, strict=True
            )
        )

    def select(self, skipped: Tensor, before: _Snapshot) -> None:
        for kind, copy in self._copies.items():
            flag = moved(skipped, copy.device) != 0
            self._copies[kind] = torch.where(flag, before._copies[kind], copy)
        if any(now[2] != then[2] for now, then in zip(self._others, before._others, strict=True)) and skipped:
            self._others = before._others

    @torch.no_grad()
    def restore(self) -> None:
        for (owner, name, t), shape in zip(self.entries, self._shapes, strict=True):
            if owner.get(name) is not t:
                owner[name] = t
            if t is not None and shape is not None and t.shape != shape:
                t.resize_(shape)
        for kind, tensors in self._kinds.items():
            pieces = self._copies[kind].split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [piece.view(t.shape) for t, piece in zip(tensors, pieces, strict=True)])
        for t, copy, version in self._others:
            if t._version != version:
                t.copy_(copy)


def _once(t: Tensor) -> Tensor:
    """The elements of an expanded tensor, each once: what it repeats cannot be written to."""
    for dim, (stride, size) in enumerate(zip(t.stride(), t.shape, strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t


class Interrupts:
    """Holds Ctrl-C back while weights and their backup are being written, so that no write is cut in half.

    Entered once per step; inside, `with interrupts.held():` marks what must not be cut, and `commit` the point from which
    the step is completed before it is interrupted. Python runs signal handlers in the main thread only, so elsewhere there
    is nothing to hold.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._holding = self._committed = False
        self._pending: tuple | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler:
            signal.signal(signal.SIGINT, self._handler)
        self._deliver()

    def commit(self) -> None:
        """From here to the end of the step an interrupt waits: an update that has begun cannot be undone."""
        self._committed = True

    def _deliver(self) -> None:
        if self._pending:
            arguments, self._pending = self._pending, None
            self._handler(*arguments)

    def _receive(self, *arguments: Any) -> None:
        if self._holding or self._committed:
            self._pending = arguments
        else:
            self._handler(*arguments)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until this ends, an interrupt waits."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if not self._committed:
                self._deliver()
