"""The grids: what is tried on validation data. A network has a full grid, a medium, a light or a small one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from studies.defaults.contender import DEFAULTS, GIVEN, Contender
from studies.defaults.networks import Network

INF = "inf"
Setting = tuple[float, Any, float | None]  # rho, alpha, max_ratio


def fixed() -> list[Contender]:
    """What is reported without a choice: the base as it is given, and the package's defaults."""
    return [Contender(GIVEN), *(Contender(kind, {"method": method}) for kind, method in DEFAULTS.items())]


def grid(network: Network) -> list[Contender]:
    """What the best of each kind is chosen from."""
    size = network.grid
    contenders = base(network) + sam(size)
    if network.base.__name__ == "SGD":
        contenders += small_batches(network)
    contenders += gam(size) + gam_part(size) + gam_interval(size)
    return contenders + others(size, small_nets_only=size != "small" and network.base.__name__ == "SGD")


def base(network: Network) -> list[Contender]:
    """The base optimizer at other learning rates and weight decays, and for twice as long."""
    factors = list(product((0.5, 1, 2), (1, 10))) if network.grid != "small" else [(0.5, 1), (1, 1), (2, 1), (1, 10)]
    long = [(1, 1)] if network.grid in ("small", "light") else [(1, 1), (0.5, 1), (1, 10)]

    def options(*pair: float) -> dict[str, float]:
        names = ("lr", "weight_decay")
        return {name: by * network.base_options[name] for name, by in zip(names, pair, strict=True) if by != 1}

    tried = [Contender("base", base_options=options(*pair)) for pair in factors]
    return tried + [Contender("base_long", base_options=options(*pair), length=2.0) for pair in long]


def sam(size: str) -> list[Contender]:
    """SAM on whole batches in all steps, in some, and on a part of the batch."""
    rhos = {"small": (0.02, 0.05, 0.1, 0.2), "light": (0.05, 0.1, 0.2, 0.5)}.get(size, (0.02, 0.05, 0.1, 0.2, 0.5))
    sparse = [(4, 0.5), (2, 0.2)] if size == "small" else [(4, 1.0), (2, 0.5)]
    parts = [(4, 0.5), (1, 0.1)] if size == "small" else [(4, 1.0), (10, 2.0), (1, 0.2)]
    tried = [Contender("sam", {"method": "sam", "rho": rho}) for rho in rhos]
    tried += [Contender("sam_interval", {"method": "sam", "rho": rho, "interval": k}) for k, rho in sparse]
    part = {"method": "sam", "flatness_fraction": 0.25}
    return tried + [Contender("sam_part", {**part, "rho": rho, **({"interval": k} if k > 1 else {})}) for k, rho in parts]


def small_batches(network: Network) -> list[Contender]:
    """Batches of 16 at a quarter of the learning rate, alone and with SAM; and m-SAM, which ascends in parts of a batch."""
    slow = {"lr": network.base_options["lr"] / 4}
    tried = [Contender("base", base_options=slow, batch_size=16)]
    tried += [Contender("sam_small_batch", {"method": "sam", "rho": rho}, slow, batch_size=16) for rho in (0.1, 0.2)]
    rhos = (0.05, 0.1, 0.2) if network.grid == "full" else (0.1, 0.2)
    return tried + [Contender("m_sam", group=m, group_rho=rho) for m, rho in product((16, 8), rhos)]


def gam(size: str) -> list[Contender]:
    """Whole batches, with and without a bound."""
    settings: dict[str, Iterable[Setting]] = {
        "full": [*product((0.05, 0.1, 0.2), (1.0, 2.0), (None, 0.5, 0.9)), *product((0.05, 0.2), (INF,), (0.1, 0.2))],
        "medium": [
            *product((0.05, 0.1, 0.2), (1.0, 2.0), (None, 0.9)),
            *product((0.05, 0.1), (2.0,), (0.5,)),
            (0.05, INF, 0.1),
        ],
        "light": [*product((0.05, 0.1, 0.2), (1.0,), (None, 0.9)), (0.05, 2.0, 0.5), (0.1, 2.0, 0.5)],
        "small": [
            *product((0.05, 0.1), (1.0,), (None, 0.9)),
            *product((0.05, 0.1), (2.0,), (0.5,)),
            (0.02, 1.0, 0.9),
            (0.05, INF, 0.1),
        ],
    }
    return _gam("gam", settings[size])


