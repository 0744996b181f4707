"""Lightning: `Trainer(callbacks=[GAMCallback()])`, for automatic and manual optimization.

    class Model(LightningModule):
        def configure_optimizers(self):
            return FusedGAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=self)

Without the callback, fp32 and bf16 train correctly too as long as gradients are neither accumulated nor clipped, but
`self.log` then records every pass, perturbed ones included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

try:
    import lightning.pytorch as pl
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
    from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
    from lightning.pytorch.trainer import call
    from lightning.pytorch.utilities import GradClipAlgorithmType
except ImportError:  # the same code under the name of its own package
    import pytorch_lightning as pl
    from pytorch_lightning.core.optimizer import LightningOptimizer
    from pytorch_lightning.loops.optimization.automatic import Closure, _AutomaticOptimization
    from pytorch_lightning.loops.utilities import _block_parallel_sync_behavior
    from pytorch_lightning.trainer import call
    from pytorch_lightning.utilities import GradClipAlgorithmType

from gam_fused.optimizer import FusedGAM


class GAMCallback(pl.Callback):
    """Lets a Trainer step `FusedGAM` optimizers with everything it offers; other optimizers are not touched.

    - `accumulate_grad_batches`: every pass runs all micro-batches of a step (they wait until the last has arrived).
    - `gradient_clip_val` (by norm) becomes `max_grad_norm`: the combined direction is clipped, not the gradients of a pass.
    - 16-mixed: the plugin's scaler becomes the optimizer's `grad_scaler`.
    - `self.log`, the step's outputs and the hook `on_before_optimizer_step` see pass 1 only, the unperturbed one. In that
      hook gradients are as backward left them: scaled by the scaler, and not clipped.

    `global_step` advances once per step. A metric that `training_step` updates itself is updated in every pass.

    Raises:
        ValueError: clipping by value; a strategy that accumulates gradients itself.
        TypeError: a Trainer of the other one of the packages `lightning` and `pytorch_lightning`.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or isinstance(trainer.fit_loop.epoch_loop.automatic_optimization, _Optimization):
            return
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(f"GAMCallback serves the Trainer of {pl.__name__}, but this one is {type(trainer).__module__}'s")
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(f"{type(trainer.strategy).__name__} accumulates gradients itself, which FusedGAM cannot replay")
        self._restore = (trainer.fit_loop.epoch_loop.automatic_optimization, trainer.strategy.precision_plugin)
        trainer.fit_loop.epoch_loop.automatic_optimization = _Optimization(self._restore[0])
        trainer.strategy.precision_plugin = _serving(self._restore[1])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.fit_loop.epoch_loop.automatic_optimization, _Optimization):
            trainer.fit_loop.epoch_loop.automatic_optimization, trainer.strategy.precision_plugin = self._restore


class _Skip(Exception):
    """`training_step` returned None for every micro-batch, Lightning's word for: no update."""


class _Optimization(_AutomaticOptimization):
    """Automatic optimization whose closure runs all micro-batches of one step, so that every pass sees the same loss."""

    def __init__(self, original: _AutomaticOptimization):
        super().__init__(original.trainer)
        self.optim_progress = original.optim_progress  # what `global_step` counts
        self._waiting: list[tuple[int, OrderedDict]] = []

    def run(self, optimizer: Any, batch_idx: int, kwargs: OrderedDict) -> dict[str, Any]:
        if not isinstance(optimizer, FusedGAM):
            return super().run(optimizer, batch_idx, kwargs)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._waiting.clear()  # left by an epoch that was stopped
        self._waiting.append((batch_idx, kwargs))
        if self.trainer.fit_loop._should_accumulate():
            return {}
        batches, self._waiting = self._waiting, []
        outputs: list[dict[str, Any]] = []

        def one_pass() -> Any:
            output = self._run_batches(optimizer, batches, first_pass=not outputs)
            outputs.append(output)
            return output["loss"]

        try:
            self._optimizer_step(batch_idx, one_pass)
        except _Skip:
            self.optim_progress.optimizer.step.increment_completed()
            return {}
        return outputs[0]

    def _run_batches(self, optimizer: Any, batches: list[tuple[int, OrderedDict]], *, first_pass: bool) -> dict[str, Any]:
        """Forward and backward of all micro-batches. Returns the last one's output, with the loss of all."""
        output: dict[str, Any] = {}
        losses = []
        for i, (batch_idx, kwargs) in enumerate(batches):
            zero_grad = self._make_zero_grad_fn(batch_idx, optimizer) if first_pass and i == 0 else None
            closure = Closure(self._make_step_fn(kwargs), self._make_backward_fn(optimizer), zero_grad)
            with _block_parallel_sync_behavior(self.trainer.strategy, block=i < len(batches) - 1):
                loss = closure()
            output = closure.consume_result().asdict()
            if loss is not None:
                losses.append(loss)
        if not losses:
            raise _Skip
        return {**output, "loss": sum(losses[1:], losses[0])}


class _ServesGAM:
    """Mixed into the Trainer's precision plugin: closures, scaler and clipping for `FusedGAM`."""

    scaler: Any = None

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        if not isinstance(optimizer, FusedGAM):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)  # type: ignore[misc]
        trainer = model.trainer
        algorithm = trainer.gradient_clip_algorithm
        self._clip_gradients(model, optimizer, trainer.gradient_clip_val, gradient_clip_algorithm=algorithm)  # type: ignore[attr-defined]
        if optimizer.grad_scaler is not self.scaler:
            optimizer.grad_scaler = self.scaler
        first_pass = True

        def one_pass() -> Any:
            nonlocal first_pass
            with nullcontext() if first_pass else _nothing_logged(model):
                result = closure()
            if first_pass:
                first_pass = False
                call._call_callback_hooks(trainer, "on_before_optimizer_step", optimizer)
                call._call_lightning_module_hook(trainer, "on_before_optimizer_step", optimizer)
            return result

        loss = optimizer.step(one_pass, **kwargs)
        if self.scaler is not None:
            self.scaler.update()
        return loss

    def clip_gradients(
        self,
        optimizer: Any,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Called before the passes of a step: for `FusedGAM`, sets what it clips its direction to."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(optimizer, FusedGAM):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[misc]
        elif clip_val > 0:
            if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
                raise ValueError("gradient_clip_algorithm='value' does not go with FusedGAM: clip by norm")
            optimizer.max_grad_norm = float(clip_val)


def _serving(plugin: Any) -> Any:
    """The precision plugin with `_ServesGAM` mixed in. It goes by the same name, which checkpoints know it by."""
    kind = type(plugin)
    served: Any = object.__new__(type(kind.__name__, (_ServesGAM, kind), {"__qualname__": kind.__qualname__}))
    served.__dict__ = plugin.__dict__
    return served


@contextmanager
def _nothing_logged(module: pl.LightningModule) -> Iterator[None]:
    """Until this ends, `self.log` and `self.log_dict` of the module do nothing."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.log, module.log_dict
