"""Lightning: `Trainer(callbacks=[GAMCallback()])`, for automatic and manual optimization.

    class Model(LightningModule):
        def configure_optimizers(self):
            return FusedGAM(self, torch.optim.SGD, lr=0.1, momentum=0.9)

Without the callback, fp32 and bf16 train correctly too, as long as gradients are neither accumulated nor clipped and no hook
modifies them. Settings and hooks that do so raise errors. But a manual `self.clip_gradients` would clip nothing before a
step, and single passes in the closure, and `self.log` records every pass, including perturbed ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from gam_fused.integrations import BatchClosure, clipping_to, on_direction, overridden
from gam_fused.integrations.lightning_private import (
    AutomaticOptimization,
    FSDPPrecision,
    GradClipAlgorithmType,
    LightningOptimizer,
    MixedPrecision,
    Precision,
    batch_in,
    block_parallel_sync_behavior,
    call_hooks_before_step,
    pl,
    with_batch,
)
from gam_fused.optimizer import FusedGAM
from gam_fused.step.batches import part_of

_Batches = list[tuple[int, "OrderedDict[str, Any]"]]  # with their numbers


class GAMCallback(pl.Callback):
    """Makes all features of a Trainer work with `FusedGAM` optimizers; other optimizers are not affected.

    - `accumulate_grad_batches`: every pass runs all micro-batches of a step (they are kept until the last has arrived).
    - 16-mixed: the plugin's scaler becomes the optimizer's `grad_scaler`.
    - `on_before_optimizer_step` and `configure_gradient_clipping` run once per step that is not skipped, right before the
      base optimizer's update: weights are unperturbed, and each `p.grad` holds the combined direction d, unscaled and of all
      micro-batches. The update uses what they make of it (`diagnostics` reports the norm before). If one is overridden, in
      the module or (the first) in a callback, or the Trainer clips by value, the update is not fused.
    - Otherwise `gradient_clip_val` is the optimizer's `max_grad_norm` during its step, and the update stays fused. With any
      clipping by Lightning, the optimizer's own `max_grad_norm` is not used.
    - `flatness_fraction`: passes of the flatness term run `training_step` on the first part of each micro-batch. In manual
      optimization, pass the batch: `opt.step(closure, batch=batch)` calls `closure(batch)`.
    - Manual optimization: `self.clip_gradients(opt, ...)` before `opt.step(closure)` clips the d of that step.
    - `self.log` and the step's outputs see only pass 1, the unperturbed one; `on_before_zero_grad` runs in it, and finds no
      gradients, as a step leaves none.
    - Hooks around backward, such as `on_after_backward`, run in every pass. The optimizer uses gradients as these leave
      them: do not clip there.

    `global_step` advances once per step. A metric that `training_step` updates itself is updated in every pass.

    Raises:
        ValueError: a strategy that accumulates gradients itself.
        TypeError: a Trainer from the other one of the packages `lightning` and `pytorch_lightning`.
        RuntimeError: `self.clip_gradients` while gradients are those of one pass; an `optimizer_step` that never runs its
            closure, or wraps it although `flatness_fraction` needs the batch; a `training_step` that takes an iterator; a
            precision plugin that overrides how to step.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or isinstance(trainer.fit_loop.epoch_loop.automatic_optimization, _Optimization):
            return
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(f"GAMCallback needs the Trainer of {pl.__name__}, not of {type(trainer).__module__}")
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(f"{type(trainer.strategy).__name__} accumulates gradients itself, which FusedGAM cannot replay")
        self._restore = (trainer.fit_loop.epoch_loop.automatic_optimization, trainer.strategy.precision_plugin)
        trainer.fit_loop.epoch_loop.automatic_optimization = _Optimization(self._restore[0])
        trainer.strategy.precision_plugin = _serving(self._restore[1], trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.fit_loop.epoch_loop.automatic_optimization, _Optimization):
            trainer.fit_loop.epoch_loop.automatic_optimization, trainer.strategy.precision_plugin = self._restore


class _Skip(Exception):
    """`training_step` returned None for every micro-batch, which in Lightning means: no update."""


