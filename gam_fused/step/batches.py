"""The first samples of a mini-batch, for passes that need not see all of it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import UserList
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gam_fused.torch_private import tree_flatten, tree_is_leaf, tree_unflatten

_PLAIN = {str, int, float, bool, type(None)}
_Path = tuple[Any, ...]  # () or (path of the parent, how it writes the way to a child, number of the child)


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


def _part(batch: Any, fraction: float, path: _Path) -> Any:
    if isinstance(batch, list) and not any(isinstance(element, Tensor) for element in batch):
        paths = [(path, _index, i) for i in range(len(batch))]
        if batch and all(any(_tensors(b, at)) for b, at in zip(batch, paths, strict=True)):
            return [_part(b, fraction, at) for b, at in zip(batch, paths, strict=True)]
    length = _length(batch, path)
    n = min(length, max(2, ceil(length * fraction - 1e-6)))  # 0.07 * 100 is more than 7
    return batch if n == length else _cut(batch, length, n)


def _length(batch: Any, path: _Path) -> int:
    """How many rows most tensors of `batch` have."""
    counts: dict[int, int] = {}
    for t, _ in _tensors(batch, path):
        counts[t.size(0)] = counts.get(t.size(0), 0) + 1
    if not counts:
        raise TypeError(
            f"{_written(path)} is a {type(batch).__name__} without a tensor that has a sample dimension, so that it "
            "cannot be sliced: pass tensors (in tuples, dicts, dataclasses), or register the type with "
            "torch.utils._pytree.register_pytree_node"
        )
    most = max(counts.values())
    length, *others = [length for length, count in counts.items() if count == most]
    if others:
        where = ", ".join(f"{_written(at)} {tuple(t.shape)}" for t, at in _tensors(batch, path))
        tied = " or ".join(map(str, [length, *others]))
        raise ValueError(
            f"does the batch have {tied} samples? Its tensors differ in dim 0: {where}. Keep what is not per sample in the "
            "closure, and pass the batch alone"
        )
    return length


def _tensors(node: Any, path: _Path) -> Iterator[tuple[Tensor, _Path]]:
    """The tensors of one dimension or more in `node`, and where."""
    if isinstance(node, Tensor):
        if node.is_nested or node.layout is not torch.strided:
            kind, instead = ("nested", "padded") if node.is_nested else ("sparse", "dense")
            raise TypeError(
                f"{_written(path)} is a {kind} tensor, which cannot be sliced: pass it {instead}, or keep it in the "
                "closure if it is not per sample"
            )
        if node.dim():
            yield node, path
    elif isinstance(node, PackedSequence):
        raise TypeError(
            f"{_written(path)} is a PackedSequence, which cannot be sliced: pass padded sequences and their lengths, "
            "and pack them in the closure"
        )
    elif opened := _opened(node):
        for i, child in enumerate(opened.children):
            yield from _tensors(child, (path, opened.label, i))


def _cut(node: Any, length: int, n: int) -> Any:
    if isinstance(node, Tensor):
        return node.narrow(0, 0, n) if node.dim() and node.size(0) == length else node
    opened = _opened(node)
    if not opened:
        return node
    children = [_cut(child, length, n) for child in opened.children]
    return opened.rebuild(children) if any(a is not b for a, b in zip(children, opened.children, strict=True)) else node


def _written(path: _Path) -> str:
    return f"{_written(path[0])}{path[1](path[2])}" if path else "batch"


class _Opened(NamedTuple):
    """What a container holds, how the way to its i-th child is written, and how one like it is made."""

    children: Sequence[Any]
    label: Callable[[int], str]
    rebuild: Callable[[list[Any]], Any]


def _index(i: int) -> str:
    return f"[{i}]"


def _opened(node: Any) -> _Opened | None:
    """None: no container."""
    kind = type(node)
    if kind is tuple or kind is list:
        return _Opened(node, _index, kind)
    if kind in _PLAIN:
        return None
    if isinstance(node, Mapping):
        keys = list(node)
        opened = _Opened([node[key] for key in keys], lambda i: f"[{keys[i]!r}]", lambda new: _with_items(node, keys, new))
        if kind is dict or tree_is_leaf(node):
            return opened
    if not tree_is_leaf(node):
        children, spec = tree_flatten(node, is_leaf=lambda child: child is not node)
        return _Opened(children, _index, lambda new: tree_unflatten(new, spec))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [f.name for f in dataclasses.fields(node) if hasattr(node, f.name)]
        values = [getattr(node, name) for name in names]
        return _Opened(values, lambda i: f".{names[i]}", lambda new: _with_fields(node, names, new))
    if isinstance(node, (list, UserList)):
        return _Opened(list(node), _index, lambda new: _with_items(node, range(len(new)), new))
    return None


def _with_items(node: Any, keys: Sequence[Any], values: list[Any]) -> Any:
    """A copy of a mapping or sequence with other items."""
    if isinstance(node, Mapping) and not isinstance(node, MutableMapping):
        kind: Any = type(node)
        return kind(dict(zip(keys, values, strict=True)))
    new, old = copy.copy(node), [node[key] for key in keys]
    for key, value in zip(keys, values, strict=True):
        new[key] = value
    if any(node[key] is not item for key, item in zip(keys, old, strict=True)):
        for key, item in zip(keys, old, strict=True):
            node[key] = item
        raise TypeError(f"a copy of a {type(node).__name__} shares its items: give it a __copy__ method, or pass a dict")
    return new


def _with_fields(node: Any, names: list[str], values: list[Any]) -> Any:
    """A copy of a dataclass with other values: made by its `__init__`, where that takes its fields and no more."""
    new = dict(zip(names, values, strict=True))
    kind: Any = type(node)
    if _parameters(kind) == set(names):
        return dataclasses.replace(node, **new)
    result = copy.copy(node)
    for name, value in new.items():
        object.__setattr__(result, name, value)
    return result


@lru_cache(maxsize=64)
def _parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind).parameters)
