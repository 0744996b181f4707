"""What forward passes read and move besides the trained parameters (DESIGN section 3, point 3).

Buffers (batch norm's statistics, spectral norm's vectors, a memory queue, observers) and frozen parameters that follow the
trained ones (a momentum encoder). Every pass of a step starts from the same, and after the step they are as the first pass
left them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_module_registration_hook
from torch.nn.parameter import is_lazy

from gam_fused.parameters import is_dtensor
from gam_fused.sharding import local
from gam_fused.snapshots import Snapshots
from gam_fused.tensor_lists import is_capturing, moved

Owner = dict[str, Any]  # the `_buffers` of a module
BEFORE, AFTER = 0, 1  # numbers of the copies
# Frozen parameters that take up to this many bytes, or times the memory of the trained ones, are copied once, to see which
# of them move: a momentum encoder is as large as what it follows, a frozen backbone much larger than what is trained on top.
_COPIED_ONCE, _TIMES_TRAINED = 16 << 20, 2
_version_of = attrgetter("_version")


class ModelState:
    """The buffers and frozen parameters of some modules, from step to step.

    Args:
        modules: the modules.
        trained: the parameters that the optimizer writes to; what shares their memory is left alone.
        backend: the optimizer's.
    """

    def __init__(self, modules: Iterable[nn.Module], trained: Sequence[Tensor] = (), backend: str = "auto"):
        self._modules, self._backend = list(modules), backend
        self._trained = {id(p) for p in trained}
        self._extents = sorted(_extent(local(p)) for p in trained if p.numel() and p.device.type != "meta")
        self._frozen = _Frozen([], 0)
        self._layout: _Layout | None = None
        self._tree: _Tree | None = None

    def begin(self) -> StepState:
        """Take note of what they hold now, before the passes of a step."""
        if self._tree is None or not self._tree.is_current():
            self._tree = _Tree(self._modules, self._trained)
        frozen = self._tree.frozen
        if not self._frozen.are(frozen):
            trained = sum(end - start for _, start, end in self._extents)
            self._frozen = _Frozen(frozen, max(_COPIED_ONCE, _TIMES_TRAINED * trained))
        if self._layout is None or not self._layout.fits(self._tree.owners, self._frozen.copied):
            self._layout = _Layout(self._tree.owners, self._frozen.copied, self._extents, self._backend)
        return StepState(self, self._layout, self._frozen)

    def layout_now(self, frozen: Sequence[Tensor]) -> _Layout:
        """The layout of what is there now."""
        return _Layout(_Tree(self._modules, self._trained).owners, frozen, self._extents, self._backend)


class _Tree:
    """All modules below some roots, each once.

    Attributes:
        owners: their `_buffers`.
        frozen: their parameters that are not trained.
    """

    def __init__(self, roots: Sequence[nn.Module], trained: set[int]):
        modules: dict[int, nn.Module] = {}
        waiting: list[nn.Module | None] = list(roots)
        self._names_others = False  # whether a class names other modules than its own: then nothing tells of a change
        while waiting:
            module = waiting.pop()
            if module is None or id(module) in modules:
                continue
            modules[id(module)] = module
            waiting += module._modules.values()
            kind: Any = type(module)
            if _names_others(kind):
                self._names_others = True
                waiting += module.modules()
        self._children = [m._modules for m in modules.values()]
        self.owners: list[Owner] = [m._buffers for m in modules.values()]
        self._parameters = [m._parameters for m in modules.values()]
        self._known_children, self._known_parameters = _values(self._children), _values(self._parameters)
        others = (p for p in self._known_parameters if p is not None and id(p) not in trained and not is_lazy(p))
        self.frozen: list[Tensor] = list({id(p): p for p in others}.values())

    def is_current(self) -> bool:
        """Whether the same modules hold the same modules and parameters."""
        return (
            not self._names_others
            and _same(_values(self._children), self._known_children)
            and _same(_values(self._parameters), self._known_parameters)
        )


class StepState:
    """One step's view: what buffers and frozen parameters held before it, and after its first pass."""

    def __init__(self, model: ModelState, layout: _Layout, frozen: _Frozen):
        self._model, self._layout, self._frozen = model, layout, frozen
        self._layout.snapshots.take(BEFORE)
        self._frozen.begin()
        self._after: _Layout | None = None  # the same, but where the first pass has replaced or added something
        self._late = _Late()

    @property
    def devices(self) -> set[torch.device]:
        return self._layout.devices

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """For the time of the first pass: buffers that it registers are copied as they come."""
        with self._late.watching():
            yield

    def first_pass_done(self) -> None:
        if self._late.any or not self._layout.is_in_place():
            self._after = self._model.layout_now(self._layout.frozen)
            self._after.snapshots.take(AFTER)
        else:
            self._after = self._layout
            self._layout.snapshots.take(AFTER)
        self._frozen.first_pass_done(self._layout, self._after)

    def replay(self) -> None:
        """Before each further pass: as at the start of the first."""
        self._layout.put_back(BEFORE, reshaped=self._after is not self._layout)
        self._late.put_back()
        self._frozen.replay()

    def finish(self, skipped: Tensor) -> None:
        """After the step: as the first pass left them, or, where `skipped` is not 0, as before the step.

        Args:
            skipped: 0-d, on any device; the host waits for it only where a buffer lies on the CPU and it does not, and where
                the first pass replaced a buffer, changed how one lies, or wrote to a sparse or quantized one.
        """
        if self._after is None:
            return
        if skipped.device.type == "cpu" or self._after is not self._layout or self._frozen.late:
            if bool(moved(skipped, torch.device("cpu"))):
                self.abort()
            else:
                self._after.put_back(AFTER)
                self._frozen.finish()
        else:
            self._layout.snapshots.choose(AFTER, BEFORE, skipped)
            self._layout.put_back(AFTER, reshaped=False)

    def abort(self) -> None:
        """After a failure: as before the step."""
        self.replay()