class _Optimization(AutomaticOptimization):
    """Automatic optimization whose closure runs all micro-batches of one step, so that every pass sees the same loss."""

    def __init__(self, original: AutomaticOptimization):
        super().__init__(original.trainer)
        self.optim_progress = original.optim_progress  # what `global_step` counts
        self._waiting: _Batches = []

    def run(self, optimizer: Any, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        if not isinstance(optimizer, FusedGAM):
            result: dict[str, Any] = super().run(optimizer, batch_idx, kwargs)
            return result
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._waiting.clear()  # left by an epoch that was stopped
        batch_in(kwargs)
        self._waiting.append((batch_idx, kwargs))
        if self.should_accumulate():
            return {}
        batches, self._waiting = self._waiting, []
        outputs: list[dict[str, Any]] = []

        def one_pass(batches: _Batches) -> Any:
            output = self._run_batches(optimizer, batches, first_pass=not outputs)
            outputs.append(output)
            return output["loss"]

        try:
            self.make_step(batch_idx, BatchClosure(one_pass, batches, _parts))
        except _Skip:
            self.optim_progress.optimizer.step.increment_completed()
            return {}
        if not outputs:
            raise RuntimeError(
                f"{type(self.trainer.lightning_module).__name__}.optimizer_step has not run its closure: pass it on, "
                "optimizer.step(closure=optimizer_closure), or, to skip the update, call it"
            )
        return outputs[0]

    def _run_batches(self, optimizer: Any, batches: _Batches, *, first_pass: bool) -> dict[str, Any]:
        """Forward and backward of all micro-batches. Returns the last one's output, with the loss of all."""
        output: dict[str, Any] = {}
        losses = []
        for i, (batch_idx, kwargs) in enumerate(batches):
            closure = self.closure_of(optimizer, batch_idx, kwargs, zero_grad=first_pass and i == 0)
            with block_parallel_sync_behavior(self.trainer.strategy, block=i < len(batches) - 1):
                loss = closure()
            output = closure.consume_result().asdict()
            if loss is not None:
                losses.append(loss)
        if not losses:
            raise _Skip
        return {**output, "loss": sum(losses[1:], losses[0])}


def _parts(batches: _Batches, fraction: float) -> _Batches:
    """The first `fraction` of each micro-batch."""
    return [(i, with_batch(kwargs, part_of(batch_in(kwargs), fraction))) for i, kwargs in batches]


class _Clipping:
    """State of `clip_gradients`: whose passes are running, whose d is in `p.grad`, which clipping was requested before."""

    def __init__(self, trainer: pl.Trainer):
        self.trainer = trainer
        self.passes_of: Any = None
        self.direction_of: Any = None
        self.asked: dict[Any, list[tuple[float, GradClipAlgorithmType]]] = {}


class _ServesGAM:
    """Mixed into the Trainer's precision plugin: closures, scaler, hooks and clipping for `FusedGAM`."""

    scaler: Any = None
    _gam: _Clipping  # of the class that `_serving` makes; the plugin's `__dict__` stays as it is

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[..., Any], **kwargs: Any) -> Any:
        if not isinstance(optimizer, FusedGAM):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)  # type: ignore[misc]
        if (kind := self._plugin_with("optimizer_step")) not in (Precision, MixedPrecision, FSDPPrecision):
            raise RuntimeError(f"{kind.__name__}.optimizer_step would not run: GAMCallback cannot use it to step FusedGAM")
        if optimizer.grad_scaler is not self.scaler:
            optimizer.grad_scaler = self.scaler
        if "batch" in kwargs:
            closure = BatchClosure(closure, kwargs.pop("batch"))
        if model.automatic_optimization and optimizer.flatness_fraction < 1.0 and not hasattr(closure, "on_part"):
            raise RuntimeError(
                f"flatness_fraction={optimizer.flatness_fraction:g}: {type(model).__name__}.optimizer_step has wrapped its "
                "closure, which knows the batch: pass it on unchanged, optimizer.step(closure=optimizer_closure)"
            )
        limit, act = self._clipping(optimizer, model)
        self._gam.passes_of = optimizer
        try:
            with clipping_to(optimizer, limit), on_direction(optimizer, act) if act else nullcontext():
                loss = optimizer.step(self._one_pass(model, closure), **kwargs)
        finally:
            self._gam.passes_of = self._gam.direction_of = None
        if self.scaler is not None:
            self.scaler.update()
        return loss

    def _one_pass(self, model: Any, closure: Any) -> Callable[[], Any]:
        first_pass = True

        def one_pass(closure: Any = closure) -> Any:
            nonlocal first_pass
            with nullcontext() if first_pass else _nothing_logged(model):
                result = closure()
            first_pass = False
            return result

        if hasattr(closure, "on_part"):
            return BatchClosure(one_pass, closure, lambda closure, fraction: partial(closure.on_part, fraction))
        return one_pass

    def _clipping(self, optimizer: Any, model: Any) -> tuple[float | None, Callable[[], None] | None]:
        """The norm to clip d to in the coming step, and what has to act on d before the update (None: nothing)."""
        trainer, automatic = self._gam.trainer, model.automatic_optimization
        clips = self._gam.asked.pop(optimizer, [])
        if automatic and trainer.gradient_clip_val:
            clips = [(trainer.gradient_clip_val, trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM)]
        hooks = overridden(model, ["on_before_optimizer_step", *(["configure_gradient_clipping"] if automatic else [])])
        hooks += [name for c in trainer.callbacks for name in overridden(c, ["on_before_optimizer_step"])]
        limit = None if clips else optimizer.max_grad_norm
        if self._is_max_grad_norm(clips) and not (automatic and hooks):  # those come before that clipping, or do it
            limit, clips = float(clips[0][0]), []

        def act() -> None:
            self._gam.passes_of, self._gam.direction_of = None, optimizer
            for clip in [] if automatic else clips:
                self.clip_gradients(optimizer, *clip)
            call_hooks_before_step(self, model, optimizer)

        return limit, act if clips or hooks else None

    def _is_max_grad_norm(self, clips: list[tuple[float, GradClipAlgorithmType]]) -> bool:
        """Whether the requested clipping is one clipping by norm, done by torch."""
        by_torch = self._plugin_with("clip_gradients") in (Precision, MixedPrecision)
        by_torch = by_torch and self._plugin_with("clip_grad_by_norm") is Precision
        return by_torch and [algorithm for _, algorithm in clips] == [GradClipAlgorithmType.NORM]

    def clip_gradients(
        self,
        optimizer: Any,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """For `FusedGAM`: clips d if it is in `p.grad`; called before a manual step, clips the d of that step."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        clip: Callable[..., None] = super().clip_gradients  # type: ignore[misc]
        if isinstance(optimizer, FusedGAM):
            if clip_val <= 0:
                return
            if self._gam.direction_of is not optimizer:
                self._ask(optimizer, clip_val, gradient_clip_algorithm)
                return
            if self._plugin_with("clip_gradients") is MixedPrecision:  # it refuses what unscales by itself; d is unscaled
                clip = super(MixedPrecision, self).clip_gradients  # type: ignore[misc]
        clip(optimizer, clip_val, gradient_clip_algorithm)

    def _ask(self, optimizer: Any, clip_val: float, algorithm: GradClipAlgorithmType) -> None:
        if self._gam.trainer.lightning_module.automatic_optimization or self._gam.passes_of is optimizer:
            raise RuntimeError(
                "self.clip_gradients would clip the gradients of one of the passes of a step. With FusedGAM call it in "
                "configure_gradient_clipping, or, in manual optimization, before optimizer.step(closure) instead of in the "
                "closure: it then clips the combined direction"
            )
        asked = self._gam.asked.setdefault(optimizer, [])
        if (clip_val, algorithm) not in asked:
            asked.append((clip_val, algorithm))

    def _plugin_with(self, method: str) -> Any:
        """The class that defines the plugin's `method`."""
        return next(c for c in type(self).__mro__ if c is not _ServesGAM and method in vars(c))


def _serving(plugin: Any, trainer: pl.Trainer) -> Any:
    """The precision plugin with `_ServesGAM` mixed in, under the same name, which checkpoints refer to."""
    kind = type(plugin)
    own = {"__qualname__": kind.__qualname__, "_gam": _Clipping(trainer)}
    served: Any = object.__new__(type(kind.__name__, (_ServesGAM, kind), own))
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
