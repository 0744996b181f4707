"""What closures return: a loss, alone or in front of other things (outputs, metrics)."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from gam_fused.memory.gradients import is_shared
from gam_fused.step.batches import part_of
from gam_fused.torch_private import runs_cuda_graphs, tree_map_only
from gam_fused.transaction.batch_contents import Items, items_in


class BatchClosure:
    """A closure with its mini-batch, which calls `closure(batch)`, or `closure` with the first part of the batch.

    For loops that accept only a closure without arguments: ``step(BatchClosure(closure, batch))`` is the same as
    ``step(closure, batch)``.

    Args:
        cut: takes the part, ``cut(batch, fraction)``, of batches that `part_of` cannot slice.
    """

    def __init__(self, closure: Callable[[Any], Any], batch: Any, cut: Callable[[Any, float], Any] = part_of):
        self.closure, self.batch, self.cut = closure, batch, cut
        self._part: tuple[float, Any, Items] | None = None

    def __call__(self) -> Any:
        return self.closure(self.batch)

    def on_part(self, fraction: float) -> Any:
        """Of the first `fraction` of the batch."""
        if self._part is None or self._part[0] != fraction:
            part = self.cut(self.batch, fraction)
            self._part = fraction, part, items_in(part)
        _, part, items = self._part
        items.put_back()  # a pass before may have taken some out
        return self.closure(part)

    def forget_part(self) -> None:
        """After a step: `batch` may be another in the next, and closures may have put their graphs into the part."""
        self._part = None


def batch_of(closure: Any) -> Any:
    """The mini-batch that a closure is given, or None."""
    while isinstance(closure, BatchClosure):
        closure = closure.batch
        if not isinstance(closure, BatchClosure):
            return closure
    return None


def check_has_batch(closure: Callable[[], Any], fraction: float) -> None:
    """Raises ValueError where the flatness term needs a part of a mini-batch that the closure does not have."""
    if fraction < 1.0 and not hasattr(closure, "on_part"):
        raise ValueError(
            f"flatness_fraction={fraction:g} needs the mini-batch: optimizer.step(closure, batch), where closure(batch) "
            "computes the loss of the batch that it is given. In Lightning, add GAMCallback; through a wrapper that takes "
            "only a closure, such as Accelerate's: optimizer.step(gam_fused.integrations.BatchClosure(closure, batch))"
        )


def loss_in(result: Any) -> Any:
    """The loss in `result`: itself, the first of a tuple or list, or the entry "loss" of a mapping."""
    if isinstance(result, (Tensor, float)):  # nearly always
        return result
    if isinstance(result, Mapping):
        return result.get("loss")
    if isinstance(result, (tuple, list)) and result:
        return result[0]
    return result


def number_in(result: Any) -> Any:
    """The loss in `result` where it is one number: of Python or numpy, or a detached tensor of one element."""
    loss = loss_in(result)
    if isinstance(loss, Tensor):
        return loss.detach() if loss.numel() == 1 else None
    return float(loss) if isinstance(loss, Real) else None


def differentiable_in(result: Any) -> Tensor:
    """The loss in `result`, to be differentiated.

    Raises:
        RuntimeError: there is none.
    """
    loss = loss_in(result)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        what = "a tensor without a graph" if isinstance(loss, Tensor) else reprlib.repr(result)
        raise RuntimeError(
            f"the closure left no gradients and returned {what}: it must call backward() on the loss, or return it as a 0-d "
            "tensor that can be differentiated, alone or as (loss, ...). A loss computed outside of the closure, or under "
            "no_grad, cannot be differentiated"
        )
    if loss.numel() != 1:
        raise RuntimeError(
            f"the closure returned a loss of shape {tuple(loss.shape)} without calling backward(): reduce it to a number"
        )
    return loss


def kept(result: Any) -> Any:
    """`result` with every tensor in it detached, since its graph belongs to weights that have changed since.

    In memory of its own where later passes write to it: CUDA graphs give what they compute in the same memory every time.
    """
    if isinstance(result, Tensor):
        return _kept(result)
    if result is None or isinstance(result, (int, float)):  # walking through nests takes a while
        return result
    return tree_map_only(Tensor, _kept, result)


def _kept(t: Tensor) -> Tensor:
    lent = runs_cuda_graphs(t.device) or (t.numel() == 1 and is_shared(t))
    return t.detach().clone() if lent else t.detach()
