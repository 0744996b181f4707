"""Logs the optimizer's diagnostics and the flatness of the minimum during training, in your own loop.

    log = FlatnessLog(model, criterion, loader, optimizer, write=wandb.log, every_steps=100)
    for batch in data:
        optimizer.step(closure, batch)
        log.after_step()

For Lightning and the Hugging Face Trainer there are callbacks: `integrations.lightning_flatness`,
`integrations.transformers_flatness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from gam_fused.checks import whole
from gam_fused.flatness import report
from gam_fused.optimizer import FusedGAM


def figures(
    model: nn.Module, criterion: Callable[..., Tensor] | None, loader: Iterable[Any], optimizer: Any = None, **how: Any
) -> dict[str, float]:
    """All values to log, once: `flatness/...` from `gam_fused.flatness.report`, and `gam/...` from `diagnostics()`.

    Args:
        model, criterion, loader, how: as for `gam_fused.flatness.report`.
        optimizer: a `FusedGAM`, or Accelerate's wrapper of one. Before the first step, or with another optimizer, there is
            no `gam/...`.

    Raises:
        TypeError, ValueError: as `gam_fused.flatness.report`.
    """
    # One of ours hands attributes of its base optimizer on, which may be a wrapper with an `optimizer` too.
    inner = optimizer if isinstance(optimizer, FusedGAM) else getattr(optimizer, "optimizer", None)
    seen = inner.diagnostics() if isinstance(inner, FusedGAM) and inner.session.last is not None else {}
    found = {f"gam/{name}": float(value) for name, value in seen.items()}
    return found | {f"flatness/{name}": value for name, value in report(model, criterion, loader, **how).items()}


class Every:
    """When to log: after every so many steps, after every so many epochs, or both."""

    def __init__(self, steps: int | None, epochs: int | None):
        if steps is None and epochs is None:
            raise ValueError("give every_steps, every_epochs or both: nothing would be logged")
        self._steps = None if steps is None else whole("every_steps", steps, minimum=1)
        self._epochs = None if epochs is None else whole("every_epochs", epochs, minimum=1)
        self._last = 0

    def step(self, done: int) -> bool:
        """Whether to log after step `done`, counted from 1. A step that is told again, as micro-batches do, is not new."""
        new, self._last = done != self._last, done
        return new and self._steps is not None and done % self._steps == 0

    def epoch(self, done: int) -> bool:
        """Whether to log after epoch `done`, counted from 1."""
        return self._epochs is not None and done % self._epochs == 0


class FlatnessLog:
    """Calls `write` with the result of `figures`, every `every_steps` steps and every `every_epochs` epochs.

    Args:
        model, criterion, loader, optimizer, how: as for `figures`. A part of the training data is enough: `batches=4`.
        write: called with a dict of floats.
        every_steps, every_epochs: None disables logging after steps, or after epochs.

    Raises:
        ValueError: neither `every_steps` nor `every_epochs`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor] | None,
        loader: Iterable[Any],
        optimizer: Any = None,
        *,
        write: Callable[[dict[str, float]], Any],
        every_steps: int | None = None,
        every_epochs: int | None = None,
        **how: Any,
    ):
        self._every, self._write = Every(every_steps, every_epochs), write
        self._figures = partial(figures, model, criterion, loader, optimizer, **how)
        self._steps = self._epochs = 0

    def after_step(self) -> None:
        """Call this after every optimizer step."""
        self._steps += 1
        if self._every.step(self._steps):
            self._write(self._figures())

    def after_epoch(self) -> None:
        """Call this after every epoch."""
        self._epochs += 1
        if self._every.epoch(self._epochs):
            self._write(self._figures())