def gam_part(size: str) -> list[Contender]:
    """The flatness term of a half, a quarter or an eighth of the batch, bounded."""
    quarter: dict[str, Iterable[Setting]] = {
        "full": [*product((0.05, 0.1, 0.2, 0.5), (1.0, INF), (0.5, 0.9)), (0.1, 2.0, 0.9), (0.2, 2.0, 0.9)],
        "medium": product((0.05, 0.1, 0.2, 0.5), (1.0, INF), (0.5, 0.9)),
        "light": product((0.1, 0.2), (1.0, INF), (0.5, 0.9)),
        "small": [*product((0.05, 0.1), (1.0, INF), (0.9,)), *product((0.05, 0.1), (2.0,), (0.5,))],
    }
    eighth: dict[str, Iterable[Setting]] = {
        "full": [*product((0.1, 0.2), (1.0, 4.0, INF), (0.9,)), (0.1, INF, 0.5), (0.2, INF, 0.5)],
        "medium": product((0.1, 0.2), (INF,), (0.5, 0.9)),
        "light": product((0.1,), (INF,), (0.5, 0.9)),
        "small": [(0.1, INF, 0.5)],
    }
    half: dict[str, list[Setting]] = {"full": [(0.1, 2.0, 0.9), (0.2, 2.0, 0.9)]}
    parts = ((1 / 4, quarter[size]), (1 / 8, eighth[size]), (1 / 2, half.get(size, [])))
    return [contender for part, settings in parts for contender in _gam("gam_part", settings, part)]


def gam_interval(size: str) -> list[Contender]:
    """Every 4th or 10th step, a quarter of the batch: how large may the term be where it comes seldom?"""
    fourth: dict[str, Iterable[Setting]] = {
        "full": [*product((0.1,), (1.0, 4.0, INF), (0.9, 2.0, 4.0)), *product((0.05,), (INF,), (0.9, 2.0, 4.0))],
        "medium": product((0.1,), (4.0, INF), (0.9, 2.0, 4.0)),
        "light": product((0.1,), (INF,), (0.9, 4.0)),
        "small": product((0.1,), (INF,), (0.9, 4.0)),
    }
    tenth = list(product((0.1,), (4.0, INF), (0.9, 4.0))) if size in ("full", "medium") else []
    return _gam("gam_interval", fourth[size], 1 / 4, 4) + _gam("gam_interval", tenth, 1 / 4, 10)


def others(size: str, small_nets_only: bool) -> list[Contender]:
    """Algorithm 2 and SAM + GAM (on small nets only), and the gradient penalty of a part of the batch."""
    tried = []
    if small_nets_only:
        tried += [Contender("accelerated", {"method": "accelerated", "rho": rho}) for rho in (0.1, 0.2, 0.5)]
        both = {"method": "finite_difference", "oracle": "sam", "max_ratio": None}
        tried += [Contender("sam_gam", {**both, "rho": rho}) for rho in (0.1, 0.2)]
        tried += [Contender("sam_gam", {**both, "rho": 0.2, "sam_rho": 0.2})]
    parts = [(1 / 4, 0.1, 0.9), (1 / 8, 0.1, 0.9)]
    parts += [(1 / 4, 0.2, 0.9), (1 / 8, 0.2, 0.9), (1 / 4, 0.2, 0.5)] if size == "full" else []
    penalty = {"method": "gradient_penalty", "alpha": INF}
    return tried + [
        Contender("penalty_part", {**penalty, "rho": rho, "max_ratio": bound, "flatness_fraction": part})
        for part, rho, bound in parts
    ]


def _gam(kind: str, settings: Iterable[Setting], part: float = 1.0, interval: int = 1) -> list[Contender]:
    """A contender for each setting."""
    shared: dict[str, Any] = {"flatness_fraction": part} if part < 1 else {}
    shared |= {"interval": interval} if interval > 1 else {}
    method = {"method": "finite_difference"}
    return [Contender(kind, {**method, "rho": rho, "alpha": a, "max_ratio": bound, **shared}) for rho, a, bound in settings]
