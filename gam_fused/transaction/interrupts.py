"""Signals during a step: handlers run during the closure; interrupts are deferred during weight writes.

A handler that Python code has installed (Ctrl-C, a SIGTERM that exits, a timer that raises) may raise between any two
bytecodes. Between the kernel that writes weights and the record of it, that would leave them perturbed. docs/design.md,
section 3, point 4.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

try:  # what `signal` is made of: without making enums of what they return, which takes longer than the call
    from _signal import getsignal as _get  # type: ignore[import-not-found]
    from _signal import signal as _set
except ImportError:  # not CPython
    from signal import getsignal as _get
    from signal import signal as _set

Result = TypeVar("Result")
_SIGNALS = sorted(int(s) for s in signal.valid_signals())


class Interrupts:
    """Holds the handlers of all signals during one step; entered once.

    Inside, handlers are deferred, except between `open` and `close`, around the user's code. After one that raises, all
    others are deferred until the end, so that the rollback it started is not interrupted. Python runs handlers in the main
    thread only; in other threads there is nothing to hold.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Receiver] = {}
        self._pending: list[tuple[int, FrameType | None]] = []
        self._installed: list[Any] = []  # the handlers of all signals, with ours in place
        self._open = False

    def __enter__(self) -> Interrupts:
        try:
            self._take_over()
        except BaseException:  # raised by a handler that was not held yet
            self._give_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        try:
            self._give_back()
        finally:
            self._deliver_all()

    def open(self) -> None:
        """From here on handlers run at once; deferred ones run now."""
        self._open = True
        if self._pending:
            self._open = False
            self._deliver(lambda number: self._held[number].handler)
            self._open = True

    def close(self) -> None:
        """From here on handlers are deferred."""
        self._open = False
        if self._installed and list(map(_get, _SIGNALS)) != self._installed:  # the user's code has set some
            self._take_over()

    def let_through(self, call: Callable[..., Result], *args: Any) -> Result:
        """The result of `call`, which runs the user's code: meanwhile handlers run at once."""
        self.open()
        try:
            return call(*args)
        finally:
            self.close()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A signal has arrived whose handler is held."""
        if not self._open:
            self._pending.append((number, frame))
            return
        self._open = False  # it may raise
        self._held[number].handler(number, frame)
        self.open()  # others may have arrived while it ran

    def holds(self, number: int, receiver: _Receiver) -> bool:
        """Whether `receiver` currently replaces the handler of a signal."""
        return self._held.get(number) is receiver

    def _take_over(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        handlers = zip(_SIGNALS, map(_get, _SIGNALS), strict=True)
        for number in [n for n, handler in handlers if handler is not None and type(handler) is not int]:
            handler = _get(number)  # nearly all others are the system's own
            if isinstance(handler, _Receiver) and handler.owner is self:
                if self.holds(number, handler):
                    continue
                handler = handler.handler  # one from before, which the user's code has put back
            if callable(handler):
                self._held[number] = receiver = _Receiver(self, handler)
                _set(number, receiver)
        self._installed = list(map(_get, _SIGNALS))

    def _give_back(self) -> None:
        """Reinstall the original handlers, except where the user has replaced them since."""
        raised: BaseException | None = None
        self._installed = []  # leaves no reference cycle
        while self._held:
            try:
                number, receiver = next(iter(self._held.items()))
                if _get(number) is receiver:
                    _set(number, receiver.handler)
                del self._held[number]
            except BaseException as error:  # raised by a handler that is reinstalled already; reinstall the others too
                raised = error
        if raised is not None:
            raise raised

    def _deliver(self, handler_of: Callable[[int], Any]) -> None:
        while self._pending:
            number, frame = self._pending.pop(0)
            handler = handler_of(number)
            if callable(handler):
                handler(number, frame)

    def _deliver_all(self) -> None:
        """At the end: also those queued behind one that raises."""
        try:
            self._deliver(_get)
        finally:
            if self._pending:
                self._deliver_all()


class _Receiver:
    """Replaces a handler during a step.

    Code in a closure that asks for a signal's handler gets this object, and may call it from its own handler or install it
    again, during or after the step. Where it does not hold the signal any more, it forwards to the original handler.
    """

    def __init__(self, owner: Interrupts, handler: Callable[[int, FrameType | None], Any]):
        self.owner, self.handler = owner, handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.owner.holds(number, self):
            self.owner.receive(number, frame)
        else:
            self.handler(number, frame)