class _Layout:
    """Which tensors stand under which names, and memory for copies of them.

    Attributes:
        frozen: the frozen parameters among the tensors.
    """

    def __init__(self, owners: list[Owner], frozen: Sequence[Tensor], extents: list[tuple], backend: str):
        self._owners, self._wanted = owners, list(frozen)
        self._names, self._values, self._counts = _names(owners), _values(owners), list(map(len, owners))
        buffers = [t for t in self._values if t is not None and not is_lazy(t)]
        self._has_lazy = len(buffers) + sum(t is None for t in self._values) < len(self._values)
        tensors = list({id(t): t for t in [*buffers, *frozen]}.values())
        tensors = [t for t in tensors if not _overlaps(t, extents)]
        tracked = set(map(id, tensors))
        self.frozen = [p for p in frozen if id(p) in tracked]
        self.devices = {t.device for t in tensors}
        self.snapshots = Snapshots(tensors, backend)

    def fits(self, owners: list[Owner], frozen: Sequence[Tensor]) -> bool:
        """Whether the same tensors stand under the same names and lie where and as they did."""
        return (
            _same(owners, self._owners)
            and _same(frozen, self._wanted)
            and self._names == _names(owners)
            and _same(_values(owners), self._values)
            and not self._has_lazy
            and self.snapshots.still_fit()
        )

    def is_in_place(self) -> bool:
        """The same in short, for the time of a step."""
        return self._names_are_in_place() and not self._has_lazy and self.snapshots.in_place()

    def _names_are_in_place(self) -> bool:
        return self._names == _names(self._owners) and _same(_values(self._owners), self._values)

    def put_back(self, number: int, *, reshaped: bool = True) -> None:
        """The same tensors under the same names, holding what copy `number` says. Names that came later stay."""
        if not self._names_are_in_place():
            names, values = iter(self._names), iter(self._values)
            for owner, count in zip(self._owners, self._counts, strict=True):
                for _ in range(count):
                    name, value = next(names), next(values)
                    if owner.get(name, owner) is not value:
                        owner[name] = value
        self.snapshots.put_back(number, reshaped=reshaped)


