"""Copies of many tensors at once: flat buffers, filled and read back by one kernel per device and width of elements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends import copying_backend
from gam_fused.backends.operands import Restore
from gam_fused.backends.tensor_lists import Layout, TensorList, flat_views, is_dense
from gam_fused.backends.uploads import moved
from gam_fused.memory.likeness import Remembered
from gam_fused.parallel.dtensor import is_dtensor, local
from gam_fused.torch_private import values_of

BEFORE, AFTER = 0, 1  # numbers of copies: before a step, and after its first pass
_LOOKS: tuple[Callable[[Tensor], Any], ...] = (Tensor.stride, attrgetter("shape"), attrgetter("dtype"))
# What elements of these many bytes are copied as: kernels copy bits, whatever they stand for. Few kinds make few launches.
_WORDS = {16: torch.float32, 8: torch.float32, 4: torch.float32, 2: torch.bfloat16, 1: torch.uint8}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8}


_PACKED = (torch.quint4x2, torch.quint2x4)
_OWN_MEMORY = (Tensor, torch.nn.Parameter, torch.nn.Buffer)  # subclasses may keep their elements elsewhere


class Snapshots:
    """Memory for several copies of the same tensors, by number. Used under `torch.no_grad`.

    Args:
        tensors: of any devices, dtypes and layouts.
        backend: the optimizer's.
    """

    def __init__(self, tensors: Sequence[Tensor], backend: str = "auto"):
        self._not_copied = [t for t in tensors if not _can_be_copied(t)]
        tensors = [t for t in tensors if _can_be_copied(t)] if self._not_copied else tensors
        plain = [t for t in tensors if _is_plain(t)]
        self._others = [t for t in tensors if not _is_plain(t)]
        self._placed = plain + [t for t in self._others if t.layout is torch.strided and type(t) in _OWN_MEMORY]
        self._home = [t.detach() for t in self._placed]  # keeps their memory alive, should they be moved
        self._note_places()
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for t in plain:
            by_kind[t.device, _WORDS[t.element_size()]].append(t)
        self._kinds = [_Kind(members, word, backend) for (_, word), members in by_kind.items()]
        self._other_copies: dict[int, list[tuple[Tensor, Any]]] = {}
        self._marks: dict[int, list[_Mark]] = {}
        self._places: dict[int, tuple[_Kind, int]] | None = None  # of the tensors, by id; made when asked for

    def _note_places(self) -> None:
        self._addresses, self._layouts = self._addresses_now(), (layouts := _layouts_of(self._placed))
        self._lie_alike = Remembered(lambda tensors: _layouts_of(tensors) == layouts)  # holds no copies in a cycle

    def _addresses_now(self) -> list[int]:
        try:
            return list(map(Tensor.data_ptr, self._placed))
        except RuntimeError:  # one has become sparse
            return []

    def still_fit(self) -> bool:
        """Whether addresses and layouts are those for which memory was made."""
        return not self._others and self.in_place()

    def moved(self) -> bool:
        """Whether any has another address."""
        return self._addresses_now() != self._addresses

    def in_place(self) -> bool:
        """Whether all have their addresses and layouts."""
        return not self.moved() and self._lie_alike(self._placed)

    def take(self, number: int) -> None:
        """Copy what the tensors hold now into copy `number`."""
        for kind in self._kinds:
            kind.take(number)
        if self._others:
            self._other_copies[number] = [(_clone(t), _Mark(t)) for t in self._others]
        if self._not_copied:
            self._marks[number] = list(map(_Mark, self._not_copied))

    def bring_home(self) -> None:
        """Move the tensors back to the memory they had, in the layout they had."""
        if self.in_place():
            return
        where = zip(self._addresses, *self._layouts, strict=True)
        for t, home, (address, *layout) in zip(self._placed, self._home, where, strict=True):
            if t.data_ptr() != address or [look(t) for look in _LOOKS] != layout:
                _move_home(t, home)
        if not self.in_place():  # resized memory may have gone elsewhere
            self._note_places()
            self._kinds, self._places = [kind.anew() for kind in self._kinds], None

    def put_back(self, number: int) -> None:
        """Restore the contents that copy `number` has, where the tensors lie in their own memory.

        Raises:
            RuntimeError: those of a tensor that torch cannot copy have changed.
        """
        for kind in self._kinds:
            kind.put_back(number)
        for t, (copy, mark) in zip(self._others, self._other_copies.get(number, []), strict=False):
            if t.layout is torch.strided or _Mark(t) != mark:
                with torch.inference_mode(t.is_inference()):  # such tensors are written to nowhere else
                    part(t).copy_(copy)
        for t, mark in zip(self._not_copied, self._marks.get(number, []), strict=False):
            if _Mark(t) != mark:
                raise RuntimeError(
                    f"a pass wrote to a buffer of model= ({t.dtype}, {'nested' if t.is_nested else t.qscheme()}) that torch "
                    "cannot copy, so the next pass cannot start from what it held; keep such a buffer unchanged"
                )

    def choose(self, number: int, other: int, flag: Tensor) -> None:
        """Copy `number` becomes copy `other` where `flag` (0-d, on any device) is not 0. Does not wait for the device."""
        for kind in self._kinds:
            kind.choose(number, other, flag)
        mine, theirs = self._other_copies.get(number, []), self._other_copies.get(other, [])
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a[0].layout is torch.strided and not a[0].is_quantized:
                torch.where(moved(flag, a[0].device) != 0, b[0], a[0], out=a[0])
            elif a[1] != b[1] and flag:
                mine[i] = b

    def copy_of(self, t: Tensor, number: int) -> Tensor | None:
        """Copy `number` of one of the tensors: its bits. None where there is none."""
        if self._places is None:
            self._places = {id(m): (kind, i) for kind in self._kinds for i, m in enumerate(kind.tensors)}
        if id(t) in self._places:
            kind, i = self._places[id(t)]
            bits: Tensor = kind.memory(number).tensors[i].view(_BITS[kind.word])
            return bits
        return next((c[0] for o, c in zip(self._others, self._other_copies[number], strict=True) if o is t), None)


class _Kind:
    """Tensors of one device and width: the tensors as rows of words, and copies of them."""

    def __init__(self, tensors: list[Tensor], word: torch.dtype, backend: str):
        self.tensors, self.word, self._backend = tensors, word, backend
        self._copier = copying_backend(backend, tensors[0].device) if word is not torch.uint8 else None
        self._rows = [_row(t, word) for t in tensors]
        self.live = TensorList(self._rows, lasting=True)
        self._layout = Layout([row.numel() for row in self._rows], [0] * len(tensors), [False] * len(tensors))
        self._memory: dict[int, tuple[Tensor, TensorList]] = {}
        self._copies: dict[tuple[int, bool], Callable[[], object]] = {}  # of which number, and whether back

    def anew(self) -> _Kind:
        """The same for where the tensors lie now."""
        fresh = _Kind(self.tensors, self.word, self._backend)
        fresh._memory = self._memory
        return fresh

    def memory(self, number: int) -> TensorList:
        if number not in self._memory:
            flat, views = flat_views(self._rows)
            self._memory[number] = flat, TensorList(views, lasting=True)
        return self._memory[number][1]

    def take(self, number: int) -> None:
        """Copy what the tensors hold now into copy `number`."""
        self._copy(number, back=False)

    def put_back(self, number: int) -> None:
        self._copy(number, back=True)

    def _copy(self, number: int, *, back: bool) -> None:
        if (number, back) not in self._copies:
            live, memory = self.live, self.memory(number)
            self._copies[number, back] = self._copying(live, memory) if back else self._copying(memory, live)
        self._copies[number, back]()

    def _copying(self, target: TensorList, source: TensorList) -> Callable[[], object]:
        if self._copier is None:
            return partial(torch._foreach_copy_, target.tensors, source.tensors)
        return self._copier.copier(Restore(layout=self._layout, theta=target, backup=source))

    def choose(self, number: int, other: int, flag: Tensor) -> None:
        here = moved(flag, self._rows[0].device) != 0
        mine, theirs = (self._memory[n][0].view(_BITS[self.word]) for n in (number, other))
        torch.where(here, theirs, mine, out=mine)


def _layouts_of(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """The strides, shapes and dtypes of tensors."""
    try:
        return [list(map(look, tensors)) for look in _LOOKS]
    except RuntimeError:  # one has become sparse
        return []


def _row(t: Tensor, word: torch.dtype) -> Tensor:
    """The elements of a dense tensor, in the order of memory, as words."""
    row = t.detach().as_strided((t.numel(),), (1,), t.storage_offset())
    return row.view(word) if row.numel() else torch.empty(0, dtype=word, device=row.device)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is one contiguous stretch of its own memory."""
    return (
        not is_dtensor(t)
        and t.layout is torch.strided
        and not t.is_quantized
        and not t.is_conj()
        and not t.is_neg()
        and t.device.type != "meta"
        and type(t) in _OWN_MEMORY
        and is_dense(t)
        and t.element_size() in _WORDS
    )


