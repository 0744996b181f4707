"""Lightning: `Trainer(callbacks=[GAMCallback(), FlatnessCallback(cross_entropy, loader, every_steps=100)])`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from gam_fused.integrations.flatness_log import Every, figures
from gam_fused.integrations.lightning_private import pl


class FlatnessCallback(pl.Callback):
    """Logs the optimizer's diagnostics (`gam/...`) and the flatness of the loss (`flatness/...`) during training.

    It uses `LightningModule.log_dict`, so that loggers, progress bars and `ModelCheckpoint(monitor=...)` see the values.
    Each rank measures on what its own `loader` yields; `all_ranks=True` gives the mean over ranks.

    Args:
        criterion, loader, how: as for `gam_fused.flatness.report`; the model is the LightningModule and its
            `forward`. For another loss, pass `batch_loss=lambda module, batch: ...` and a criterion of None.
        every_steps, every_epochs: None disables logging after steps, or after epochs. Steps are those of `global_step`.

    Raises:
        ValueError: neither `every_steps` nor `every_epochs`.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor] | None,
        loader: Iterable[Any],
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        **how: Any,
    ):
        self._every = Every(every_steps, every_epochs)
        self._criterion, self._loader, self._how = criterion, loader, how

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._every.step(trainer.global_step):
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._every.epoch(trainer.current_epoch + 1):
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        module.log_dict(figures(module, self._criterion, self._loader, optimizer, **self._how))
