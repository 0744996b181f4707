"""The transaction around a step's passes: the same randomness in each, everything back on failure, no write cut in half.

DESIGN section 3, points 2 and 4. Parameters are guarded by the engine's backup, buffers by `model_buffers`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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
