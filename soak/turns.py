"""How long a part goes on, and what it tells meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

EVERY = 10.0  # seconds between two lines of progress
SHOWN = 20  # failures of a part that are kept with their text


class Turns:
    """The numbers 0, 1, ... until the seconds or the count are over.

    Attributes:
        done: turns so far. failures: texts of the first ones; failed: how many there were.
    """

    def __init__(self, name: str, seconds: float = float("inf"), count: int | None = None):
        self.name, self.seconds, self.count = name, seconds, count
        self.start = self.told = time.monotonic()
        self.done = self.failed = 0
        self.failures: list[str] = []

    def __iter__(self) -> Iterator[int]:
        while self.left() > 0 and (self.count is None or self.done < self.count):
            yield self.done
            self.done += 1
            if time.monotonic() - self.told > EVERY:
                self.told = time.monotonic()
                print(f"  {self.name}: {self.done} turns, {self.failed} failed, {self.left():.0f} s left", file=sys.stderr)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.failures) < SHOWN:
            self.failures.append(text)
            print(f"  {self.name}: {text}", file=sys.stderr)

    def figures(self, **more: Any) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.start, 1)
        return {"turns": self.done, "failed": self.failed, "seconds": seconds, **more, "failures": self.failures}
