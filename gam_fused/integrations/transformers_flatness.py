"""Hugging Face Trainer: `trainer.add_callback(FlatnessCallback(trainer, loader, every_steps=100))`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from gam_fused.integrations.flatness_log import Every, figures


class FlatnessCallback(TrainerCallback):
    """Logs the optimizer's diagnostics (`gam/...`) and the flatness of the loss (`flatness/...`) with `Trainer.log`.

    Args:
        trainer: whose model, optimizer and loggers are used.
        loader: mini-batches to measure on: a separate DataLoader, or a list, not the Trainer's own training loader, which is
            in use.
        criterion, how: as for `gam_fused.flatness.report`; by default the model returns the loss.
        every_steps, every_epochs: None disables logging after steps, or after epochs. Steps are those of
            `state.global_step`.

    Raises:
        ValueError: neither `every_steps` nor `every_epochs`.
    """

    def __init__(
        self,
        trainer: Any,
        loader: Iterable[Any],
        criterion: Callable[..., Tensor] | None = None,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        **how: Any,
    ):
        self._every = Every(every_steps, every_epochs)
        self._trainer, self._criterion, self._loader, self._how = trainer, criterion, loader, how
        self._epochs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epochs = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._every.step(state.global_step):
            self._log()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._epochs += 1
        if self._every.epoch(self._epochs):
            self._log()

    def _log(self) -> None:
        trainer = self._trainer
        trainer.log(figures(trainer.model, self._criterion, self._loader, trainer.optimizer, **self._how))
