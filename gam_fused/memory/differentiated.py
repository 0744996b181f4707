"""Gradients of `torch.autograd.grad`, which may miss something without an error that `backward` would raise or not need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gam_fused.torch_private import once_differentiable_in


def check_differentiated(loss: Tensor, gradients: Sequence[Tensor | None], *, again: bool = False) -> None:
    """Whether something is missing in the gradients of `loss`.

    Args:
        again: whether they shall be differentiated once more.

    Raises:
        RuntimeError: gradients that only `backward` would have made; derivatives of a function that has but the first.
    """
    missing = any(g is None for g in gradients)
    waiting, seen = [loss.grad_fn] if missing or again else [], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        if missing and "CheckpointFunction" in node.name():  # those of other packages are called that too
            raise RuntimeError(
                "the loss holds a segment of torch.utils.checkpoint with use_reentrant=True, through which only backward() "
                "reaches parameters: their gradients would be missing. Use use_reentrant=False"
            )
        if again and (name := once_differentiable_in(node)):
            raise RuntimeError(
                f"{name} in the loss is marked @once_differentiable: its part of the Hessian would be missing. Write its "
                "backward so that it can be differentiated, or use another method than 'exact'"
            )
        seen.add(node)
        waiting += [after for after, _ in node.next_functions]
