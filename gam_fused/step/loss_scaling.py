"""Loss scaling: everything that FusedGAM and a `torch.amp.GradScaler` exchange.

The scaler multiplies the loss of every pass, and the kernels divide by the scale where they read gradients, so each pass is
unscaled exactly once. The scaler learns whether the step was skipped by its own `unscale_`, called on a one-element stand-in
whose gradient is 0, or infinite where a gradient in any pass was. Nothing of this waits for the device.

Two ways to step, the same result: `optimizer.step(closure)` and `scaler.step(optimizer, closure)`, each followed by
`scaler.update()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gam_fused.constants import Control
from gam_fused.memory.blocks import Block
from gam_fused.torch_private import OptState, scaler_stage

_HANDED_OVER = ("grad_scale", "found_inf")  # what `scaler.step` sets on an optimizer for the time of the call


class LossScaling:
    """Scales losses, tells the kernels the scale, and tells the scaler of a skipped step.

    Attributes:
        scaler: the `torch.amp.GradScaler` in use, or None.
    """

    def __init__(self) -> None:
        self.scaler: Any = None
        self._stand_in: Any = None  # an optimizer of one parameter of one element
        self._owner: Any = None  # whose step runs
        self._published = self._unscaled_before = self._scaled = False

    def use(self, scaler: Any, device: torch.device) -> None:
        """Scale by `scaler` from now on, or by nothing where it is None or not enabled.

        Raises:
            TypeError: not a GradScaler.
        """
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, but is {scaler!r}")
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.scaler:
            if device.type == "meta":
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            with torch.inference_mode(False), torch.no_grad():
                self.current_scale(device)  # the first makes the scale; `scaler.step` asks for it before our first pass

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self.scaler else loss

    def current_scale(self, device: torch.device) -> Tensor | float:
        """How many times too large the gradients of this step are: 0-d float64 on `device`."""
        return self.scaler.scale(torch.ones((), device=device)).double() if self.scaler else 1.0

    # A step, from its beginning to its end.

    def begin(self, optimizer: Any) -> None:
        """Before the first pass.

        Raises:
            RuntimeError: a scaler that is not known here makes the step, or the last step has not been followed by `update`.
        """
        if self.scaler is None:
            if "found_inf" in optimizer.__dict__:
                self.abort(optimizer)
                raise RuntimeError(
                    "scaler.step(optimizer, closure) with a scaler unknown to the optimizer, which then can neither unscale "
                    "the gradients of each pass nor report an infinity. Pass it the scaler: FusedGAM(..., "
                    "grad_scaler=scaler), or optimizer.grad_scaler = scaler"
                )
            return
        if scaler_stage(self.scaler, self._stand_in) is not OptState.READY:
            self.abort(optimizer)
            raise RuntimeError("scaler.update() has not been called since the last step: call it after every step")
        self._owner = optimizer
        self._unscaled_before = scaler_stage(self.scaler, optimizer) is OptState.UNSCALED

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the call returns; notes whether it had the scaler scale anything."""
        if self.scaler is None:
            return call(*args)
        scaler, original, own = self.scaler, self.scaler.scale, "scale" in vars(self.scaler)
        self._scaled = False

        def scale(outputs: Any) -> Any:
            self._scaled = True
            return original(outputs)

        scaler.scale = scale
        try:
            return call(*args)
        finally:
            if own:
                scaler.scale = original
            else:
                del scaler.scale

    def check_scaled(self) -> None:
        """After a closure that called backward itself.

        Raises:
            RuntimeError: its loss was not scaled: divided by the scale, next to nothing would be left of its gradients.
        """
        if self.scaler and not self._scaled:
            raise RuntimeError(
                "the closure called backward() on a loss that the optimizer's grad_scaler has not scaled: return the loss "
                "without backward(), or call scaler.scale(loss).backward()"
            )

    def publish(self, blocks: list[Block]) -> None:
        """After the first pass: write the scale into the control blocks. It stays the same until `scaler.update()`.

        Raises:
            RuntimeError: the closure has unscaled the gradients.
        """
        if self.scaler and not self._unscaled_before and scaler_stage(self.scaler, self._owner) is OptState.UNSCALED:
            raise RuntimeError(
                "the closure called scaler.unscale_(optimizer), which divides the gradients of one pass only. Leave it out: "
                "FusedGAM unscales every pass itself, and clips the combined direction with max_grad_norm="
            )
        if self.scaler or self._published:
            for block in blocks:
                block.set(Control.LOSS_SCALE, self.current_scale(block.control.device))
        self._published = self.scaler is not None

    def report(self, skipped: Tensor) -> None:
        """After the step: let `scaler.update()` know whether it was skipped (`skipped` is not 0, on any device)."""
        self._owner = None
        if not self.scaler:
            return
        if self._stand_in is None or self._carrier.device != skipped.device:
            self._stand_in = torch.optim.SGD([torch.zeros(1, device=skipped.device)], lr=0.0)
        flag = torch.zeros_like(self._carrier)
        self._carrier.grad = flag.masked_fill_(skipped.reshape(1) != 0, math.inf)
        self.scaler.unscale_(self._stand_in)

    def abort(self, optimizer: Any) -> None:
        """After a failure: remove what `scaler.step` left on the optimizer; it only does so itself after success."""
        self._owner = None
        for name in _HANDED_OVER:
            optimizer.__dict__.pop(name, None)

    @property
    def _carrier(self) -> Tensor:
        carrier: Tensor = self._stand_in.param_groups[0]["params"][0]
        return carrier
