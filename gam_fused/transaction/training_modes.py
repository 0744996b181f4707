"""Whether the model's modules are in training mode: a closure may leave them in another than it found them in."""

from __future__ import annotations

from operator import attrgetter

from gam_fused.transaction.model_state import ModelState

_training = attrgetter("training")


class TrainingModes:
    """`module.training` of a model's modules in one step: every pass starts from the same, and the first's stay."""

    def __init__(self, model: ModelState):
        self._modules = model.submodules
        self._before = self._now()
        self._after: list[bool] | None = None  # once further passes follow

    def replay(self) -> None:
        """Before each further pass."""
        if self._after is None:
            self._after = self._now()
        self._set(self._before)

    def finish(self) -> None:
        """As the first pass left them."""
        if self._after is not None:
            self._set(self._after)

    def abort(self) -> None:
        """After a failure: as before the step."""
        self._set(self._before)

    def _now(self) -> list[bool]:
        return list(map(_training, self._modules))

    def _set(self, modes: list[bool]) -> None:
        if self._now() != modes:
            for module, mode in zip(self._modules, modes, strict=True):
                module.training = mode
