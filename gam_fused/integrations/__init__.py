"""Helpers for training loops of other packages; each is imported on demand and needs only its own package.

`gam_fused.integrations.lightning.GAMCallback` and `gam_fused.integrations.transformers.GAMTrainerMixin`. Accelerate needs
no helper, or `all_micro_batches` and `BatchClosure`. `flatness_log`, `lightning_flatness` and `transformers_flatness` log
diagnostics and flatness during training. This file imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gam_fused.step.closures import BatchClosure as BatchClosure
from gam_fused.step.foreign_loops import all_micro_batches as all_micro_batches
from gam_fused.step.foreign_loops import overridden as overridden


@contextmanager
def on_direction(optimizer: Any, act: Callable[[], Any]) -> Iterator[None]:
    """Inside, a step of `optimizer` calls `act` right before the base optimizer's update, with d in each `p.grad`.

    d is unscaled and of all micro-batches, weights are unperturbed. The step is not fused. A skipped step does not call it.
    """

    def hook(*_: Any) -> None:
        with torch.enable_grad():
            act()

    handle = optimizer.base_optimizer.register_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def clipping_to(optimizer: Any, limit: float | None) -> Iterator[None]:
    """Inside, `limit` is the optimizer's `max_grad_norm`; its own value is restored."""
    own, optimizer.max_grad_norm = optimizer.max_grad_norm, limit
    try:
        yield
    finally:
        optimizer.max_grad_norm = own
