"""What the passes of a step share besides the weights: each starts from the same, and the first one's stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from gam_fused.step.closures import BatchClosure, batch_of
from gam_fused.step.session import Session
from gam_fused.transaction.batch_contents import BatchContents
from gam_fused.transaction.model_state import StepState
from gam_fused.transaction.other_gradients import OtherGradients
from gam_fused.transaction.randomness import RandomState
from gam_fused.transaction.training_modes import TrainingModes


class Surroundings:
    """Random numbers, the model's state (buffers, frozen parameters, submodules, training modes), the gradients of other
    optimizers and the mini-batch, in one step.

    Args:
        replays: whether random numbers are replayed; by `random`, if given.
    """

    def __init__(self, session: Session, closure: Callable[[], Any], replays: bool, random: RandomState | None):
        state = session.model_state
        self._closure = closure if isinstance(closure, BatchClosure) else None
        self._model = state.begin() if state else None
        of_model = [OtherGradients(state), TrainingModes(state)] if state else []
        if random is None and replays:
            random = session.generators_of(self._model.devices if self._model else set()).begin()
        self._batch = BatchContents(batch_of(closure), partial(_restored, session))
        parts = [random, self._model, *of_model, self._batch]
        self._parts: list[Any] = [part for part in parts if part is not None]
        self._settled = False  # whether all stand where they shall be after the step

    def first_pass(self) -> AbstractContextManager[None]:
        """During the closure of the first pass."""
        return self._model.first_pass() if self._model else nullcontext()

    def pass_done(self) -> None:
        """After each pass. Raises RuntimeError if it has changed a batch in another way than the pass before."""
        self._batch.pass_done()

    def first_pass_done(self) -> None:
        """After the first pass, once gradients are published."""
        if self._model:
            self._model.first_pass_done()

    def replay(self) -> None:
        """Before each further pass."""
        for part in self._parts:
            part.replay()

    def settle(self, skipped: Tensor) -> None:
        """As the first pass left them; in a skipped step (`skipped` is not 0) buffers are as before it."""
        if self._settled:
            return
        self._settled = True
        for part in self._parts:
            if isinstance(part, StepState):
                part.finish(skipped)
            else:
                part.finish()
        self._forget_part()

    def abort(self) -> None:
        """After a failure: as before the step."""
        if not self._settled:
            for part in self._parts:
                part.abort()
            self._forget_part()

    def _forget_part(self) -> None:
        if self._closure:
            self._closure.forget_part()


def _restored(session: Session) -> Iterator[Tensor]:
    """What every pass finds as the first did, or, of the weights, as it shall."""
    yield from session.plan.params
    for module in session.model_state.submodules if session.model_state else ():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