class _Frozen:
    """Parameters that the optimizer does not write to: most never move, some are moved by the forward.

    Which do is learnt: from copies around the first pass of the first step, where they are not large, and from then on from
    their versions and addresses. Those that have moved are copied before every later step.

    Attributes:
        copied: those to be copied before a step. late: those that moved although no copy had been made of them.
    """

    def __init__(self, params: list[Tensor], budget: int):
        self._params = [p for p in params if p.device.type != "meta"]
        self._all = params
        self._watched = [p for p in self._params if not is_dtensor(p)]
        self._learning = (
            bool(self._params) and _bytes_of(self._params) <= budget and not is_capturing(self._params[0].device)
        )
        self.copied = list(self._params) if self._learning else []
        self.late: list[_Moved] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._homes: list[Tensor] = []

    def are(self, params: list[Tensor]) -> bool:
        return _same(params, self._all)

    def begin(self) -> None:
        """Before a step: where they lie, and how often they have been written to."""
        self.late = []
        if not self._watched:
            return
        self._versions = list(map(_version_of, self._watched))
        addresses = list(map(Tensor.data_ptr, self._watched))
        if addresses != self._addresses:
            self._addresses, self._homes = addresses, [p.detach() for p in self._watched]

    def first_pass_done(self, before: _Layout, after: _Layout) -> None:
        """Learn which the first pass has moved, and keep what it has made of those that no copy was made of."""
        if not self._params:
            return
        moving = {id(p) for p in self.copied}
        if self._learning:
            changed = lambda p: not before.snapshots.copy_of(p, BEFORE).equal(after.snapshots.copy_of(p, AFTER))  # noqa: E731
            moving = {id(p) for p in before.frozen if changed(p)}
        copied = {id(p) for p in before.frozen}
        versions, addresses = list(map(_version_of, self._watched)), list(map(Tensor.data_ptr, self._watched))
        if self._learning or versions != self._versions or addresses != self._addresses:
            now, then = zip(versions, addresses, strict=True), zip(self._versions, self._addresses, strict=True)
            for p, home, a, b in zip(self._watched, self._homes, now, then, strict=True):
                if a != b:
                    moving.add(id(p))
                    if id(p) not in copied:
                        self.late.append(_Moved(p, home))
            self.copied, self._learning = [p for p in self._params if id(p) in moving], False

    def replay(self) -> None:
        """Before each further pass, and after a failure: those without a copy start from where the first pass started, if it
        has put them into other memory, otherwise from where it left them."""
        for moved_ in self.late:
            moved_.replay()

    def finish(self) -> None:
        """As the first pass left them."""
        for moved_ in self.late:
            moved_.finish()


class _Moved:
    """A frozen parameter that the first pass moved, of which there is no copy from before."""

    def __init__(self, p: Tensor, home: Tensor):
        self._p, self._home = p, home
        self._left, self._copy = p.detach(), p.detach().clone()

    @torch.no_grad()
    def replay(self) -> None:
        if self._left.data_ptr() != self._home.data_ptr():
            self._p.data = self._home
        else:
            self._p.copy_(self._copy)

    @torch.no_grad()
    def finish(self) -> None:
        self._p.data = self._left
        self._p.copy_(self._copy)


class _Late:
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


@cache
def _names_others(kind: Any) -> bool:
    """Whether modules of a class may name other modules than their own."""
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("modules", "named_modules"))


def _values(owners: list[Owner]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, owners)))


def _names(owners: list[Owner]) -> list[str]:
    return list(chain.from_iterable(owners))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(local, tensors))


def _extent(t: Tensor) -> tuple[str, int, int]:
    """Device, first and last byte of what the elements of `t` span in memory."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return str(t.device), t.data_ptr(), t.data_ptr() + span * t.element_size()


def _overlaps(t: Tensor, extents: list[tuple[str, int, int]]) -> bool:
    if is_dtensor(t) or t.layout is not torch.strided or t.device.type == "meta" or not t.numel():
        return False
    device, start, end = _extent(t)
    return any(device == d and start < e and s < end for d, s, e in extents)
