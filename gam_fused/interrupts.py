"""Signals during a step: their handlers run while the closure does, and wait while weights and state are being written.

A handler that Python code has installed (Ctrl-C, a SIGTERM that exits, a timer that raises) may raise between any two
bytecodes. Between a kernel that has written weights and the note that says so, that would leave them perturbed. DESIGN
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
    """For the time of one step, the handlers of all signals; entered once.

    Inside, handlers wait, except between `open` and `close`, around code of the user's. After one that raises, all others
    wait until the end, so that what it started (putting everything back) is not cut in half. Python runs handlers in the
    main thread only; in any other there is nothing to hold.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: list[tuple[int, FrameType | None]] = []
        self._installed: list[Any] = []  # the handlers of all signals, with ours in place
        self._open = False

    def __enter__(self) -> Interrupts:
        try:
            self._take_over()
        except BaseException:  # of a handler that was not held yet
            self._give_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        self._give_back()
        self._deliver(_get)

    def open(self) -> None:
        """From here on handlers run at once; those that waited run now."""
        self._open = True
        if self._pending:
            self._open = False
            self._deliver(self._handlers.get)
            self._open = True

    def close(self) -> None:
        """From here on handlers wait."""
        self._open = False
        if self._installed and list(map(_get, _SIGNALS)) != self._installed:  # the user's code has set some
            self._take_over()

    def let_through(self, call: Callable[[], Result]) -> Result:
        """What `call` returns, which runs users' code: handlers run at once while it does."""
        self.open()
        try:
            return call()
        finally:
            self.close()

    def _take_over(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        receive = self._receive
        for number, handler in zip(_SIGNALS, map(_get, _SIGNALS), strict=True):
            if callable(handler) and handler != receive:
                self._handlers[number] = handler
                _set(number, receive)
        self._installed = list(map(_get, _SIGNALS))

    def _give_back(self) -> None:
        """Handlers as they were, but those that have been replaced since."""
        raised: BaseException | None = None
        while self._handlers:
            try:
                number, handler = next(iter(self._handlers.items()))
                if _get(number) == self._receive:
                    _set(number, handler)
                del self._handlers[number]
            except BaseException as error:  # a handler that is back already; the others go back all the same
                raised = error
        if raised is not None:
            raise raised

    def _deliver(self, handler_of: Callable[[int], Any]) -> None:
        while self._pending:
            number, frame = self._pending.pop(0)
            handler = handler_of(number)
            if callable(handler):
                handler(number, frame)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._open:
            self._pending.append((number, frame))
            return
        self._open = False  # it may raise
        self._handlers[number](number, frame)
        self._open = True