def _can_be_copied(t: Tensor) -> bool:
    """Whether torch does: neither strided nested tensors nor quantized ones of 4 bits or with zero points in float."""
    if t.is_quantized:
        return t.qscheme() in (torch.per_tensor_affine, torch.per_channel_affine) and t.dtype not in _PACKED
    return not t.is_nested or t.layout is not torch.strided


class _Mark:
    """Changes when a tensor is written to, or, one that is not strided, gets other memory.

    It keeps the memory it saw, which other values would otherwise be given once the tensor has left it.
    """

    def __init__(self, t: Tensor):
        version = None if t.is_inference() else t._version
        values = values_of(t)
        self._values = None if values is None else values.detach()
        self._facts = version, None if self._values is None else self._values.data_ptr()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self._facts == other._facts


def _clone(t: Tensor) -> Tensor:
    """A copy of a tensor's elements, itself without the conjugate and negative bits."""
    return part(t).clone().resolve_conj().resolve_neg()


def part(t: Tensor) -> Tensor:
    """The elements of `t` that this rank holds, each once: what an expanded tensor repeats cannot be written to."""
    mine = local(t) if is_dtensor(t) else t
    if mine.layout is torch.strided:
        for dim, (stride, size) in enumerate(zip(mine.stride(), mine.shape, strict=True)):
            if stride == 0 and size > 1:
                mine = mine.narrow(dim, 0, 1)
    return mine


def _move_home(t: Tensor, home: Tensor) -> None:
    """Move `t` back to the memory of `home`, which may have been resized in the meantime."""
    needed = (home.storage_offset() + home.numel()) * home.element_size()
    if home.untyped_storage().nbytes() < needed:
        home.untyped_storage().resize_(int(needed))
    t.data = home
