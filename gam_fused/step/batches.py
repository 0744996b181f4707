"""The first samples of a mini-batch, for passes that need not see all of it."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gam_fused.transaction.containers import Path, index, opened, written


def part_of(batch: Any, fraction: float) -> Any:
    """The first `fraction` of a mini-batch: `ceil(length * fraction)` samples, at least two, as views.

    A batch is a tensor or a nest of tuples, dicts, lists, dataclasses, other mappings and nodes registered with torch's
    pytree; their types are kept. Its length is the number of rows (dim 0) that most of its tensors share. Those are cut.
    All else stays as it is: tensors of another length, 0-d tensors, numbers, strings and what is no container (an array of
    numpy, an object with tensors as attributes). A batch of one sample or none is given whole, and so is any at fraction 1.

    A list of containers with tensors in each is a list of micro-batches, each cut by its own length. A list of tensors, as
    torch's default collate makes, is one batch.

    Raises:
        ValueError: as many tensors have one length as have another.
        TypeError: no tensor of one dimension or more; a packed sequence, a nested or a sparse tensor; a mapping whose copy
            shares its items.
    """
    return batch if fraction >= 1 else _part(batch, fraction, ())


def _part(batch: Any, fraction: float, path: Path) -> Any:
    if isinstance(batch, list) and not any(isinstance(element, Tensor) for element in batch):
        paths = [(path, index, i) for i in range(len(batch))]
        if batch and all(any(_tensors(b, at)) for b, at in zip(batch, paths, strict=True)):
            return [_part(b, fraction, at) for b, at in zip(batch, paths, strict=True)]
    length = _length(batch, path)
    n = min(length, max(2, ceil(length * fraction - 1e-6)))  # 0.07 * 100 is more than 7
    return batch if n == length else _cut(batch, length, n)


def _length(batch: Any, path: Path) -> int:
    """How many rows most tensors of `batch` have."""
    counts: dict[int, int] = {}
    for t, _ in _tensors(batch, path):
        counts[t.size(0)] = counts.get(t.size(0), 0) + 1
    if not counts:
        raise TypeError(
            f"{written(path)} is a {type(batch).__name__} without a tensor that has a sample dimension, so that it "
            "cannot be sliced: pass tensors (in tuples, dicts, dataclasses), or register the type with "
            "torch.utils._pytree.register_pytree_node"
        )
    most = max(counts.values())
    length, *others = [length for length, count in counts.items() if count == most]
    if others:
        where = ", ".join(f"{written(at)} {tuple(t.shape)}" for t, at in _tensors(batch, path))
        tied = " or ".join(map(str, [length, *others]))
        raise ValueError(
            f"does the batch have {tied} samples? Its tensors differ in dim 0: {where}. Keep what is not per sample in the "
            "closure, and pass the batch alone"
        )
    return length


def _tensors(node: Any, path: Path) -> Iterator[tuple[Tensor, Path]]:
    """The tensors of one dimension or more in `node`, and where."""
    if isinstance(node, Tensor):
        if node.is_nested or node.layout is not torch.strided:
            kind, instead = ("nested", "padded") if node.is_nested else ("sparse", "dense")
            raise TypeError(
                f"{written(path)} is a {kind} tensor, which cannot be sliced: pass it {instead}, or keep it in the "
                "closure if it is not per sample"
            )
        if node.dim():
            yield node, path
    elif isinstance(node, PackedSequence):
        raise TypeError(
            f"{written(path)} is a PackedSequence, which cannot be sliced: pass padded sequences and their lengths, "
            "and pack them in the closure"
        )
    elif inside := opened(node):
        for i, child in enumerate(inside.children):
            yield from _tensors(child, (path, inside.label, i))


def _cut(node: Any, length: int, n: int) -> Any:
    if isinstance(node, Tensor):
        return node.narrow(0, 0, n) if node.dim() and node.size(0) == length else node
    inside = opened(node)
    if not inside:
        return node
    children = [_cut(child, length, n) for child in inside.children]
    return inside.rebuild(children) if any(a is not b for a, b in zip(children, inside.children, strict=True)) else node
