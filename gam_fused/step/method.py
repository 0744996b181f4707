"""What a method is: its passes, and the numbers with which the kernels compute its direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from gam_fused.settings import Settings, Takes

if TYPE_CHECKING:  # a method says what its functions take; it runs nothing
    from gam_fused.step.record import Record
    from gam_fused.step.step import Step


@dataclass(frozen=True)
class Coefficients:
    """A row of the coefficient table, of one param group, by the places where kernels use them.

    Attributes:
        radii: lengths of the three ascents.
        fold: folded <- fold[0] * folded + fold[1] * x, in an ascent along x.
        g1, last: h+ = g1 * g1 + last * last. folded: the weight of `folded`, which is h-.
        alpha, max_ratio: of a bounded flatness term.

        d = plus_scale * h+ + folded * h-. In steps that give `g1`, plus_scale = min(alpha, max_ratio |h-| / (|h+| + xi))
        where max_ratio > 0; otherwise 1 - folded * <h-, h+> / |h+|^2, which takes the projection of h- on h+ out of the
        second term (Algorithm 2). In all other steps it is 1.
    """

    radii: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fold: tuple[float, float] = (0.0, 0.0)
    g1: float = 0.0
    last: float = 1.0
    folded: float = 0.0
    alpha: float = 0.0
    max_ratio: float = 0.0


@dataclass(frozen=True)
class Method:
    """One method: everything that tells it from the others.

    Attributes:
        name: as users give it.
        takes: its hyperparameters and their defaults.
        passes: runs one step.
        coefficients: from the settings and a param group's rho.
        norms: figures for `diagnostics`, of the last step.
        combinations: tables of their own, by name, for what `Step.combine` makes of gradients on a part of the batch.
        probes: whether it takes finite differences over a length rho_prime, which rounding may drown.
        twice: whether it differentiates gradients once more.
    """

    name: str
    takes: Takes
    passes: Callable[[Step], None]
    coefficients: Callable[[Settings, float], Coefficients]
    norms: Callable[[Record], dict[str, Tensor]]
    probes: bool = False
    twice: bool = False
    combinations: Mapping[str, Callable[[Settings], Coefficients]] = field(default_factory=dict)


def bounded(settings: Settings, flatness: Coefficients) -> Coefficients:
    """d = h_loss + alpha' h_norm, with h_loss in `folded` and h_norm, without alpha, the h+ of `flatness`.

    alpha' = min(alpha, max_ratio |h_loss| / (|h_norm| + xi)): for max_ratio < 1, <d, h_loss> >= (1 - max_ratio) |h_loss|^2.
    """
    if settings.max_ratio == 0.0:  # d = h_loss
        return replace(flatness, folded=1.0, alpha=0.0, max_ratio=1.0)
    return replace(flatness, folded=1.0, alpha=settings.alpha, max_ratio=settings.max_ratio)
