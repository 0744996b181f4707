"""Batches: how the torch backend walks its lists, in pieces of bounded size.

On the CPU they fit in the caches: temporaries as large as the model cost more than the arithmetic, since each is mapped,
faulted in and unmapped again. Elsewhere scalars are 0-d tensors, and given those, `torch._foreach_*` launch a kernel for
every tensor. So there a batch is one vector per list, on which every operator is one launch, however many tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.math import lists
from gam_fused.backends.math.lists import Scalar, Tensors
from gam_fused.backends.tensor_lists import Layout, TensorList, is_dense
from gam_fused.backends.uploads import upload

BATCH = 1 << 18  # elements on the CPU
VECTORS = 1 << 24  # elements elsewhere: enough for launches not to count, few enough for temporaries to stay small


class Batch:
    """Tensors of one param group, or a stretch of one tensor.

    `batch[name]` is a list of the kernel at these rows: its tensors, `None` where one is missing; or, as vectors, a list of
    one, zero where tensors are missing. It has no entries where the kernel's list is not used.

    Attributes:
        rows: their positions in the layout.
        offset: where the stretch begins in its tensor; 0 where tensors are whole.
        tensors: the lists as they are, by name.
        vectors: whether lists are made vectors. A vector is a copy: `store` brings what changed back.
    """

    def __init__(self, layout: Layout, rows: list[int], offset: int, tensors: dict[str, list[Any]], *, vectors: bool):
        self.layout, self.rows, self.offset, self.tensors, self.vectors = layout, rows, offset, tensors, vectors
        self._made: dict[str, list[Tensor]] = {}
        self._like: list[Tensor] = []  # of each row, a tensor that is there; the first list's, if it is

    def __getitem__(self, name: str) -> list[Any]:
        tensors = self.tensors[name]
        if not self.vectors or not tensors:
            return tensors
        if name not in self._made:
            self._made[name] = [self._vector(tensors)]
        return self._made[name]

    def copy_of(self, name: str) -> list[Tensor]:
        """A list that may be kept while its tensors change."""
        return self[name] if self.vectors else [t.clone() for t in self[name]]

    def has(self, name: str) -> bool:
        """Whether a list is used here; of a param group, all tensors have optimizer state, or none."""
        return bool(self.tensors[name]) and self.tensors[name][0] is not None

    def where_there(self, name: str, other: str) -> tuple[list[Any], list[Any]]:
        """Two lists, at the rows where the first has a tensor; nothing where it has none at all."""
        pairs = [(a, b) for a, b in zip(self.tensors[name], self.tensors[other], strict=True) if a is not None]
        if not pairs:
            return [], []
        return (self[name], self[other]) if self.vectors else ([a for a, _ in pairs], [b for _, b in pairs])

    def copy_(self, to: str, source: str) -> None:
        """One list <- another, as it is."""
        torch._foreach_copy_(self.tensors[to], self.tensors[source])

    def store(self, name: str, values: Tensors) -> None:
        """The tensors of a list that are there <- values."""
        targets = self.tensors[name]
        if self.vectors:
            pieces = values[0].split(self._sizes())
            laid = [None if t is None else _in_order(t, like) for t, like in zip(targets, self._rows_like(), strict=True)]
            targets = [None if t is None else _as_vector(t) for t in laid]
            values = [v if t is None else v.view(t.shape) for t, v in zip(targets, pieces, strict=True)]
            values = [v for t, v in zip(targets, values, strict=True) if t is not None]
        there = [t for t in targets if t is not None]
        changed = [(t, v) for t, v in zip(there, values, strict=True) if t is not v]
        if changed:
            torch._foreach_copy_([t for t, _ in changed], [v for _, v in changed])

    def commit(self, name: str, values: Tensors, skip: Scalar) -> None:
        """A list <- values unless `skip`, which selects element by element where the host cannot read it."""
        if isinstance(skip, bool):
            if not skip:
                self.store(name, values)
            return
        self.store(name, [torch.where(skip, old, new.to(old.dtype)) for old, new in zip(self[name], values, strict=True)])

    def each(self, values: Tensor) -> list[Scalar]:
        """Numbers, one for each tensor, as they go with `batch[name]`: one for each of its entries, or of its elements."""
        if not self.vectors:
            return list(lists.scalars(values))
        if len(self.rows) == 1:
            return [values[0]]
        first, count, total = self.rows[0], len(self.rows), sum(self._sizes())
        if self._is_stretch():
            starts = self.layout.on(values.device)[first : first + count + 1]
            sizes = starts[1:] - starts[:-1]
        else:
            sizes = upload(torch.tensor(self._sizes(), dtype=torch.int64, device="cpu"), values.device)
        return [torch.repeat_interleave(values, sizes, output_size=total)]

    def positions(self, device: torch.device) -> Tensor:
        """int64: where each element of a vector stands in the flat vector of the layout."""
        starts = [self.layout.starts[i] + self.offset for i in self.rows]
        sizes = self._sizes()
        first, total = starts[0], sum(sizes)
        if self._is_stretch():
            return torch.arange(first, first + total, dtype=torch.int64, device=device)
        before = [0, *accumulate(sizes)]
        shifts = torch.tensor([a - b for a, b in zip(starts, before, strict=False)], dtype=torch.int64, device="cpu")
        positions: Tensor = torch.arange(total, dtype=torch.int64, device=device) + self.each(upload(shifts, device))[0]
        return positions

    def _is_stretch(self) -> bool:
        return self.rows[-1] - self.rows[0] + 1 == len(self.rows)

    def _rows_like(self) -> list[Tensor]:
        if not self._like:
            columns = zip(*(tensors for tensors in self.tensors.values() if tensors), strict=True)
            self._like = [next(t for t in column if t is not None) for column in columns]
        return self._like

    def _sizes(self) -> list[int]:
        return [t.numel() for t in self._rows_like()]

    def _vector(self, tensors: list[Any]) -> Tensor:
        there = next((t for t in tensors if t is not None), self._rows_like()[0])
        pairs = list(zip(tensors, self._rows_like(), strict=True))
        gaps = [like.numel() for t, like in pairs if t is None]
        zeros = there.new_zeros(max(gaps)) if gaps else there
        return torch.cat(
            [zeros[: like.numel()] if t is None else _in_order(t, like).reshape(-1) for t, like in pairs],
        )


def _in_order(t: Tensor, like: Tensor) -> Tensor:
    """`t` with its dimensions in the order in which the elements of `like` lie in memory."""
    if t.is_contiguous() and (t is like or like.is_contiguous()):
        return t
    return t.permute(sorted(range(like.dim()), key=like.stride().__getitem__, reverse=True))


def _as_vector(t: Tensor) -> Tensor:
    """`t` as a view of one dimension, where it has no gaps: copies between tensors of equal strides are one launch."""
    return t.view(-1) if t.is_contiguous() else t


def presence(*lists: TensorList) -> list[bool]:
    """For each row, whether any of the lists has a tensor there."""
    used = [lst.tensors for lst in lists if len(lst)]
    for tensors in used:
        if all(t is not None for t in tensors):
            return [True] * len(tensors)
    return [any(t is not None for t in column) for column in zip(*used, strict=True)]


def by_group(layout: Layout, rows: Sequence[int]) -> list[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for i in rows:
        groups.setdefault(layout.groups[i], []).append(i)
    return list(groups.items())


def batches(layout: Layout, rows: list[int], **given: TensorList) -> Iterator[Batch]:
    """`rows` of the given lists, in batches."""
    if not rows:
        return
    used = [lst.tensors for lst in given.values() if len(lst)]
    host = all(
        lists.on_host(t) for t in (next((t for t in tensors if t is not None), None) for tensors in used) if t is not None
    )
    limit = BATCH if host else VECTORS

    def whole(some: list[int]) -> Batch:
        return Batch(layout, some, 0, {name: raw(lst, some) for name, lst in given.items()}, vectors=not host)

    some: list[int] = []
    total = 0
    for i in rows:
        size = layout.sizes[i]
        if size > limit and (cut := _cut([lst.tensors[i] if len(lst) else None for lst in given.values()], size, limit)):
            for number, pieces in enumerate(cut):
                tensors = {name: [p] if len(lst) else [] for p, (name, lst) in zip(pieces, given.items(), strict=True)}
                yield Batch(layout, [i], number * limit, tensors, vectors=not host)
            continue
        if total + size > limit and some:
            yield whole(some)
            some, total = [], 0
        some.append(i)
        total += size
    if some:
        yield whole(some)


def _cut(tensors: list[Any], size: int, limit: int) -> list[tuple[Any, ...]]:
    """Stretches of tensors of `size` elements that lie in memory alike and without gaps; nothing where they do not."""
    there = [t for t in tensors if t is not None]
    if not is_dense(there[0]) or any(t.stride() != there[0].stride() for t in there):
        return []
    count = -(-size // limit)
    columns = [[None] * count if t is None else t.as_strided((size,), (1,)).split(limit) for t in tensors]
    return list(zip(*columns, strict=True))


def raw(lst: TensorList, rows: Sequence[int]) -> list[Any]:
    return [lst.tensors[i] for i in rows] if len(lst) else []
