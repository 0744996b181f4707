"""The modules below some roots: their buffers and parameters, and whether any were replaced."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gam_fused.torch_private import buffers_in, children_in, parameters_in

Owner = dict[str, Any]  # the `_buffers`, `_parameters` or `_modules` of a module


class ModuleTree:
    """All modules below some roots, each once.

    Attributes:
        owners: their `_buffers`, and those of their `_parameters` that hold frozen ones.
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
            modules[id(module)] = module
            waiting += children_in(module).values()
            kind: Any = type(module)
            if _names_others(kind):
                self._names_others = True
                waiting += module.modules()
        self._children = [children_in(m) for m in modules.values()]
        self._parameters = [parameters_in(m) for m in modules.values()]
        self._known_children, self._known_parameters = values_of(self._children), values_of(self._parameters)
        others = (p for p in self._known_parameters if p is not None and id(p) not in trained and not is_lazy(p))
        self.frozen: list[Tensor] = list({id(p): p for p in others}.values())
        ids = set(map(id, self.frozen))
        of_frozen = [owner for owner in self._parameters if not ids.isdisjoint(map(id, owner.values()))]
        self.owners: list[Owner] = [*(buffers_in(m) for m in modules.values()), *of_frozen]

    def is_current(self) -> bool:
        """Whether the same modules hold the same modules and parameters."""
        return (
            not self._names_others
            and same_objects(values_of(self._children), self._known_children)
            and same_objects(values_of(self._parameters), self._known_parameters)
        )


def _names_others(kind: Any) -> bool:
    """Whether modules of a class may list other modules than their own."""
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("modules", "named_modules"))


def values_of(owners: list[Owner]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, owners)))


def names_of(owners: list[Owner]) -> list[str]:
    return list(chain.from_iterable(owners))


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))
