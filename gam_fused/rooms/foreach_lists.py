"""Pieces of the torch room: lists of tensors in compute precision (float32 for storage up to 32 bits, else float64)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.tensor_lists import Layout, TensorList

Tensors = Any  # a list or tuple of tensors: torch._foreach_* take either and return one or the other


def present(i: int, *lists: TensorList) -> bool:
    return any(len(lst) and lst.tensors[i] is not None for lst in lists)


def by_group(layout: Layout, rows: Sequence[int]) -> list[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for i in rows:
        groups.setdefault(layout.groups[i], []).append(i)
    return list(groups.items())


def raw(lst: TensorList, rows: Sequence[int]) -> Tensors:
    return [lst.tensors[i] for i in rows]


def up(tensors: Tensors) -> Tensors:
    return [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]


def operand(lst: TensorList, rows: Sequence[int], like: TensorList | None = None) -> Tensors:
    """The list in compute precision, zeros where a tensor is missing (their shapes from `like`)."""
    zeros = like or lst
    return up([torch.zeros_like(zeros.tensors[i]) if lst.tensors[i] is None else lst.tensors[i] for i in rows])


def difference(x: TensorList, y: TensorList, rows: Sequence[int]) -> Tensors:
    if not len(y):
        return operand(x, rows)
    shapes = TensorList(a if a is not None else b for a, b in zip(x.tensors, y.tensors, strict=True))
    return torch._foreach_sub(operand(x, rows, shapes), operand(y, rows, shapes))


def sum_of_squares(values: Tensors) -> Tensor:
    return (
        torch.stack(torch._foreach_norm([v for v in values if v.numel()] or [values[0].new_zeros(1)], dtype=torch.float64))
        .double()
        .square()
        .sum()
    )


def dot(left: Tensors, right: Tensors) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]).sum()


def shapes_of(x1: TensorList, x3: TensorList, acc: TensorList, like: TensorList | None) -> TensorList:
    lists = [lst for lst in (like, x3, x1, acc) if lst is not None and len(lst)]
    return TensorList(
        next((t for t in column if t is not None), None) for column in zip(*(lst.tensors for lst in lists), strict=True)
    )


def commit_(targets: Tensors, values: Tensors, skip: Tensor) -> None:
    """targets <- values unless `skip`; on the CPU the flag can be read, elsewhere it selects element by element."""
    if skip.device.type != "cpu":
        values = [torch.where(skip, old, new.to(old.dtype)) for old, new in zip(targets, values, strict=True)]
    elif skip:
        return
    torch._foreach_copy_(targets, values)
