"""What forward passes read and change besides the trained parameters (docs/design.md, section 3, point 3).

Buffers (batch norm's statistics, spectral norm's vectors, a memory queue, observers) and frozen parameters that follow the
trained ones (a momentum encoder). Every pass of a step starts from the same values, and after the step they are as the
first pass left them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gam_fused.backends.uploads import moved
from gam_fused.parallel.dtensor import is_dtensor, local
from gam_fused.transaction.frozen import FrozenParameters
from gam_fused.transaction.late_buffers import LateBuffers
from gam_fused.transaction.module_tree import Contents, ModuleTree, Owner, same_objects
from gam_fused.transaction.snapshots import AFTER, BEFORE, Snapshots

# Frozen parameters that take up to this many bytes, or times the memory of the trained ones, are copied now and then, to see
# which of them move: a momentum encoder is as large as what it follows, a frozen backbone much larger than what is trained
# on top of it.
_COPIED_TO_LEARN, _TIMES_TRAINED = 16 << 20, 2


class ModelState:
    """The buffers and frozen parameters of the given modules, across steps. Used under `torch.no_grad`.

    Args:
        modules: the modules.
        trained: the parameters that the optimizer updates; tensors that share their memory are not touched.
        backend: the optimizer's.
        idle: parameters that the optimizer has, but does not update now.

    Attributes:
        others: the modules' parameters that the optimizer does not have, as of the last `begin`.
        submodules: all modules, as of then.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        trained: Sequence[Tensor] = (),
        backend: str = "auto",
        idle: Sequence[Tensor] = (),
    ):
        self._modules, self._backend = list(modules), backend
        self._idle, self.others, self.submodules = set(map(id, idle)), list[Tensor](), list[nn.Module]()
        self._trained = {id(p) for p in trained}
        self._extents = sorted(_extent(local(p)) for p in trained if p.numel() and p.device.type != "meta")
        self._frozen = FrozenParameters([], 0)
        self._layout: BufferLayout | None = None
        self._tree: ModuleTree | None = None

    def begin(self) -> StepState:
        """Save what they hold, before the passes of a step."""
        if self._tree is None or not self._tree.is_current():
            self._tree = ModuleTree(self._modules, self._trained)
            self.others, self.submodules = self._others_in(self._tree), self._tree.modules
        frozen = self._tree.frozen
        if not self._frozen.are(frozen):
            trained = sum(end - start for _, start, end in self._extents)
            self._frozen = FrozenParameters(frozen, max(_COPIED_TO_LEARN, _TIMES_TRAINED * trained))
        copied = self._frozen.begin()
        if self._layout is None or not self._layout.fits(self._tree.owners, copied):
            self._layout = BufferLayout(self._tree.owners, copied, self._extents, self._backend)
        return StepState(self, self._layout, self._frozen)

    def others_now(self) -> list[Tensor]:
        """The modules' parameters that the optimizer does not have, with those that have been made since `begin`."""
        if self._tree is not None and self._tree.is_current():
            return self.others
        return self._others_in(ModuleTree(self._modules, self._trained))

    def _others_in(self, tree: ModuleTree) -> list[Tensor]:
        return [p for p in tree.frozen if id(p) not in self._idle]

    def modules_have_changed(self) -> bool:
        """Whether the set of submodules has changed since the beginning of the step."""
        tree = self._tree
        if tree is None or tree.is_current():
            return tree is None
        return not same_objects(ModuleTree(self._modules, self._trained).owners, tree.owners)

    def layout_now(self, frozen: Sequence[Tensor]) -> BufferLayout:
        """The present layout: of buffers, of `frozen`, and of frozen parameters added since `begin`."""
        tree, before = ModuleTree(self._modules, self._trained), self._tree
        known = set(map(id, chain(frozen, before.frozen if before else ())))
        frozen = [*frozen, *(p for p in tree.frozen if id(p) not in known)]
        return BufferLayout(tree.owners, frozen, self._extents, self._backend)


