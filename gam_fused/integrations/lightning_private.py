"""All that is used of Lightning's inside, by whichever of its two packages is installed; see tests/test_private_names.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import lightning.pytorch as pl
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
    from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
    from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision, Precision
    from lightning.pytorch.utilities import GradClipAlgorithmType
except ImportError:  # the same code under the name of its own package
    import pytorch_lightning as pl
    from pytorch_lightning.core.optimizer import LightningOptimizer
    from pytorch_lightning.loops.optimization.automatic import Closure, _AutomaticOptimization
    from pytorch_lightning.loops.utilities import _block_parallel_sync_behavior
    from pytorch_lightning.plugins import FSDPPrecision, MixedPrecision, Precision
    from pytorch_lightning.utilities import GradClipAlgorithmType

__all__ = [
    "AutomaticOptimization",
    "FSDPPrecision",
    "GradClipAlgorithmType",
    "LightningOptimizer",
    "MixedPrecision",
    "Precision",
    "batch_in",
    "block_parallel_sync_behavior",
    "call_hooks_before_step",
    "pl",
    "with_batch",
]
block_parallel_sync_behavior = _block_parallel_sync_behavior


class AutomaticOptimization(_AutomaticOptimization):
    """Lightning's loop of automatic optimization, with names for the parts that are put together anew."""

    def should_accumulate(self) -> bool:
        """Whether the batch that has arrived is not the last of a step."""
        return bool(self.trainer.fit_loop._should_accumulate())

    def closure_of(self, optimizer: Any, batch_idx: int, kwargs: Any, *, zero_grad: bool) -> Any:
        """Forward and backward of one micro-batch."""
        clear = self._make_zero_grad_fn(batch_idx, optimizer) if zero_grad else None
        return Closure(self._make_step_fn(kwargs), self._make_backward_fn(optimizer), clear)

    def make_step(self, batch_idx: int, closure: Callable[[], Any]) -> None:
        """`LightningModule.optimizer_step` with `closure`, and the progress it is counted in."""
        self._optimizer_step(batch_idx, closure)


def batch_in(kwargs: Any) -> Any:
    """The batch among the arguments of a `training_step`.

    Raises:
        RuntimeError: it takes an iterator instead.
    """
    if "batch" not in kwargs:
        raise RuntimeError(
            "training_step(dataloader_iter) would draw another batch in every pass of a step: take (batch, batch_idx)"
        )
    return kwargs["batch"]


def with_batch(kwargs: Any, batch: Any) -> Any:
    """The arguments of a `training_step` with another batch, in the same order."""
    return type(kwargs)(kwargs, batch=batch)


def call_hooks_before_step(plugin: Any, model: Any, optimizer: Any) -> None:
    """`on_before_optimizer_step` and gradient clipping, in Lightning's order; `plugin` is the precision plugin."""
    plugin._after_closure(model, optimizer)
