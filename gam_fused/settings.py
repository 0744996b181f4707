"""Hyperparameters of GAM: defaults per method, and the checks that run before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gam_fused.checks import number, one_of

METHODS = ("finite_difference", "accelerated", "exact", "sam")
ORACLES = ("loss", "sam")
PERTURB_SYNC = ("auto", "global", "local")

Weight = float | tuple[float, float]


@dataclass(frozen=True)
class Hyperparameters:
    """What one optimizer holds once (rho and perturb are entries of the param groups). `None`: not used by the method."""

    rho: float
    rho_prime: Any = None  # float, where used
    alpha: Any = None  # Weight, where used
    beta: Any = None  # Weight, where used
    gamma: Any = None  # float, where used


# Chosen by benchmarks/sweep_digits.py on a validation split; see benchmarks/results/.
DEFAULTS = {
    "finite_difference": Hyperparameters(rho=0.05, rho_prime=0.05, alpha=1.0),
    "accelerated": Hyperparameters(rho=0.05, rho_prime=0.1, alpha=0.3, beta=0.5, gamma=0.03),
    "exact": Hyperparameters(rho=0.05, rho_prime=0.05, alpha=1.0),
    "sam": Hyperparameters(rho=0.05),
}


NAMES = set(vars(DEFAULTS["sam"]))


def used_by(method: str) -> set[str]:
    """Names of the hyperparameters that a method has."""
    return {name for name, value in vars(DEFAULTS[method]).items() if value is not None}


def resolve(method: str, **given: Any) -> Hyperparameters:
    """The method's defaults with what the user gave in their place.

    Raises:
        ValueError: an unknown method, a value out of range, or one that the method does not use.
        TypeError: a value of the wrong type.
    """
    one_of("method", method, METHODS)
    defaults = DEFAULTS[method]
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if getattr(defaults, name) is None:
            users = ", ".join(repr(m) for m in METHODS if getattr(DEFAULTS[m], name) is not None)
            raise ValueError(f"{name}={value!r} was given, but method={method!r} does not use {name}; it belongs to {users}")
    return check(method, replace(defaults, **given))


def check(method: str, values: Hyperparameters) -> Hyperparameters:
    """`values` in canonical form (floats, tuples of floats). Raises as `resolve`."""
    pairs = method == "accelerated"
    return Hyperparameters(
        rho=number("rho", values.rho, minimum=0.0),
        rho_prime=None if values.rho_prime is None else number("rho_prime", values.rho_prime, above=0.0),
        alpha=None if values.alpha is None else _weight("alpha", values.alpha, pairs),
        beta=None if values.beta is None else _weight("beta", values.beta, pairs),
        gamma=None if values.gamma is None else number("gamma", values.gamma, minimum=0.0),
    )


def pair(weight: Weight) -> tuple[float, float]:
    """A weight of Algorithm 2 as (weight of the first gradient, of the second): a float w means (w, 1 - w)."""
    return weight if isinstance(weight, tuple) else (weight, 1.0 - weight)


def _weight(name: str, value: Any, pairs: bool) -> Weight:
    if isinstance(value, (tuple, list)):
        if not pairs:
            raise ValueError(f"{name}={value!r}: a pair is for method='accelerated' only; give one number")
        if len(value) != 2:
            raise ValueError(f"{name}={value!r} must be one number or a pair")
        return (number(f"{name}[0]", value[0]), number(f"{name}[1]", value[1]))
    weight = number(name, value, minimum=0.0)
    if pairs and weight > 1.0:
        raise ValueError(f"{name}={value!r} is a convex weight and must be between 0 and 1; give a pair for other weights")
    return weight


def check_oracle(method: str, oracle: str, sam_rho: float | None) -> None:
    """Raises ValueError for an oracle that is unknown or that the method has no h_loss for."""
    one_of("oracle", oracle, ORACLES)
    if oracle == "sam" and method in ("sam", "accelerated"):
        raise ValueError(
            f"oracle='sam' is for methods 'finite_difference' and 'exact'; {method!r} contains the SAM gradient"
        )
    if sam_rho is not None:
        if oracle != "sam":
            raise ValueError(f"sam_rho={sam_rho!r} goes with oracle='sam', but oracle={oracle!r}")
        number("sam_rho", sam_rho, minimum=0.0)


def check_perturb_sync(perturb_sync: str) -> None:
    """Raises ValueError for an unknown value. What "local" needs is checked by `distributed.replicas`."""
    one_of("perturb_sync", perturb_sync, PERTURB_SYNC)
