"""Frozen parameters that a forward changes, such as a momentum encoder's: which they are, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gam_fused.backends.uploads import is_capturing
from gam_fused.parallel.dtensor import is_dtensor, local
from gam_fused.transaction.module_tree import same_objects
from gam_fused.transaction.snapshots import AFTER, BEFORE

if TYPE_CHECKING:
    from gam_fused.transaction.model_state import BufferLayout

_ALL_LEARNT = 8  # steps of which each is learnt from; later ones are where their number is a power of two
_version_of = attrgetter("_version")


class FrozenParameters:
    """Parameters that the optimizer does not update: most never change, some are changed by the forward.

    Which ones change is learnt: from their versions and addresses in every step, and, since a write through `.data` changes
    neither, from copies around the first pass of some steps, where they are not too large. Those that have changed are
    copied in every later step; once one has changed undetected, all are.

    Attributes:
        late: those that changed although no copy had been made of them.
    """

    def __init__(self, params: list[Tensor], budget: int):
        # Subclasses may keep their elements elsewhere: those of quantized weights do, and so do sparse tensors.
        strided = [p for p in params if p.device.type != "meta" and p.layout is torch.strided]
        strided = [p for p in strided if not (p.is_nested or p.is_quantized)]
        self._params = [p for p in strided if type(p) is nn.Parameter or is_dtensor(p)]
        self._all = params
        self._watched = [p for p in self._params if not is_dtensor(p) and not p.is_inference()]
        self._affordable = bool(self._params) and _bytes_of(self._params) <= budget
        self._moving: list[Tensor] = []
        self._copied: list[Tensor] = []
        self._steps, self._learning, self._untold = 0, False, False
        self._lesson: Lesson | None = None
        self.late: list[MovedParameter] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._homes: list[Tensor] = []

    def are(self, params: list[Tensor]) -> bool:
        return same_objects(params, self._all)

    def begin(self) -> list[Tensor]:
        """Before a step: note addresses and versions. Returns those to be copied."""
        self.late = []
        if not self._params:
            return []
        if self._watched:
            self._versions = list(map(_version_of, self._watched))
            addresses = list(map(Tensor.data_ptr, self._watched))
            if addresses != self._addresses:
                self._addresses, self._homes = addresses, [p.detach() for p in self._watched]
        self._learning = False
        if is_capturing(self._params[0].device):  # nothing may be asked of it; memory is there for what was copied before
            return self._copied
        if self._affordable:
            self._learn()
            self._steps += 1
            self._learning = not self._untold and (self._steps <= _ALL_LEARNT or self._steps & (self._steps - 1) == 0)
        self._copied = self._params if self._learning or self._untold or self._lesson else self._moving
        return self._copied

    def first_pass_done(self, before: BufferLayout, after: BufferLayout) -> None:
        """Keep the first pass's values of those without a copy, and learn which it has changed."""
        if not self._params:
            return
        told: set[int] = set()
        versions, addresses = list(map(_version_of, self._watched)), list(map(Tensor.data_ptr, self._watched))
        if versions != self._versions or addresses != self._addresses:
            copied = set(map(id, before.frozen))
            now, then = zip(versions, addresses, strict=True), zip(self._versions, self._addresses, strict=True)
            for p, home, a, b in zip(self._watched, self._homes, now, then, strict=True):
                if a != b:
                    told.add(id(p))
                    if id(p) not in copied:
                        self.late.append(MovedParameter(p, home))
        self._add(told)
        if self._learning and self._lesson is None:
            self._lesson = Lesson(before, after, told)

    def _learn(self) -> None:
        """Read an earlier step's comparison, once it has arrived."""
        if self._lesson and (found := self._lesson.moved()) is not None:
            self._untold = self._untold or not found <= self._lesson.told
            self._add(found)
            self._lesson = None

    def _add(self, moved: set[int]) -> None:
        if moved:
            moved = moved | set(map(id, self._moving))
            self._moving = [p for p in self._params if id(p) in moved]

    def replay(self) -> None:
        """Before each further pass, and after a failure: those without a copy get the values before the first pass, if it
        has moved them to other memory, otherwise those after it."""
        for parameter in self.late:
            parameter.replay()

    def finish(self) -> None:
        """As the first pass left them."""
        for parameter in self.late:
            parameter.finish()


class MovedParameter:
    """A frozen parameter that the first pass changed, without a copy from before."""

    def __init__(self, p: Tensor, home: Tensor):
        self._p, self._home = p, home
        self._left, self._copy = p.detach(), p.detach().clone()

    def replay(self) -> None:
        if self._left.data_ptr() != self._home.data_ptr():
            self._p.data = self._home
        else:
            self._p.copy_(self._copy)

    def finish(self) -> None:
        self._p.data = self._left
        self._p.copy_(self._copy)


class Lesson:
    """Which frozen parameters the first pass of a step has changed: compared on their devices, read later without waiting.

    Attributes:
        told: ids of those that versions or addresses reveal.
    """

    def __init__(self, before: BufferLayout, after: BufferLayout, told: set[int]):
        self.told = told
        self._ids: list[int] = []
        flags = []
        for p in before.frozen:
            then, now = before.snapshots.copy_of(p, BEFORE), after.snapshots.copy_of(p, AFTER)
            if then is None or now is None or then.shape != now.shape or then.dtype != now.dtype:
                told.add(id(p))  # it is another tensor now
            else:
                self._ids.append(id(p))
                flags.append((then != now).any().to(torch.uint8))
        self._hosts, self._ready = _on_the_way(flags)

    def moved(self) -> set[int] | None:
        """Their ids; None while that is not known yet."""
        if not all(ready() for ready in self._ready):
            return None
        return {i for i, flag in zip(self._ids, self._hosts, strict=True) if flag.item()} | self.told


def _on_the_way(flags: list[Tensor]) -> tuple[list[Tensor], list[Callable[[], bool]]]:
    """The flags in host memory, and functions that say whether they have arrived. Nothing waits."""
    if all(flag.device.type != "cuda" for flag in flags):
        return flags, []
    hosts, ready = [], []
    for flag in flags:
        if flag.device.type != "cuda":
            hosts.append(flag)
            continue
        hosts.append(torch.empty((), dtype=flag.dtype, device="cpu", pin_memory=True))
        hosts[-1].copy_(flag, non_blocking=True)
    for device in {flag.device for flag in flags if flag.device.type == "cuda"}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        ready.append(event.query)
    return hosts, ready


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(local, tensors))
