"""Checks of values, and how errors name a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

Groups = Sequence[dict[str, Any]]
_CONSTANTS = {float, int, bool, str, type(None)}


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def number(name: str, value: Any, *, minimum: float | None = None, above: float | None = None) -> float:
    """`value` as a finite float within its bound. Raises TypeError or ValueError that names both."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, but is {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}={value!r} must be at least {minimum:g}")
    if above is not None and value <= above:
        raise ValueError(f"{name}={value!r} must be greater than {above:g}")
    return float(value)


def optional(name: str, value: Any, *, minimum: float | None = None, above: float | None = None) -> float | None:
    """None, or `number`."""
    return None if value is None else number(name, value, minimum=minimum, above=above)


def whole(name: str, value: Any, *, minimum: int) -> int:
    """`value` as an int of at least `minimum`. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, but is {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name}={value!r} must be at least {minimum}")
    return value


def are_constants(values: Iterable[Any]) -> bool:
    """Whether all are numbers, strings, None, or tuples of such: equal then means unchanged, and can be asked at once."""
    return all(type(v) in _CONSTANTS or (type(v) is tuple and are_constants(v)) for v in values)


def describe(p: Tensor, groups: Groups) -> str:
    """'parameter 3 of group 0 (conv.weight, shape (32, 1, 3, 3), torch.float32, cpu)'."""
    facts = f"{'no shape yet' if is_lazy(p) else f'shape {tuple(p.shape)}'}, {p.dtype}, {p.device}"
    for row, group in enumerate(groups):
        for i, q in enumerate(group["params"]):
            if q is p:
                name = f"{group['param_names'][i]}, " if "param_names" in group else ""
                return f"parameter {i} of group {row} ({name}{facts})"
    return f"a parameter ({facts})"
