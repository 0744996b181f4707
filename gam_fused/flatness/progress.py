"""How far a long measure is: a bar of tqdm's, or calls of a function."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

ProgressArgument = bool | Callable[[int, int], Any]


class Progress:
    """Counts passes while entered.

    Args:
        show: False: nothing; True: a bar of tqdm's; or a function of (done, total), called after every pass.
        total: how many there will be, at most.
        name: what is measured.

    Raises:
        ImportError: True, and tqdm is not there.
    """

    def __init__(self, show: ProgressArgument, total: int, name: str):
        self._done, self._total = 0, total
        self._call = show if callable(show) else None
        self._bar: Any = None
        if show is True:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError(
                    "progress=True shows a bar of tqdm's: pip install tqdm, or pass a function of (done, total)"
                ) from error
            self._bar = tqdm(total=total, desc=name, leave=False)

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._call:
            self._call(self._done, self._total)
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
