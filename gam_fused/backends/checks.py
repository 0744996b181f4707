"""What a kernel's lists must be, looked at before their addresses are followed.

A list that lasts is looked at once, however often it is launched. Lists that are new in every pass (gradients) take the host
longer than the launch itself (57 us for 161 tensors, beside 33), so they are looked at when a kernel is first launched with
such a set of lists on a layout, and every time where GAM_FUSED_CHECK=1 is set, as the tests do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gam_fused.backends.operands import Kernel, OfTensors
from gam_fused.backends.tensor_lists import Layout, TensorList, is_dense

_dtype_of, _is_cpu, _device_of = attrgetter("dtype"), attrgetter("is_cpu"), attrgetter("device")
_CPU = torch.device("cpu")
ALWAYS = os.environ.get("GAM_FUSED_CHECK") == "1"


class Facts(NamedTuple):
    """What is known of a list.

    Attributes:
        layout: the one it fits. counters: whether as step counts, else as vectors of the layout's sizes.
        dtype, device: of its tensors; None where all are missing.
        missing: the first position at which the layout has elements and the list has no tensor, or None.
        order: the strides of each tensor (dimensions of one element left out, () where it is contiguous); None where all
            are contiguous.
    """

    layout: Layout
    counters: bool
    dtype: torch.dtype | None
    device: torch.device | None
    missing: int | None
    order: list[tuple[int, ...]] | None


def check_lists(kernel: Kernel, layout: Layout, lists: Sequence[TensorList], storage: torch.dtype) -> None:
    """Whether the kernel can follow the lists' addresses: they fit the layout, the dtype of storage and each other.

    Raises:
        ValueError, TypeError: one that does not; names the operand, the tensor and what is wrong with it.
    """
    present, looked_at = 0, True
    for lst in lists:  # in one loop: this is done in every launch
        present += present
        if lst.tensors:
            present += 1
            if lst.lasting and (lst.facts is None or lst.facts[0] is not layout):
                looked_at = False
    key = (kernel.name, present)
    all_of_them = ALWAYS or key not in layout.checked
    if looked_at and not all_of_them:
        return
    device: torch.device | None = None
    ordered: list[tuple[str, TensorList]] = []
    all_contiguous = True
    for (name, kind), lst in zip(kernel.lists.items(), lists, strict=True):
        if not lst.tensors:
            if name in kernel.required and layout.sizes:
                raise ValueError(f"gam_fused: {name} must not be an empty list")
            continue
        facts, counters = lst.facts, kind.dtype == "counter"
        if facts is None or facts.layout is not layout or facts.counters is not counters:
            if not (lst.lasting or all_of_them):
                continue
            facts = lst.facts = _facts(name, layout, lst, counters)
        if kind.complete and facts.missing is not None:
            i = facts.missing
            raise ValueError(f"gam_fused: {name}[{i}] is missing, the layout gives it {layout.sizes[i]} elements")
        if facts.dtype is None:
            continue
        if facts.dtype is not (storage if kind.dtype == "storage" else _dtype(kind, storage)):
            raise TypeError(f"gam_fused: {name} has {facts.dtype}, expected {_dtype(kind, storage)}")
        if device is None:
            device = facts.device
        elif device != facts.device:
            raise ValueError(f"gam_fused: {name} is on {facts.device}, the lists before it on {device}; move it there")
        if not counters:
            ordered.append((name, lst))
            all_contiguous = all_contiguous and facts.order is None
    if not all_contiguous:
        _check_order(ordered)
    layout.checked.add(key)


def _dtype(kind: OfTensors, storage: torch.dtype) -> torch.dtype:
    if kind.dtype == "storage":
        return storage
    return torch.float64 if kind.dtype == "compute" and storage is torch.float64 else torch.float32


def _facts(name: str, layout: Layout, lst: TensorList, counters: bool) -> Facts:
    tensors: list[Any] = lst.tensors
    if len(tensors) != len(layout.sizes):
        raise ValueError(f"gam_fused: {name} has {len(tensors)} tensors, the layout {len(layout.sizes)}")
    sizes, missing = layout.sizes, None
    if counters:
        sizes = [1] * len(sizes)
    try:
        dtypes = set(map(_dtype_of, tensors))
    except AttributeError:  # None
        present = [i for i, t in enumerate(tensors) if t is not None]
        missing = next((i for i, t in enumerate(tensors) if t is None and layout.sizes[i]), None)
        if not present:
            return Facts(layout, counters, None, None, missing, None)
        tensors, sizes = [tensors[i] for i in present], [sizes[i] for i in present]
        dtypes = set(map(_dtype_of, tensors))
    device = _CPU if all(map(_is_cpu, tensors)) else tensors[0].device
    contiguous = all(map(Tensor.is_contiguous, tensors))
    same = len(dtypes) == 1 and (device is _CPU or len(set(map(_device_of, tensors))) == 1)
    if not same or list(map(Tensor.numel, tensors)) != sizes or not (contiguous or all(map(is_dense, tensors))):
        _tell(name, layout, lst, counters)
    order = None if contiguous else [() if t is None else _strides(t) for t in lst.tensors]
    return Facts(layout, counters, dtypes.pop(), device, missing, order)


def _strides(t: Tensor) -> tuple[int, ...]:
    """What tells the order of a dense tensor's elements in memory."""
    if t.is_contiguous():
        return ()
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1)


def _tell(name: str, layout: Layout, lst: TensorList, counters: bool) -> None:
    """Raise for the first tensor that does not fit the layout or the tensors before it."""
    like = next(t for t in lst.tensors if t is not None)
    for i, t in enumerate(lst.tensors):
        if t is None:
            continue
        what = f"gam_fused: {name}[{i}] has shape {tuple(t.shape)}, {t.dtype}, on {t.device}, strides {t.stride()}"
        expected = 1 if counters else layout.sizes[i]
        if t.numel() != expected:
            raise ValueError(f"{what}: {t.numel()} elements, the layout says {expected}")
        if t.dtype != like.dtype or t.device != like.device:
            raise TypeError(f"{what}; the first tensor of the list is {like.dtype} on {like.device}")
        if not is_dense(t):
            raise ValueError(f"{what}: it has gaps or overlaps in memory; use backend='torch'")


def _check_order(lists: list[tuple[str, TensorList]]) -> None:
    """Whether equal positions of the lists lie in memory in the same order of elements."""
    known: list[tuple[int, ...] | None] = [None] * len(lists[0][1])
    for name, lst in lists:
        for i, t in enumerate(lst.tensors):
            if t is None:
                continue
            mine = lst.facts.order[i] if lst.facts.order else ()
            if known[i] is None:
                known[i] = mine
            elif known[i] != mine:
                raise ValueError(
                    f"gam_fused: {name}[{i}] (shape {tuple(t.shape)}, strides {t.stride()}) is laid out in another order in "
                    "memory than the same tensor of the lists before it"
                )
