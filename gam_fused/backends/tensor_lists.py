"""Tensor lists: many tensors read as one flat vector of N elements, without copying them.

`TensorList` keeps the tensors alive and their addresses in one int64 row, so that compiled backends read pointers instead of
unpacking hundreds of Python objects per call. `Layout` says where each tensor begins in the flat vector, which param group
it belongs to and whether it counts in the norms; it is shared by every list of a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.uploads import is_capturing, upload

MIN_CHUNK = 1024  # elements; chunks are multiples of it
MANY_CHUNKS = 4096  # several waves of blocks on today's GPUs; vectors that would have more get larger chunks,
FULL_CHUNK = 8192  # but no larger than these,
MAX_CHUNKS = 16384  # unless there would be more than so many
GROUP = 64  # chunks whose sums are added up together
ALIGNMENT = 128  # bytes between the starts of tensors in a flat buffer


class TensorList:
    """T tensors of one device and dtype; `None` stands for a vector of zeros of the right size.

    Args:
        tensors: the tensors, in the order of the `Layout` they go with. Compiled backends read each one in storage order, so
            tensors of one layout must be dense and have equal strides at equal positions.
        lasting: whether the list stays from step to step (parameters, state, scratch). Then backends on a GPU keep its
            addresses there; those of other lists go along with every launch.
        empty: the address of tensors without elements. With 0 the kernels take them for missing; with 1 for present, so that
            their step counts advance: an empty shard is part of a parameter that is updated.
        complete: whether it is known that none is missing.
        views_of: what all are views of, where it is one tensor: they share its version counter.
    """

    __slots__ = ("_empty", "_tables", "_views_of", "addresses", "complete", "facts", "lasting", "tensors")

    addresses: Tensor  # int64 [T] on the CPU: the address of each tensor, 0 for `None`; made when first asked for

    def __init__(
        self,
        tensors: Iterable[Tensor | None],
        *,
        lasting: bool = False,
        empty: int = 0,
        complete: bool = False,
        views_of: Tensor | None = None,
    ):
        self.tensors: list[Any] = list(tensors)  # Tensor | None; backends know from the layout which may be None
        self.lasting, self.complete, self._empty, self._views_of = lasting, complete, empty, views_of
        self.facts: Any = None  # what `checks` has found out
        self._tables: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.tensors)

    def replace(self, i: int, tensor: Tensor) -> None:
        """Put `tensor` at position `i`."""
        self.tensors[i] = tensor
        self.facts, self._tables, self.addresses = None, {}, self._listed()

    def __getattr__(self, name: str) -> Any:
        """`addresses`, while the slot is empty: an attribute that is there is read faster than a property."""
        if name != "addresses":
            raise AttributeError(name)
        self.addresses = self._listed()
        return self.addresses

    def _listed(self) -> Tensor:
        row = array("q", self._pointers())
        return torch.frombuffer(row, dtype=torch.int64) if row else torch.empty(0, dtype=torch.int64, device="cpu")

    def _pointers(self) -> list[int]:
        if not self._empty:
            try:
                return list(map(Tensor.data_ptr, self.tensors))  # faster than one by one, and mostly none is missing
            except TypeError:
                pass
        return [0 if t is None else t.data_ptr() or self._empty for t in self.tensors]

    def on(self, device: torch.device, send: Callable[[Tensor, torch.device], Tensor] | None = None) -> Tensor:
        """`addresses` on `device`, sent there once, by `upload` or by `send`."""
        if device not in self._tables:
            return _keep(self._tables, device, (send or upload)(self.addresses, device))
        return self._tables[device]

    def written(self) -> None:
        """Tell autograd that a kernel wrote to the tensors: a graph that saved them must not be used any more."""
        written: Any = self._views_of
        if written is None:
            written = self.tensors if self.complete else [t for t in self.tensors if t is not None]
        torch.autograd.graph.increment_version(written)


EMPTY = TensorList(())


class Layout:
    """Where the tensors of a block lie in its flat vector.

    Args:
        sizes: number of elements of each of the T tensors.
        groups: the param group of each tensor, a row of the coefficient table.
        counted: whether each tensor is perturbed and counted in the norms.

    Attributes:
        starts: first element of each tensor, and N at the end.
        table: int64 tensor [3, T + 1] on the CPU: `starts`, param group, counted.
        chunk: elements per chunk. It follows from N alone, so sums are cut at the same elements on every machine.
        chunks: number of chunks, at least 1 and at most `MAX_CHUNKS`.
    """

    __slots__ = (
        "_tables", "_workspaces", "checked", "chunk", "chunks", "counted", "groups", "numel", "sizes", "starts", "table",
    )  # fmt: skip

    def __init__(self, sizes: Sequence[int], groups: Sequence[int], counted: Sequence[bool]):
        self.sizes, self.groups, self.counted = list(sizes), list(groups), [bool(c) for c in counted]
        self.starts = starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        self.numel = starts[-1]
        self.chunk = chunk_of(self.numel)
        self.chunks = max(1, -(-self.numel // self.chunk))
        self.table = torch.tensor([starts, [*self.groups, 0], [*map(int, self.counted), 0]], dtype=torch.int64, device="cpu")
        self._tables: dict[torch.device, Tensor] = {}
        self._workspaces: dict[torch.device, Tensor] = {}
        self.checked: set[tuple[Any, ...]] = set()  # which kernels have been launched with which lists (`checks`)

    def on(self, device: torch.device) -> Tensor:
        """What kernels on a GPU need to know, as one int64 vector on `device`, sent there once.

        The rows of `table`, then for each chunk the tensor that holds its first element: [3 * (T + 1) + chunks].
        """
        if device not in self._tables:
            firsts = torch.arange(0, self.chunks * self.chunk, self.chunk, device="cpu")
            tensors = torch.searchsorted(self.table[0].contiguous(), firsts, right=True) - 1
            return _keep(self._tables, device, upload(torch.cat([self.table.flatten(), tensors]), device))
        return self._tables[device]

    def workspace(self, device: torch.device) -> Tensor:
        """float64 memory in which kernels add up sums of chunks; see `csrc/operands.h`. Kernels leave its tickets at 0."""
        if device not in self._workspaces:
            groups = -(-self.chunks // GROUP)
            size = groups + 1 + 6 * (self.chunks + groups)
            return _keep(self._workspaces, device, torch.zeros(size, dtype=torch.float64, device=device))
        return self._workspaces[device]


def chunk_of(elements: int) -> int:
    """Elements per chunk of a vector: few for a small one, so that it too has work for a whole GPU."""
    chunk = -(-elements // (MANY_CHUNKS * MIN_CHUNK)) * MIN_CHUNK
    least = -(-elements // (MAX_CHUNKS * MIN_CHUNK)) * MIN_CHUNK
    return max(MIN_CHUNK, min(chunk, FULL_CHUNK), least)


def _keep(tables: dict[torch.device, Tensor], device: torch.device, sent: Tensor) -> Tensor:
    """`sent`, kept for the next time; but what is sent while a graph is captured is for the graph only."""
    if not is_capturing(device):
        tables[device] = sent
    return sent


def flat_views(like: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """One zeroed buffer, cut into views of the shapes and strides of `like` (row-major where a tensor is not dense).

    Args:
        like: tensors of one device and dtype.
        dtype: dtype of the buffer; that of `like` when not given.

    Returns:
        The 1-D buffer and its views, each starting at a multiple of 128 bytes.
    """
    dtype = dtype or like[0].dtype
    step = ALIGNMENT // dtype.itemsize
    starts = [0]
    for t in like:
        starts.append(starts[-1] + -(-t.numel() // step) * step)
    buffer = torch.zeros(starts[-1], dtype=dtype, device=like[0].device)
    return buffer, [_view(buffer, start, t) for start, t in zip(starts, like, strict=False)]


def _view(buffer: Tensor, start: int, t: Tensor) -> Tensor:
    flat = buffer[start : start + t.numel()]
    return flat.as_strided(t.shape, t.stride(), start) if is_dense(t) else flat.view(t.shape)


def is_dense(t: Tensor) -> bool:
    """Whether the elements of `t` fill one gapless stretch of memory, in whatever order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
