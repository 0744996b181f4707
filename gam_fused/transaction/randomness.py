"""The same random numbers in every pass of a step: states are saved, replayed and restored (docs/design.md, section 3)."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

try:
    import _random
except ImportError:  # not CPython
    _random = None  # type: ignore[assignment]


class Generators:
    """All generators that a closure may draw from.

    torch's of the CPU and of every given device, Python's `random`, numpy's global one where numpy's random numbers have
    been imported, and the given ones.

    A process has one of each global generator: what another thread draws during a step is drawn again after a replay.
    """

    def __init__(self, devices: Iterable[torch.device], own: Sequence[Any] = ()):
        self._always = [_CPU, _PYTHON, *(_Torch(d) for d in set(devices) if d.type not in ("cpu", "meta"))]
        self._always += [source_of(g) for g in own]

    def begin(self) -> RandomState:
        """Save their states before the passes of a step."""
        return RandomState([*self._always, _numpy()] if "numpy.random" in sys.modules else self._always)


class RandomState:
    """States of generators at the start of pass 1 and at its end.

    After the step they are in the state that one ordinary pass and the base optimizer's update leave, so a run is
    reproducible whatever the number of passes.
    """

    def __init__(self, sources: list[Any]):
        self._sources = sources
        self._start = [source.read() for source in sources]
        self._after_first: list[Any] | None = None  # read where further passes follow
        self._drawn_from: list[tuple[Any, Any]] = []

    def replay(self) -> None:
        """Before each further pass: as at the start of the first."""
        if self._after_first is None:
            self._look()
        for source, start in self._drawn_from:
            source.write(start)

    def finish(self) -> None:
        """After the passes: as the first one left them."""
        if self._after_first is not None:
            self._put(self._after_first)

    def _look(self) -> None:
        """After the first pass: what it has left, and drawn from."""
        self._after_first = [source.read() for source in self._sources]
        for source, start, after in zip(self._sources, self._start, self._after_first, strict=True):
            if not source.equal(start, after):
                self._drawn_from.append((source, start))

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._put(self._start)

    def _put(self, states: list[Any]) -> None:
        for source, state in zip(self._sources, states, strict=True):
            if not source.is_at(state):
                source.write(state)


def source_of(generator: Any) -> Any:
    """A reader and writer of the state of a user's generator.

    Raises:
        TypeError: neither a torch.Generator, a numpy.random.Generator or RandomState, nor a random.Random.
    """
    if isinstance(generator, torch.Generator):
        return _OwnTorch(generator)
    if isinstance(generator, random.Random):
        return _Python(generator)
    if hasattr(generator, "bit_generator"):  # numpy.random.Generator
        return _Plain(lambda: generator.bit_generator.state, lambda state: setattr(generator.bit_generator, "state", state))
    if hasattr(generator, "get_state") and hasattr(generator, "set_state"):  # numpy.random.RandomState
        return _Plain(lambda: generator.get_state(legacy=False), generator.set_state)
    raise TypeError(
        f"generators= takes torch.Generator, numpy.random.Generator, numpy.random.RandomState and random.Random objects, "
        f"not {type(generator).__name__}"
    )


class _Torch:
    """torch's default generator of the CPU (device None) or of a device."""

    def __init__(self, device: torch.device | None):
        if device is None:
            self.read, self.write = torch.default_generator.get_state, torch.default_generator.set_state
        else:
            module = torch.get_device_module(device)
            self.read, self.write = partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)

    def equal(self, a: Tensor, b: Tensor) -> bool:
        return False  # writing a state takes less time than comparing two

    def is_at(self, state: Tensor) -> bool:
        return False


class _OwnTorch(_Torch):
    def __init__(self, generator: torch.Generator):
        self.read, self.write = generator.get_state, generator.set_state


class _Python:
    """Python's `random`, or a `random.Random`. Its state takes long to read, so it is read again only when changed."""

    def __init__(self, generator: Any):
        self._whole, self.write = generator.getstate, generator.setstate
        self._of: Any = getattr(generator.getstate, "__self__", None)  # the module's functions are methods of a Random
        self._address = _twister_of(self._of)
        self._last: tuple[bytes, Any, Any] | None = None

    def read(self) -> Any:
        if not self._address:
            return self._whole()
        words, normal = ctypes.string_at(self._address, _TWISTER), self._of.gauss_next  # a normal number in stock
        if self._last is None or self._last[0] != words or self._last[1] != normal:
            self._last = words, normal, self._whole()
        return self._last[2]

    def equal(self, a: Any, b: Any) -> bool:
        """By the last few of its 624 words and its position: the words change all at once."""
        return a is b or bool(a[1][-8:] == b[1][-8:] and a[2] == b[2])

    def is_at(self, state: Any) -> bool:
        return bool(self._address) and self.read() is state


_TWISTER = 625 * 4  # bytes: CPython keeps the position of the Mersenne Twister and its 624 words in the object


def _twister_of(generator: Any) -> int:
    """Where a `random.Random` keeps its Mersenne Twister; 0 where it does so in another way than CPython's."""
    header, size = object.__basicsize__, getattr(_random, "Random", object).__basicsize__
    if type(generator) is not random.Random or size < header + _TWISTER:
        return 0
    address = id(generator) + header
    position, *words = struct.unpack("i624I", ctypes.string_at(address, _TWISTER))
    return address if (*words, position) == generator.getstate()[1] else 0


class _Plain:
    """A generator whose states are dicts that may hold arrays."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]):
        self.read, self.write = read, write

    def is_at(self, state: Any) -> bool:
        return self.equal(self.read(), state)

    def equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.equal(a[key], b[key]) for key in a)
        return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


class _Numpy(_Plain):
    """numpy's global generator. Its state takes long to read, so it is read again only where it can have changed.

    That is, where the words of the Mersenne Twister differ from those of the last reading; and always, once one number of a
    pair of normal ones has been in stock, which goes and (by a seed or a state that is set) comes without a change of words.
    """

    def __init__(self, module: Any):
        super().__init__(lambda: module.get_state(legacy=False), module.set_state)
        self._get_bits = getattr(module, "get_bit_generator", lambda: None)
        self._last: tuple[bytes, Any] | None = None
        self._pairs = False  # whether there ever was one in stock
        self._read_whole = self.read
        self.read = self._read
        self._bits: Any = None
        self._address = 0

    def _read(self) -> Any:
        words = self._words()
        if self._last is None or not words or self._last[0] != words or self._pairs:
            self._last = words, self._read_whole()
            self._pairs = self._pairs or bool(self._last[1].get("has_gauss"))
        return self._last[1]

    def _words(self) -> bytes:
        """The twister's 624 words and its position, or b"" where the global generator is of another kind."""
        bits: Any = self._get_bits()
        if bits is not self._bits:
            self._bits, self._address = bits, bits.ctypes.state_address if type(bits).__name__ == "MT19937" else 0
        return ctypes.string_at(self._address, 625 * 4) if self._address else b""

    def equal(self, a: Any, b: Any) -> bool:
        return a is b or super().equal(a, b)


_CPU, _PYTHON = _Torch(None), _Python(random)
_NUMPY: list[_Numpy] = []


def _numpy() -> _Numpy:
    if not _NUMPY:
        _NUMPY.append(_Numpy(sys.modules["numpy.random"]))
    return _NUMPY[0]
