"""The modules below some roots: their buffers and parameters, and whether any were replaced."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gam_fused.torch_private import buffers_in, children_in, parameters_in

Owner = dict[str, Any]  # the `_buffers`, `_parameters` or `_modules` of a module


class ModuleTree:
    """All modules below some roots, each once.

    Attributes:
        modules: they themselves.
        owners: their `_buffers` and `_modules`, and those of their `_parameters` that hold frozen ones.
        frozen: their parameters that are not trained.
    """

    def __init__(self, roots: Sequence[nn.Module], trained: set[int]):
        modules: dict[int, nn.Module] = {}
        waiting: list[nn.Module | None] = list(roots)
        self._names_others = False  # whether a class overrides modules(): then changes cannot be detected
        while waiting:
            module = waiting.pop()
            if module is None or id(module) in modules:
                continue
            check_visible(module)
            if isinstance(module, torch.jit.ScriptModule):
                continue  # holds nothing
            modules[id(module)] = module
            waiting += children_in(module).values()
            kind: Any = type(module)
            if _names_others(kind):
                self._names_others = True
                waiting += module.modules()
        self.modules = list(modules.values())
        self._children = Contents([children_in(m) for m in self.modules])
        self._parameters = Contents([parameters_in(m) for m in self.modules])
        parameters = [p for p in self._parameters.values if p is not None]
        self._lazy = [p for p in parameters if is_lazy(p)]  # they stay the same objects when a forward makes them
        others = (p for p in parameters if id(p) not in trained and not is_lazy(p))
        self.frozen: list[Tensor] = list({id(p): p for p in others}.values())
        ids = set(map(id, self.frozen))
        of_frozen = [owner for owner in self._parameters.filled if not ids.isdisjoint(map(id, owner.values()))]
        self.owners: list[Owner] = [*map(buffers_in, self.modules), *of_frozen, *map(children_in, self.modules)]

    def is_current(self) -> bool:
        """Whether the same modules hold the same modules and parameters."""
        same = self._children.are_all() and self._parameters.are_all()
        return same and not self._names_others and all(map(is_lazy, self._lazy))


class Contents:
    """What some dicts of modules hold under which names, to be compared with what they hold later.

    Attributes:
        filled: those that held something; most do not. values: all that they held, in order.
    """

    def __init__(self, owners: Sequence[Owner]):
        self.filled, self._empty = [owner for owner in owners if owner], [owner for owner in owners if not owner]
        self.values: list[Any] = list(chain.from_iterable(map(dict.values, self.filled)))
        self._names = list(chain.from_iterable(self.filled))
        self._owners = [owner for owner in self.filled for _ in owner]  # one for each of the values

    def are_in_place(self) -> bool:
        """Whether the same objects stand under the same names, whatever else there is."""
        try:
            return all(map(is_, map(getitem, self._owners, self._names), self.values))
        except KeyError:
            return False

    def are_all(self) -> bool:
        """Whether the same objects stand under the same names, and nothing else does."""
        return not any(self._empty) and sum(map(len, self.filled)) == len(self.values) and self.are_in_place()

    def has(self, owner: Owner, name: str) -> bool:
        """Whether one of them held something under a name."""
        return any(known is owner and name == mine for known, mine in zip(self._owners, self._names, strict=True))

    def put_back(self) -> None:
        """The same objects under the same names; names added since stay."""
        for owner, name, value in zip(self._owners, self._names, self.values, strict=True):
            if owner.get(name, owner) is not value:
                owner[name] = value


def check_visible(module: nn.Module) -> None:
    """Raises TypeError for a module of TorchScript with parameters or buffers, which it keeps out of sight of Python."""
    if isinstance(module, torch.jit.ScriptModule) and any(True for _ in chain(module.parameters(), module.buffers())):
        raise TypeError(
            f"the model has a module of TorchScript ({getattr(module, 'original_name', type(module).__name__)}), whose "
            "parameters and buffers cannot be seen: use the module that it was made from, or torch.compile. Without "
            "buffers, pass its parameters alone, as FusedGAM(model.parameters(), ...) takes them"
        )


def _names_others(kind: Any) -> bool:
    """Whether modules of a class may list other modules than their own."""
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("modules", "named_modules"))


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))
