"""What a mini-batch holds: the same in every pass, although a closure may take things out of it or put others in."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gam_fused.backends.uploads import is_capturing
from gam_fused.parallel.dtensor import is_dtensor, local
from gam_fused.torch_private import as_they_are
from gam_fused.transaction.containers import PLAIN, Path, index, written
from gam_fused.transaction.module_tree import same_objects


class BatchContents:
    """A mini-batch during one step: its containers are put back for every pass, and its tensors must be the same in each.

    Args:
        restored: tensors that the step itself restores for every pass. They may be in the batch too, and be written to.
    """

    def __init__(self, batch: Any, restored: Callable[[], Iterable[Tensor]] = tuple):
        nodes, self._restored = list(_nodes(batch)), restored
        with as_they_are():
            tensors = [(t, path) for t, path, _ in nodes if isinstance(t, Tensor)]
            self._tensors = [(t, path) for t, path in tensors if not t.is_inference()]
            self._versions = [t._version for t, _ in self._tensors]
        self._copies: dict[int, Tensor] = {}  # of those that a pass has written to, as it left them; by their numbers
        self._before = Items((node, items) for node, _, items in nodes if items is not None)
        self._after: Items | None = None  # once further passes follow

    def pass_done(self) -> None:
        """After each pass. It may write to a tensor what the pass before has written, as a mask of labels.

        Raises:
            RuntimeError: it has written something else.
        """
        for i in self._written():
            t = self._tensors[i][0]
            if is_capturing(t.device):  # which cannot compare; the steps before it have been checked
                continue
            if i not in self._copies and type(t) is Tensor and t.layout is torch.strided and not t.is_nested:
                self._copies[i] = t.detach().clone()
            elif i not in self._copies or not torch.equal(t, self._copies[i]):
                raise self._error(i)
            self._versions[i] = t._version

    def check_unwritten(self) -> None:
        """Raises RuntimeError if a tensor has been written to."""
        for i in self._written():
            raise self._error(i)

    def replay(self) -> None:
        """Before each further pass."""
        self._after = self._after or self._before.now()
        self._before.put_back()

    def finish(self) -> None:
        """As the first pass left them."""
        if self._after:
            self._after.put_back()

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._before.put_back()

    def _written(self) -> list[int]:
        with as_they_are():
            found = [i for i, (t, _) in enumerate(self._tensors) if t._version != self._versions[i]]
            if not found:
                return []
            exempt = {*map(_memory, self._restored())} - {None}
            return [i for i in found if _memory(self._tensors[i][0]) not in exempt]

    def _error(self, i: int) -> RuntimeError:
        t, path = self._tensors[i]
        which = f"{written(path)} (shape {tuple(t.shape)}, {t.dtype})"
        return RuntimeError(
            f"{which} or a tensor whose memory it shares was written to in place, "
            "so that passes see different batches. Write to a copy instead: x = x.clone()"
        )


class Items:
    """Dicts, lists and dataclasses, each with what it holds."""

    def __init__(self, held: Iterable[tuple[Any, list[Any]]]):
        self._held = list(held)

    def now(self) -> Items:
        return Items((node, _read(node) or []) for node, _ in self._held)

    def put_back(self) -> None:
        for node, items in self._held:
            if not same_objects(_read(node) or [], items):
                _write(node, items)


def items_in(batch: Any) -> Items:
    """What the containers of a mini-batch hold."""
    return Items((node, items) for node, _, items in _nodes(batch) if items is not None)


def _nodes(batch: Any) -> Iterator[tuple[Any, Path, list[Any] | None]]:
    """Tensors and containers in `batch`, where they are, and what can be written back into them.

    What reads or makes its items only when it is asked for them is neither.
    """
    waiting: list[tuple[Any, Path]] = [(batch, ())]
    seen: set[int] = set()  # one that holds itself ends
    while waiting:
        node, path = waiting.pop()
        if isinstance(node, Tensor):
            yield node, path, None
            continue
        items = _read(node)
        if id(node) in seen or (items is None and not isinstance(node, tuple)):
            continue
        seen.add(id(node))
        yield node, path, items
        children, label = (node, index) if items is None else _children(node, items)
        waiting += [(c, (path, label, i)) for i, c in enumerate(children) if type(c) not in PLAIN][::-1]


def _children(node: Any, items: list[Any]) -> tuple[list[Any], Callable[[int], str]]:
    """What a container holds, and how the way to the i-th is written."""
    raw = _raw(node)
    if isinstance(raw, (list, deque)):
        return items, index
    names = items[::2]
    return items[1::2], (lambda i: f"[{names[i]!r}]") if isinstance(raw, dict) else (lambda i: f".{names[i]}")


def _raw(node: Any) -> Any:
    if isinstance(node, (dict, list, tuple)):  # nearly always; to ask for the others takes longer
        return node
    return node.data if isinstance(node, (UserDict, UserList)) else node


def _read(node: Any) -> list[Any] | None:
    """Keys and values, items, or names and values of attributes; None: nothing that can be written back."""
    raw = _raw(node)
    if isinstance(raw, dict):
        kind = OrderedDict if isinstance(raw, OrderedDict) else dict  # not its own, which may make them
        return list(chain.from_iterable(kind.items(raw)))
    if isinstance(raw, (list, deque)):
        return list(raw)
    if dataclasses.is_dataclass(node) and not isinstance(node, (type, nn.Module)):
        return [part for name in _attributes(node) for part in (name, getattr(node, name))]
    return None


def _attributes(node: Any) -> list[str]:
    """The fields of a dataclass that are set, and what else was set on it."""
    names = [f.name for f in dataclasses.fields(node) if not isinstance(getattr(type(node), f.name, None), property)]
    fields = [name for name in names if hasattr(node, name)]
    return list(dict.fromkeys([*fields, *getattr(node, "__dict__", ())]))


def _write(node: Any, items: list[Any]) -> None:
    raw, pairs = _raw(node), zip(items[::2], items[1::2], strict=True)
    if isinstance(raw, dict):
        raw.clear()
        for key, value in pairs:
            raw[key] = value
    elif isinstance(raw, (list, deque)):
        raw.clear()
        raw.extend(items)
    else:
        for name in set(_attributes(node)) - set(items[::2]):
            object.__delattr__(node, name)
        for name, value in pairs:
            object.__setattr__(node, name, value)


def _memory(t: Tensor) -> tuple[torch.device, int] | None:
    """Where the memory of `t` begins; None: it has none of its own, as sparse ones."""
    try:
        mine = local(t) if is_dtensor(t) else t
        return (t.device, address) if (address := mine.untyped_storage().data_ptr()) else None
    except (RuntimeError, NotImplementedError):
        return None
