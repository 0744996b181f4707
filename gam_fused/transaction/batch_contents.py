"""What a mini-batch holds: the same in every pass, although a closure may take things out of it or put others in."""

from __future__ import annotations

import dataclasses
from collections import UserDict, UserList, deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gam_fused.transaction.containers import PLAIN, Path, opened, written
from gam_fused.transaction.module_tree import same_objects


class BatchContents:
    """A mini-batch during one step: its containers are put back for every pass, and its tensors must not change."""

    def __init__(self, batch: Any):
        nodes = list(_nodes(batch, (), set()))
        self._tensors = [(t, t._version, path) for t, path in nodes if isinstance(t, Tensor) and not t.is_inference()]
        self._before = Items(node for node, _ in nodes)
        self._after: Items | None = None  # once further passes follow

    def replay(self) -> None:
        """Before each further pass.

        Raises:
            RuntimeError: a pass has written to a tensor of the batch.
        """
        for t, version, path in self._tensors:
            if t._version != version:
                raise RuntimeError(
                    f"computing the loss wrote to {written(path)} (shape {tuple(t.shape)}, {t.dtype}) in place, so the next "
                    "pass would see another batch. Write to a copy instead: x = x.clone()"
                )
        self._after = self._after or self._before.now()
        self._before.put_back()

    def finish(self) -> None:
        """As the first pass left them."""
        if self._after:
            self._after.put_back()

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._before.put_back()


class Items:
    """What the dicts, lists and dataclasses among `nodes` hold."""

    def __init__(self, nodes: Iterator[Any]):
        self._held = [(node, items) for node in nodes if (items := _read(node)) is not None]

    def now(self) -> Items:
        return Items(node for node, _ in self._held)

    def put_back(self) -> None:
        for node, items in self._held:
            if not same_objects(_read(node) or [], items):
                _write(node, items)


def items_in(batch: Any) -> Items:
    """What the containers of a mini-batch hold."""
    return Items(node for node, _ in _nodes(batch, (), set()))


def _nodes(node: Any, path: Path, seen: set[int]) -> Iterator[tuple[Any, Path]]:
    """Tensors and containers in `node`, and where."""
    if isinstance(node, Tensor):
        yield node, path
    elif id(node) not in seen and (inside := opened(node)):
        seen.add(id(node))  # one that holds itself ends
        yield node, path
        for i, child in enumerate(inside.children):
            if type(child) not in PLAIN:
                yield from _nodes(child, (path, inside.label, i), seen)


def _read(node: Any) -> list[Any] | None:
    """Keys and values, items, or names and values of attributes; None: nothing that can be written back."""
    if isinstance(node, (dict, UserDict)):
        return [part for item in node.items() for part in item]
    if isinstance(node, (list, UserList, deque)):
        return list(node)
    if dataclasses.is_dataclass(node):
        return [part for name in _attributes(node) for part in (name, getattr(node, name))]
    return None


def _attributes(node: Any) -> list[str]:
    """The fields of a dataclass that are set, and what else was set on it."""
    fields = [f.name for f in dataclasses.fields(node) if hasattr(node, f.name)]
    return list(dict.fromkeys([*fields, *getattr(node, "__dict__", ())]))


def _write(node: Any, items: list[Any]) -> None:
    pairs = zip(items[::2], items[1::2], strict=True)
    if isinstance(node, (dict, UserDict)):
        node.clear()
        for key, value in pairs:
            node[key] = value
    elif isinstance(node, (list, UserList, deque)):
        node.clear()
        node.extend(items)
    else:
        for name in set(_attributes(node)) - set(items[::2]):
            object.__delattr__(node, name)
        for name, value in pairs:
            object.__setattr__(node, name, value)
