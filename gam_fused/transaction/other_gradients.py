"""Gradients of the model's parameters that another optimizer trains: after a step they are as its first pass left them.

Every backward adds to them, so that optimizer would step with the sum over all passes, most of them at perturbed weights.
"""

from __future__ import annotations

from torch import Tensor

from gam_fused.memory.gradients import clear, is_shared
from gam_fused.torch_private import runs_cuda_graphs
from gam_fused.transaction.model_state import ModelState


class OtherGradients:
    """`p.grad` of a model's parameters that are not the optimizer's, during one step."""

    def __init__(self, model: ModelState):
        self._model, self._params = model, model.others
        self._had_one = {id(p) for p in self._params if p.grad is not None}
        self._of_first: list[tuple[Tensor, Tensor, Tensor | None]] | None = None  # once further passes follow

    def replay(self) -> None:
        """Before each further pass: what the first has left is set aside, and what others have is dropped."""
        if self._of_first is None:
            self._params = self._model.others_now()
            self._of_first = [(p, p.grad, _copy(p.grad)) for p in self._params if p.grad is not None]
        clear(self._params)

    def finish(self) -> None:
        """As the first pass left them."""
        if self._of_first is not None:
            clear(self._params)
            for p, gradient, copied in self._of_first:
                p.grad = gradient if copied is None else _put_back(gradient, copied)

    def abort(self) -> None:
        """After a failure: no gradient where there was none. One that was there has what the first pass added to it."""
        self.finish()
        clear([p for p in self._params if id(p) not in self._had_one])


def _copy(gradient: Tensor) -> Tensor | None:
    """Of one in memory that later passes write to: DDP keeps gradients in its buckets, CUDA graphs in their own memory."""
    return gradient.clone() if is_shared(gradient) or runs_cuda_graphs(gradient.device) else None


def _put_back(gradient: Tensor, copied: Tensor) -> Tensor:
    """In the memory that others know it by, but where that is a CUDA graph's, which takes it back."""
    return copied if runs_cuda_graphs(gradient.device) else gradient.copy_(copied)
