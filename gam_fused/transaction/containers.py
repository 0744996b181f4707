"""What a mini-batch is made of: nests of tuples, dicts, lists, dataclasses, other mappings and nodes of torch's pytree."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import UserList
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from gam_fused.torch_private import tree_flatten, tree_is_leaf, tree_unflatten

PLAIN = {str, int, float, bool, type(None)}
Path = tuple[Any, ...]  # () or (path of the parent, how it writes the way to a child, number of the child)


def written(path: Path) -> str:
    parts = []
    while path:
        path, label, i = path
        parts.append(label(i))
    return "batch" + "".join(reversed(parts))


class Opened(NamedTuple):
    """What a container holds, how the way to its i-th child is written, and how one like it is made."""

    children: Sequence[Any]
    label: Callable[[int], str]
    rebuild: Callable[[list[Any]], Any]


def index(i: int) -> str:
    return f"[{i}]"


def opened(node: Any) -> Opened | None:
    """None: no container."""
    kind = type(node)
    if kind is tuple or kind is list:
        return Opened(node, index, kind)
    if kind in PLAIN:
        return None
    if isinstance(node, Mapping):
        keys = list(node)
        inside = Opened([node[key] for key in keys], lambda i: f"[{keys[i]!r}]", lambda new: _with_items(node, keys, new))
        if kind is dict or tree_is_leaf(node):
            return inside
    if not tree_is_leaf(node):
        children, spec = tree_flatten(node, is_leaf=lambda child: child is not node)
        return Opened(children, index, lambda new: tree_unflatten(new, spec))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [f.name for f in dataclasses.fields(node) if hasattr(node, f.name)]
        values = [getattr(node, name) for name in names]
        return Opened(values, lambda i: f".{names[i]}", lambda new: _with_fields(node, names, new))
    if isinstance(node, (list, UserList)):
        return Opened(list(node), index, lambda new: _with_items(node, range(len(new)), new))
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
