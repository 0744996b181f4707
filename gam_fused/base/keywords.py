"""Which keywords belong to FusedGAM, and which to the base optimizer that it builds."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer


@dataclass(frozen=True)
class Keywords:
    """What the base optimizer is built with, and which of FusedGAM's own names went there."""

    of_base: dict[str, Any]
    taken: frozenset[str]


def split(
    base_optimizer: Any,
    given: dict[str, Any],
    unused: set[str],
    more: dict[str, Any],
    base_kwargs: dict[str, Any] | None,
) -> Keywords:
    """Assigns each keyword to FusedGAM or the base optimizer.

    Args:
        given: those that FusedGAM has. unused: names of those that its method has no use for.
        more: those that FusedGAM does not know. base_kwargs: those that the user gave for the base optimizer.

    Raises:
        TypeError: one that both have a use for, or that is given twice.
    """
    of_base = dict(base_kwargs or {})
    twice = sorted(of_base.keys() & more.keys())
    if twice:
        raise TypeError(f"{', '.join(twice)}: given twice, as a keyword and in base_kwargs")
    of_base |= more
    if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
        return Keywords(of_base, frozenset())
    bound = base_optimizer.keywords if isinstance(base_optimizer, functools.partial) else {}
    both = {k: v for k, v in given.items() if k in _known(base_optimizer) and k not in of_base and k not in bound}
    for name in sorted(both.keys() - unused):
        raise TypeError(
            f"{name}={both[name]!r}: FusedGAM and its base optimizer {name_of(base_optimizer)} both have a keyword {name}. "
            f"Give the base optimizer's as base_kwargs={{{name!r}: ...}}; then {name}= is FusedGAM's"
        )
    return Keywords(of_base | both, frozenset(both))


def takes(base_optimizer: Any, name: str) -> bool:
    """Whether a class or factory may take a keyword by that name, as far as its signature tells. An instance takes none."""
    if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
        return False
    return name in _known(base_optimizer) or _takes_any(base_optimizer)


def _takes_any(factory: Any) -> bool:
    """Whether it takes keywords of all names, and hands them on to what cannot be seen."""
    if isinstance(factory, functools.partial):
        return _takes_any(factory.func)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # no signature to be had
        return True
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _known(factory: Any) -> set[str]:
    """Names of the keywords that a class or factory takes; through **kwargs, also those of the classes above it."""
    if isinstance(factory, functools.partial):
        return _known(factory.func)
    names: set[str] = set()
    classes = inspect.getmro(factory) if inspect.isclass(factory) else [factory]
    for callee in [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] if inspect.isclass(factory) else classes:
        try:
            parameters = list(inspect.signature(callee).parameters.values())
        except (TypeError, ValueError):  # no signature to be had
            break
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names |= {p.name for p in parameters if p.kind in named}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return names - {"self", "params"}


def name_of(factory: Any) -> str:
    """What a class or factory is called in errors."""
    return str(getattr(factory, "__name__", type(factory).__name__))
