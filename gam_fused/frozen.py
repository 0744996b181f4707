"""Frozen parameters that a forward moves, such as a momentum encoder's: which they are, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gam_fused.module_tree import same_objects
from gam_fused.parameters import is_dtensor
from gam_fused.sharding import local
from gam_fused.snapshots import AFTER, BEFORE
from gam_fused.tensor_lists import is_capturing

if TYPE_CHECKING:
    from gam_fused.model_state import BufferLayout

_version_of = attrgetter("_version")


class FrozenParameters:
    """Parameters that the optimizer does not write to: most never move, some are moved by the forward.

    Which do is learnt: from copies around the first pass of the first step, where they are not large, and from then on from
    their versions and addresses. Those that have moved are copied before every later step.

    Attributes:
        copied: those to be copied before a step. late: those that moved although no copy had been made of them.
    """

    def __init__(self, params: list[Tensor], budget: int):
        # Subclasses may keep their elements elsewhere: those of quantized weights do.
        self._params = [p for p in params if p.device.type != "meta" and (type(p) is nn.Parameter or is_dtensor(p))]
        self._all = params
        self._watched = [p for p in self._params if not is_dtensor(p)]
        self._learning = (
            bool(self._params) and _bytes_of(self._params) <= budget and not is_capturing(self._params[0].device)
        )
        self.copied = list(self._params) if self._learning else []
        self.late: list[MovedParameter] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._homes: list[Tensor] = []

    def are(self, params: list[Tensor]) -> bool:
        return same_objects(params, self._all)

    def begin(self) -> None:
        """Before a step: where they lie, and how often they have been written to."""
        self.late = []
        if not self._watched:
            return
        self._versions = list(map(_version_of, self._watched))
        addresses = list(map(Tensor.data_ptr, self._watched))
        if addresses != self._addresses:
            self._addresses, self._homes = addresses, [p.detach() for p in self._watched]

    def first_pass_done(self, before: BufferLayout, after: BufferLayout) -> None:
        """Learn which the first pass has moved, and keep what it has made of those that no copy was made of."""
        if not self._params:
            return
        moving = {id(p) for p in self.copied}
        if self._learning:
            moving = {id(p) for p in before.frozen if _differ(before, after, p)}
        copied = {id(p) for p in before.frozen}
        versions, addresses = list(map(_version_of, self._watched)), list(map(Tensor.data_ptr, self._watched))
        if self._learning or versions != self._versions or addresses != self._addresses:
            now, then = zip(versions, addresses, strict=True), zip(self._versions, self._addresses, strict=True)
            for p, home, a, b in zip(self._watched, self._homes, now, then, strict=True):
                if a != b:
                    moving.add(id(p))
                    if id(p) not in copied:
                        self.late.append(MovedParameter(p, home))
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


class MovedParameter:
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


def _differ(before: BufferLayout, after: BufferLayout, p: Tensor) -> bool:
    """Whether the first pass has changed a parameter that was copied. Waits for the device."""
    return not before.snapshots.copy_of(p, BEFORE).equal(after.snapshots.copy_of(p, AFTER))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(local, tensors))
