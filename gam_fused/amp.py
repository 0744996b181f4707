"""Loss scaling: what FusedGAM and a `torch.amp.GradScaler` tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_fused.constants import Control

if TYPE_CHECKING:
    from gam_fused.buckets import Bucket


class LossScaling:
    """Scales losses, tells the verbs the scale, and tells the scaler of a skipped step.

    Args:
        scaler: a `torch.amp.GradScaler`, or None for no scaling.

    Raises:
        TypeError: not a GradScaler.
    """

    def __init__(self, scaler: Any = None):
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, but is {scaler!r}")
        self.scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self.scaler else loss

    def current_scale(self) -> Tensor | float:
        """How many times too large the gradients of this step are."""
        return self.scaler._scale.double() if self.scaler else 1.0

    def publish(self, buckets: list[Bucket]) -> None:
        """Write the scale into the control blocks; it stays the same until `scaler.update()`."""
        if self.scaler:
            if self.scaler._scale is None:  # made by the first `scale`, which may come after this
                self.scaler._lazy_init_scale_growth_tracker(buckets[0].control.device)
            for bucket in buckets:
                bucket.control[Control.LOSS_SCALE] = self.scaler._scale.to(bucket.control.device, torch.float64)

    def report(self, optimizer: Any, skipped: Tensor) -> None:
        """Record for `scaler.update()` whether this step met an infinity: where `scaler.unscale_` would have."""
        if self.scaler:
            found = skipped.to(torch.float32).reshape(1)
            self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found}
