"""What a step leaves behind for `diagnostics`: losses, and norms from the reductions it made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import Tensor

from gam_fused.constants import GUARD, Control
from gam_fused.memory.blocks import Block
from gam_fused.memory.reductions import ShardSums
from gam_fused.settings import Settings
from gam_fused.step.method import Method


@dataclass
class Record:
    """One step as it was seen. Sums are the plan's own, and hold the numbers of the last step.

    Attributes:
        settings, rhos: as they stood in the step; rho of each perturbed param group.
        losses: the loss of every pass, by the point it was made at: a float, a 0-d tensor, or None.
        ascents: which reductions the step made. extras: norms that a method computed itself.
    """

    settings: Settings
    method: Method
    blocks: Sequence[Block]
    shards: ShardSums
    fsdp_modules: Sequence[Any]
    rhos: Sequence[float]
    losses: dict[str, Any] = field(default_factory=dict)
    ascents: list[int] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rho(self) -> float:
        """Of the first perturbed param group."""
        return self.rhos[0] if self.rhos else 0.0

    @property
    def first_radius(self) -> float:
        """How long the first ascent was meant to be."""
        return float(self.settings.rho_prime) if self.method.probes else max(self.rhos, default=0.0)

    def norm(self, slot: int) -> Tensor:
        """0-d: the norm that a reduction found over counted tensors, unscaled; `GUARD` is the last gradient's."""
        shared, control = self.blocks[0].shared, self.blocks[0].control
        return shared.partials[slot, 0].sum().sqrt() / control[Control.LOSS_SCALE]

    @property
    def _products(self) -> Tensor:
        """[6]: sums of h+ h+, h- h+ and h- h-, over counted and over other tensors."""
        products: Tensor = self.extras.get("products", self.blocks[0].shared.partials[GUARD].sum(1))
        return products

    def cosine(self) -> Tensor:
        """0-d: the cosine of h+ and h-, over counted tensors."""
        plus, _, cross, _, minus, _ = self._products
        cosine: Tensor = cross / (plus.sqrt() * minus.sqrt())
        return cosine

    def bound(self) -> dict[str, Tensor]:
        """What the bound on the flatness term saw, over counted tensors; empty where there is none.

        With an infinite alpha only the bound counts.
        """
        max_ratio, alpha = self.settings.max_ratio, self.settings.alpha
        if max_ratio is None:
            return {}
        plus, _, _, _, minus, _ = self._products
        if alpha == inf:
            bounded = (plus > 0).to(plus.dtype)
            ratio = bounded * max_ratio
        else:
            ratio = alpha * plus.sqrt() / minus.sqrt()
            bounded = (ratio > max_ratio).to(plus.dtype)
        return {"ratio": ratio, "bounded": bounded, "cosine": self.cosine()}
