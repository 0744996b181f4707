"""Hugging Face Trainer: `class MyTrainer(GAMTrainerMixin, Trainer)`.

    optimizer = FusedGAM(model, torch.optim.AdamW, lr=5e-5)
    MyTrainer(model, args, train_dataset=..., optimizers=(optimizer, None)).train()

or `optimizer_cls_and_kwargs=(FusedGAM, {"base_optimizer": torch.optim.AdamW, "lr": 5e-5})`, which keeps the Trainer's param
groups.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor

from gam_fused.integrations import BatchClosure, all_micro_batches, clipping_to, on_direction, overridden
from gam_fused.optimizer import FusedGAM
from gam_fused.step.batches import part_of


class GAMTrainerMixin:
    """Runs the whole optimizer step in `training_step`, whose passes run all micro-batches; list it before `Trainer`.

    - `gradient_accumulation_steps`: micro-batches are kept until the last has arrived, and `training_step` then returns the
      loss of all of them, from the unperturbed pass.
    - `max_grad_norm` of the arguments clips the combined direction; if it is 0, the optimizer's own value applies. The
      logged gradient norm is that of the unperturbed gradient.
    - Callbacks that act on gradients find the combined direction d, unscaled, clipped and of all micro-batches, in each
      `p.grad`: `on_pre_optimizer_step` right before the base optimizer's update, at unperturbed weights, and
      `on_optimizer_step` after it, once per step. In a skipped step the first is not called, and the second finds no
      gradients. If a callback that is not transformers' own defines one of them, the update is not fused.
    - `flatness_fraction`: passes of the flatness term run on the first part of each micro-batch, and `num_items_in_batch`
      is what `get_batch_samples` counts in the parts.
    - fp16: the Trainer's scaler becomes the optimizer's `grad_scaler`.
    - The Trainer's model becomes the optimizer's, if it has none.

    If you override `training_step` in a class after the mixin in the MRO, it runs one micro-batch of one pass; in a class
    before the mixin, `super().training_step` is a whole step, which leaves no gradients. With an optimizer that is not a
    `FusedGAM` the mixin changes nothing.

    Raises:
        RuntimeError: DeepSpeed.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.accelerator.sync_gradients = True  # type: ignore[attr-defined]
            vars(self.callback_handler).pop("on_pre_optimizer_step", None)  # type: ignore[attr-defined]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        trainer: Any = self
        if not isinstance(self._gam, FusedGAM):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            return loss
        if trainer.is_deepspeed_enabled:
            raise RuntimeError(
                "DeepSpeed steps the optimizer itself after every backward, but FusedGAM needs several: use DDP or FSDP2"
            )
        if not hasattr(self, "_waiting"):
            self._waiting: list[tuple[Any, Any]] = []
        self._waiting.append((inputs, num_items_in_batch))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        count = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
        batches, self._waiting = self._waiting[-count:], []  # those before were left by an epoch that was stopped
        losses: list[Tensor] = []

        def one_pass(batches: list[tuple[Any, Any]]) -> Tensor:
            total = torch.zeros((), device=trainer.args.device)
            for i, batch in enumerate(batches):
                with nullcontext() if i == len(batches) - 1 else trainer.accelerator.no_sync(model):
                    total += super(GAMTrainerMixin, self).training_step(model, *batch)  # type: ignore[misc]
            losses.append(total)
            return total

        self._gam.grad_scaler = trainer.accelerator.scaler
        self._gam.session.modules = self._gam.session.modules or [trainer.model]
        self._step(all_micro_batches(BatchClosure(one_pass, batches, self._parts)))
        # The loop is about to call `optimizer.step()`, which does nothing while gradients are not to be synchronised; it
        # sets this anew for every batch.
        trainer.accelerator.sync_gradients = False
        return losses[0]

    def _parts(self, batches: list[tuple[Any, Any]], fraction: float) -> list[tuple[Any, Any]]:
        """The first `fraction` of each micro-batch, and the number of items in them all, which losses are divided by."""
        trainer: Any = self
        parts = [part_of(inputs, fraction) for inputs, _ in batches]
        number = batches[0][1]
        if number is not None:
            _, number = trainer.get_batch_samples(iter(parts), len(parts), trainer.args.device)
        return [(part, number) for part in parts]

    def _step(self, one_pass: Callable[..., Any]) -> None:
        """One optimizer step with the callbacks that the loop would call around it."""
        trainer: Any = self
        before, after = self._defining("on_pre_optimizer_step"), self._defining("on_optimizer_step")
        kept: list[tuple[Tensor, Tensor | None]] = []

        def act() -> None:
            handler = copy(trainer.callback_handler)
            handler.callbacks = before
            trainer.control = handler.call_event("on_pre_optimizer_step", trainer.args, trainer.state, trainer.control)
            if after:
                kept.extend((p, p.grad) for group in self._gam.param_groups for p in group["params"])

        limit = trainer.args.max_grad_norm or self._gam.max_grad_norm
        with clipping_to(self._gam, limit), on_direction(self._gam, act) if before or after else nullcontext():
            trainer.optimizer.step(one_pass)
        for p, d in kept:  # the loop calls `on_optimizer_step`, and drops gradients after it
            p.grad = d
        # The loop's own call would come after the update.
        trainer.callback_handler.on_pre_optimizer_step = lambda args, state, control, **_: control

    def _defining(self, event: str) -> list[Any]:
        """Callbacks that define `event`, except transformers' own, which do not change gradients (and save checkpoints)."""
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if overridden(c, [event]) and not type(c).__module__.startswith("transformers.")]

    @property
    def _gam(self) -> Any:
        optimizer: Any = self.optimizer  # type: ignore[attr-defined]
        return getattr(optimizer, "optimizer", optimizer)  # what Accelerate has wrapped

    def _clip_grad_norm(self, model: Any) -> Any:
        if not isinstance(self._gam, FusedGAM):
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self._gam.diagnostics().get("gradient_norm")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if isinstance(self._gam, FusedGAM):
            grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
