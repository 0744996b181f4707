"""Steps that are taken for their side effects only (warming up), and then undone: everything back in place, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gam_fused.memory import gradients
from gam_fused.settings import Settings
from gam_fused.step.session import Session
from gam_fused.transaction.model_state import ModelState


class Preserved:
    """What steps change of an optimizer with a fused base, as it stands now; `Session.prepare` has run.

    Weights, optimizer state, counters, buffers of `model` and generators. `put_back` writes into the same tensors, so no
    address changes; state that did not exist before is zeroed where it is, and counts as not started.
    """

    def __init__(self, session: Session, settings: Settings):
        self._session = session
        plan, state = session.plan, session.state
        fused: Any = session.fused
        for b in plan.blocks:  # adopt what a checkpoint has left first, since adopting replaces tensors
            active = [p in state for p in b.params]
            b.state.ensure(fused, plan.state_keys, state, session.param_groups, active)
        tensors: list[Tensor] = [*plan.params, *self._state_tensors()]
        tensors += [t for b in plan.blocks for t in (b.control, b.state.counts)]
        self._saved = [(t, t.detach().clone()) for t in tensors]
        self._buffers = ModelState(session.modules, plan.params, settings.backend).begin() if session.modules else None
        self._random = session.generators_of(self._buffers.devices if self._buffers else set()).begin()

    def _state_tensors(self) -> list[Tensor]:
        return [t for entry in self._session.state.values() for t in entry.values() if isinstance(t, Tensor)]

    @torch.no_grad()
    def put_back(self) -> None:
        """As it was. Gradients are dropped."""
        known = {id(t) for t, _ in self._saved}
        for t in self._state_tensors():
            if id(t) not in known:
                t.zero_()
        for t, copy in self._saved:
            t.copy_(copy)
        if self._buffers:
            self._buffers.abort()
        self._random.abort()
        gradients.clear(self._session.plan.params)
