"""What a measure may change and puts back: weights, buffers, generators, modes, gradients, flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gam_fused.torch_private import forget_functions_of_weights
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.model_state import ModelState
from gam_fused.transaction.randomness import Generators

Result = TypeVar("Result")


class Kept:
    """Everything as it was when this was made.

    Attributes:
        weights: copies of the parameters.
    """

    def __init__(self, params: Sequence[Tensor], modules: Sequence[nn.Module], generators: Sequence[Any]):
        self._params = params
        self.weights = [p.detach().clone() for p in params]
        everyone = {id(p): p for p in [*params, *(p for m in modules for p in m.parameters())]}
        self._marks = [(p, p.requires_grad, p.grad) for p in everyone.values()]
        self._modes = [(m, m.training) for root in modules for m in root.modules()]
        devices = {p.device for p in everyone.values()}
        self._random = Generators(devices, generators).begin()
        self._buffers = ModelState(modules, params).begin()

    def hide_gradients(self) -> None:
        """Until the end no parameter has a `grad`: a loss that calls backward neither adds to one nor goes unseen."""
        for p, _, _ in self._marks:
            p.grad = None

    def has_gradients(self) -> bool:
        """Whether backward has been called since."""
        return any(p.grad is not None for p, _, _ in self._marks)

    def start_pass(self) -> None:
        """Before each pass: generators and buffers as at the start, so that all passes see the same loss."""
        forget_functions_of_weights()
        self._random.abort()
        with torch.no_grad():
            self._buffers.abort()

    def put_back(self) -> None:
        """All as it was."""
        with torch.no_grad():
            for p, weight in zip(self._params, self.weights, strict=True):
                p.copy_(weight)
        self.start_pass()
        for m, training in self._modes:
            m.training = training
        for p, flag, grad in self._marks:
            p.requires_grad_(flag)
            p.grad = grad


def restored(
    params: Sequence[Tensor], modules: Sequence[nn.Module], generators: Sequence[Any], body: Callable[[Kept], Result]
) -> Result:
    """`body`'s result; whatever ends it, an error or Ctrl-C too, all is as before.

    Inside, gradients are recorded, whatever the caller has switched off, and attention is computed by the one of torch's
    kernels that has a second derivative.
    """
    with Interrupts() as interrupts, torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            kept = Kept(params, modules, generators)
        try:
            kept.hide_gradients()
            with torch.enable_grad():
                return interrupts.let_through(body, kept)
        finally:
            kept.put_back()