class StepState:
    """One step's view: what buffers and frozen parameters held before it, and after its first pass."""

    def __init__(self, model: ModelState, layout: BufferLayout, frozen: FrozenParameters):
        self._model, self._layout, self._frozen = model, layout, frozen
        self._layout.snapshots.take(BEFORE)
        self._after: BufferLayout | None = None  # the same, but where the first pass has replaced or added something
        self._in_place = False  # whether all are known to be where they were: no code of the user's has run since
        self._replayed = False
        self._late = LateBuffers(layout)

    @property
    def devices(self) -> set[torch.device]:
        return self._layout.devices

    def first_pass(self) -> AbstractContextManager[None]:
        """During the first pass: buffers and parameters that it registers are copied on registration."""
        return self._late.watching()

    def first_pass_done(self) -> None:
        self._after = self._layout
        self._in_place = self._layout.is_in_place()
        # Closures may make modules for their own use, such as `nn.CrossEntropyLoss()`, that are not the model's.
        if not self._in_place or (self._late.any and self._model.modules_have_changed()):
            self._after = self._model.layout_now(self._layout.frozen)
        self._after.snapshots.take(AFTER)
        self._late.keep(self._after)
        self._frozen.first_pass_done(self._layout, self._after)

    def replay(self) -> None:
        """Before each further pass: restore the start of the first."""
        if self._in_place:
            self._layout.snapshots.put_back(BEFORE)
        else:
            self._layout.put_back(BEFORE)
        self._in_place, self._replayed = False, True
        self._late.put_back()
        self._frozen.replay()

    def finish(self, skipped: Tensor) -> None:
        """After the step: restore what the first pass left, or, where `skipped` is not 0, what was before the step.

        Args:
            skipped: 0-d, on any device; the host waits for it only where a buffer lies on the CPU and it does not, and where
                the first pass replaced a buffer, changed how one lies, or wrote to a sparse or quantized one.
        """
        if self._after is None:
            return
        if skipped.device.type == "cpu" or self._after is not self._layout or self._frozen.late:
            if bool(moved(skipped, torch.device("cpu"))):
                self.abort()
            elif self._replayed:  # otherwise all is as the first pass left it
                self._after.put_back(AFTER)
                self._frozen.finish()
        else:
            self._layout.snapshots.choose(AFTER, BEFORE, skipped)
            self._layout.put_back(AFTER)

    def abort(self) -> None:
        """After a failure: restore what was before the step, whichever pass changed it."""
        self.replay()


class BufferLayout:
    """Which tensors and modules are registered under which names, and memory for copies of the tensors.

    Attributes:
        owners: the dicts that the names are in. frozen: the frozen parameters among the tensors.
    """

    def __init__(self, owners: list[Owner], frozen: Sequence[Tensor], extents: list[tuple[str, int, int]], backend: str):
        self.owners, self._wanted = owners, list(frozen)
        self._contents = Contents(owners)
        values = [t for t in self._contents.values if isinstance(t, Tensor)]  # neither None nor modules
        self._has_lazy = any(map(is_lazy, values))
        buffers = [t for t in values if not is_lazy(t) and not isinstance(t, nn.Parameter)]
        tensors = list({id(t): t for t in [*buffers, *frozen]}.values())
        tensors = [t for t in tensors if not _overlaps(t, extents)]
        self._tracked = set(map(id, tensors))
        self.frozen = [p for p in frozen if id(p) in self._tracked]
        self.devices = {t.device for t in tensors}
        self.snapshots = Snapshots(tensors, backend)

    def fits(self, owners: list[Owner], frozen: Sequence[Tensor]) -> bool:
        """Whether the same is registered under the same names, tensors at the same addresses with the same layout."""
        return (
            (owners is self.owners or same_objects(owners, self.owners))
            and same_objects(frozen, self._wanted)
            and self._contents.are_all()
            and not self._has_lazy
            and self.snapshots.still_fit()
        )

    def is_in_place(self) -> bool:
        """A cheaper check of the same, during a step."""
        return self._contents.are_all() and not self._has_lazy and self.snapshots.in_place()

    def tracks(self, owner: Owner, name: str) -> bool:
        """Whether what is registered under a name is copied."""
        return id(owner.get(name)) in self._tracked and any(owner is mine for mine in self.owners)

    def has(self, owner: Owner, name: str) -> bool:
        """Whether something was registered under a name."""
        return self._contents.has(owner, name)

    def put_back(self, number: int) -> None:
        """Restore what is registered under each name, tensors with the contents of copy `number`. Names added later stay."""
        if not self._contents.are_in_place():
            self._contents.put_back()
        self.snapshots.bring_home()
        self.snapshots.put_back(number)


def _extent(t: Tensor) -> tuple[str, int, int]:
    """Device, first and last byte of the memory that `t` spans."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return str(t.device), t.data_ptr(), t.data_ptr() + span * t.element_size()


def _overlaps(t: Tensor, extents: list[tuple[str, int, int]]) -> bool:
    if is_dtensor(t) or t.layout is not torch.strided or t.is_nested or t.device.type == "meta" or not t.numel():
        return False
    device, start, end = _extent(t)
    return any(device == d and start < e and s < end for d, s, e in extents)
