"""Gradients of the model's parameters that another optimizer trains: after a step they are as its first pass left them.

Every backward adds to them, so that optimizer would step with the sum over all passes, most of them at perturbed weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gam_fused.memory.gradients import clear, is_shared
from gam_fused.torch_private import runs_cuda_graphs


class OtherGradients:
    """`p.grad` of some parameters, during one step."""

    def __init__(self, params: Sequence[Tensor]):
        self._params = [p for p in params if p.requires_grad]
        self._without = [p for p in self._params if p.grad is None]
        self._of_first: list[tuple[Tensor, Tensor]] | None = None  # once further passes follow

    def replay(self) -> None:
        """Before each further pass: what the first has left is set aside, and what others have is dropped."""
        if self._of_first is None:
            self._of_first = [(p, _lasting(p.grad)) for p in self._params if p.grad is not None]
        clear(self._params)

    def finish(self) -> None:
        """As the first pass left them."""
        if self._of_first is not None:
            clear(self._params)
            for p, gradient in self._of_first:
                p.grad = gradient

    def abort(self) -> None:
        """After a failure: no gradient where there was none. One that was there has what the first pass added to it."""
        self.finish()
        clear(self._without)


def _lasting(gradient: Tensor) -> Tensor:
    """In memory that no later pass writes to: DDP keeps gradients in its buckets, CUDA graphs in their own memory."""
    return gradient.clone() if is_shared(gradient) or runs_cuda_graphs(gradient.device) else gradient
