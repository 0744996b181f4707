"""GAM's hyperparameters, each named here once: what a method takes, what the user gave, and the checks of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import inf
from typing import Any

from gam_fused.checks import are_constants, number, one_of, optional, whole

ORACLES = ("loss", "sam")
PERTURB_SYNC = ("global", "local")
# Those for which a method has its own default, or no use.
OF_METHODS = ("rho", "rho_prime", "alpha", "beta", "gamma")
# Those a schedule may change during training, so that checkpoints hold them (rho and lr are entries of param groups). The
# flatness term's bound and its part of the batch came later: older checkpoints do not have them.
SCHEDULED = ("rho_prime", "alpha", "beta", "gamma")
SCHEDULED_LATER = ("max_ratio", "flatness_fraction")

Weight = float | tuple[float, float]


@dataclass(frozen=True)
class Takes:
    """The hyperparameters that a method takes, with their defaults. None: the method does not use it.

    Attributes:
        pairs: whether `alpha` and `beta` are Algorithm 2's: convex weights, or pairs of weights.
        oracle: whether the direction has a term h_loss, which the SAM oracle can replace.
        bound: whether the direction is h_loss + alpha h_norm, whose second term can be bounded. max_ratio: the bound.
    """

    rho: float
    rho_prime: float | None = None
    alpha: Weight | None = None
    beta: Weight | None = None
    gamma: float | None = None
    pairs: bool = False
    oracle: bool = False
    bound: bool = False
    max_ratio: float | None = None

    @property
    def names(self) -> set[str]:
        """Of `OF_METHODS`, those it takes."""
        return {name for name in OF_METHODS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Settings:
    """All hyperparameters of one optimizer, except the base optimizer's.

    The docstring of `FusedGAM` explains them. They hold the values as the user gave them, to be shown and scheduled in that
    form; a step uses those that `checked` returns.

    Attributes:
        rho: of param groups that do not set their own.
    """

    method: str = "finite_difference"
    rho: Any = None
    rho_prime: Any = None
    alpha: Any = None
    beta: Any = None
    gamma: Any = None
    max_ratio: Any = "auto"
    flatness_fraction: Any = 1.0
    xi: Any = 1e-12
    adaptive: bool = False
    oracle: str = "loss"
    sam_rho: Any = None
    interval: int = 1
    preserve_rng_state: bool = True
    max_grad_norm: Any = None
    perturb_sync: str = "global"
    flatten: bool = False
    backend: str = "auto"

    def resolved(self, takes: Mapping[str, Takes]) -> Settings:
        """With the method's defaults for what was not given, all checked.

        Args:
            takes: what each method takes.

        Raises:
            ValueError: an unknown method, a value out of range, or one that the method does not use.
            TypeError: a value of the wrong type.
        """
        one_of("method", self.method, tuple(takes))
        mine = takes[self.method]
        for name in OF_METHODS:
            value = getattr(self, name)
            if value is not None and name not in mine.names:
                users = ", ".join(repr(method) for method in takes if name in takes[method].names)
                raise ValueError(
                    f"{name}={value!r} was given, but method={self.method!r} does not use {name}; it is for {users}"
                )
        if self.oracle == "sam" and not mine.oracle:
            users = ", ".join(repr(method) for method in takes if takes[method].oracle)
            raise ValueError(f"oracle='sam' is for methods with a term h_loss, {users}, not for method={self.method!r}")
        if self.max_ratio not in ("auto", None) and not mine.bound:
            users = ", ".join(repr(method) for method in takes if takes[method].bound)
            raise ValueError(
                f"max_ratio={self.max_ratio!r} bounds the flatness term h_norm, which method={self.method!r} does not have; "
                f"it is for {users}"
            )
        defaults = {name: getattr(mine, name) for name in mine.names if getattr(self, name) is None}
        if self.max_ratio == "auto":
            defaults["max_ratio"] = mine.max_ratio
        return replace(self, **defaults).checked(mine)

    def checked(self, takes: Takes) -> Settings:
        """In canonical form (floats, tuples of floats, bools). Raises as `resolved`."""
        if self.oracle == "sam" and not takes.oracle:
            raise ValueError(
                f"oracle='sam' replaces h_loss = grad L, which is not a term of the direction of method={self.method!r}"
            )
        if self.sam_rho is not None and self.oracle != "sam":
            raise ValueError(f"sam_rho={self.sam_rho!r} needs oracle='sam', but oracle={self.oracle!r}")
        for name in takes.names:
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None, but method={self.method!r} needs it: set it before the step")
        one_of("oracle", self.oracle, ORACLES)
        one_of("perturb_sync", self.perturb_sync, PERTURB_SYNC)
        max_ratio = optional("max_ratio", self.max_ratio, minimum=0.0) if takes.bound else None
        return replace(
            self,
            rho=number("rho", self.rho, minimum=0.0),
            rho_prime=optional("rho_prime", self.rho_prime, above=0.0),
            alpha=None if self.alpha is None else _weight("alpha", self.alpha, takes.pairs, bounded=max_ratio is not None),
            beta=None if self.beta is None else _weight("beta", self.beta, takes.pairs),
            gamma=optional("gamma", self.gamma, minimum=0.0),
            max_ratio=max_ratio,
            flatness_fraction=_fraction(self.flatness_fraction),
            xi=number("xi", self.xi, minimum=0.0),
            adaptive=bool(self.adaptive),
            sam_rho=optional("sam_rho", self.sam_rho, minimum=0.0),
            interval=whole("interval", self.interval, minimum=1),
            preserve_rng_state=bool(self.preserve_rng_state),
            max_grad_norm=optional("max_grad_norm", self.max_grad_norm, above=0.0),
            flatten=bool(self.flatten),
        )

    @property
    def oracle_radius(self) -> float | None:
        """Length of the SAM oracle's ascent, None without one."""
        if self.oracle != "sam":
            return None
        radius: float = self.rho_prime if self.sam_rho is None else self.sam_rho
        return radius

    @property
    def oracle_is_off_the_probe(self) -> bool:
        """Whether the SAM oracle's ascent is not the finite difference's own first one, so that it costs a pass."""
        return self.oracle_radius is not None and (self.oracle_radius != self.rho_prime or self.on_part)

    @property
    def on_part(self) -> bool:
        """Whether the flatness term is computed on a part of the mini-batch."""
        return bool(self.flatness_fraction < 1.0)

    @cached_property
    def _constants(self) -> list[Any] | None:
        """The values and their types, or None where one may change without a change of `Settings` (a tensor, a list)."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [*values, *map(type, values)] if are_constants(values) else None  # True == 1.0

    def same_as(self, other: Settings | None) -> bool:
        """Whether every value is certain to be that of `other`."""
        if other is None or self._constants is None:
            return False
        return self is other or self._constants == other._constants


def pair(weight: Weight) -> tuple[float, float]:
    """A weight of Algorithm 2 as (weight of the first gradient, of the second): a float w means (w, 1 - w)."""
    return weight if isinstance(weight, tuple) else (weight, 1.0 - weight)


def _fraction(value: Any) -> float:
    fraction = number("flatness_fraction", value, above=0.0)
    if fraction > 1.0:
        raise ValueError(f"flatness_fraction={value!r} is a fraction of the mini-batch and must be at most 1")
    return fraction


def _weight(name: str, value: Any, pairs: bool, *, bounded: bool = False) -> Weight:
    if isinstance(value, (tuple, list)):
        if not pairs:
            raise ValueError(f"{name}={value!r}: a pair is for method='accelerated' only; give one number")
        if len(value) != 2:
            raise ValueError(f"{name}={value!r} must be one number or a pair")
        return (number(f"{name}[0]", value[0]), number(f"{name}[1]", value[1]))
    if isinstance(value, float) and value == inf and bounded:
        return inf
    weight = number(name, value, minimum=0.0)
    if pairs and weight > 1.0:
        raise ValueError(f"{name}={value!r} is a convex weight and must be between 0 and 1; give a pair for other weights")
    return weight
