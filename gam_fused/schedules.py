"""Schedules of GAM's own hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gam_fused.checks import number

if TYPE_CHECKING:
    from gam_fused.optimizer import FusedGAM


class ProportionalRho:
    """rho follows the learning rate between two bounds, in every param group (Zhuang et al., ICLR 2022, section 4).

    rho = min_rho + (max_rho - min_rho) * (lr - min_lr) / (max_lr - min_lr), clamped to the bounds. Theorem 4.4 of the GAM
    paper requires rho_t and lr_t to shrink together.

    Args:
        optimizer: a `FusedGAM`.
        max_rho: rho at `max_lr`, in the units of the weights.
        min_rho: rho at `min_lr`.
        max_lr: the largest learning rate; None means each group's at construction.
        min_lr: the smallest.

    Call `step()` after the learning rate scheduler's.

    Raises:
        ValueError: bounds that are negative, not finite, or in the wrong order.
    """

    def __init__(
        self, optimizer: FusedGAM, max_rho: float, min_rho: float = 0.0, max_lr: float | None = None, min_lr: float = 0.0
    ):
        self.optimizer = optimizer
        self.max_rho = number("max_rho", max_rho, minimum=0.0)
        self.min_rho = number("min_rho", min_rho, minimum=0.0)
        self.min_lr = number("min_lr", min_lr, minimum=0.0)
        if self.min_rho > self.max_rho:
            raise ValueError(f"min_rho={min_rho!r} must be at most max_rho={max_rho!r}")
        given = [group["lr"] if max_lr is None else max_lr for group in optimizer.param_groups]
        self.max_lrs = [number("max_lr", lr, above=self.min_lr) for lr in given]
        self.step()

    def step(self) -> None:
        """Set each group's rho from its current learning rate."""
        for i, group in enumerate(self.optimizer.param_groups):
            max_lr = self.max_lrs[min(i, len(self.max_lrs) - 1)]
            fraction = (float(group["lr"]) - self.min_lr) / (max_lr - self.min_lr)
            group[self.optimizer.rho_key] = self.min_rho + (self.max_rho - self.min_rho) * min(1.0, max(0.0, fraction))

    def state_dict(self) -> dict[str, Any]:
        """The bounds; rho itself is in the optimizer's state dict."""
        return {k: v for k, v in self.__dict__.items() if k != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self.__dict__.update(state_dict)
