"""Helpers for training loops that are not the user's own; each is imported on demand, and only it needs its package.

`gam_fused.integrations.lightning.GAMCallback` and `gam_fused.integrations.transformers.GAMTrainerMixin`. Accelerate needs
none. This file imports nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def check_closure(closure: Callable[[], Any]) -> None:
    """Refuses what is no function, and what Lightning's hooks hand over where that would train wrongly without a word.

    Lightning wraps the closure of automatic optimization as `partial(precision._wrap_closure, module, optimizer, closure)`.
    It runs the last micro-batch only, and clips the gradients of each pass.

    Raises:
        TypeError: not callable.
        RuntimeError: a Trainer that accumulates or clips gradients, without `GAMCallback`.
    """
    if not callable(closure):
        raise TypeError(
            f"step takes a function that computes the loss, which it calls once per pass, not a {type(closure).__name__}: "
            "optimizer.step(lambda: loss_fn(model(x), y))"
        )
    if not isinstance(closure, partial) or getattr(closure.func, "__name__", "") != "_wrap_closure":
        return
    module = closure.args[0]
    trainer = module.trainer
    if not module.automatic_optimization:
        return
    settings = {name: getattr(trainer, name) for name in ("accumulate_grad_batches", "gradient_clip_val")}
    if settings["accumulate_grad_batches"] > 1 or settings["gradient_clip_val"]:
        told = ", ".join(f"{name}={value}" for name, value in settings.items() if value not in (None, 0, 1))
        raise RuntimeError(
            f"Trainer({told}): each of the optimizer's passes would see one micro-batch only, or clipped gradients. Add "
            "Trainer(callbacks=[gam_fused.integrations.lightning.GAMCallback()])"
        )
