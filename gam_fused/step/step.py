"""One step: passes, ascents between them, and one update at the end, on every block.

`methods` says which of them a method makes. Here is no formula (those are the backends') and no coefficient (those are the
methods'). The update guards the combined direction d, averages it where it has to be, and gives it to the base optimizer.
"""

from __future__ import annotations

import warnings
from itertools import repeat
from operator import is_
from typing import Any

import torch

from gam_fused import torch_private
from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Restore
from gam_fused.backends.tensor_lists import EMPTY
from gam_fused.constants import GUARD, Control
from gam_fused.memory import gradients
from gam_fused.parallel import dtensor
from gam_fused.step.ascents import Ascents
from gam_fused.step.averaging import average_direction
from gam_fused.step.direction import Direction, Lists
from gam_fused.step.session import IN_UPDATE


class Step(Ascents):
    """One `step(closure)`: the passes, and what is done with their gradients. Made and used under `torch.no_grad`."""

    def update(
        self,
        *,
        last: Lists,
        g1: Lists | None = None,
        folded: Lists | None = None,
        table: str = "method",
        guard_direction: bool = False,
    ) -> None:
        """theta <- the base optimizer's update of the backup in the direction d of the operands, unless skipped.

        `guard_direction`: `folded` may hold what is not finite without a reduction having seen it.
        """
        d = Direction(last, g1, folded, table)
        session, blocks = self.session, self.blocks
        self.plan.check_in_place(session.param_groups)  # once, after all passes: it takes a while
        if not self.record.ascents and not blocks[0].backed_up:
            for b in blocks:
                b.set(Control.FOUND_INF, 0.0)
        if d.g1 or (d.folded and (guard_direction or self.settings.max_grad_norm)):
            self._reduce_direction(d)
        else:
            self.reduce_norm(GUARD, d.last)
        if session.replicas and session.replicas.local:
            if d.g1:
                self.record.extras["products"] = blocks[0].shared.partials[GUARD].sum(1)
            d = average_direction(session.replicas, blocks, d, self.seen)
            self.reduce_norm(GUARD, d.last)
        self.at = IN_UPDATE
        if session.replicas:
            session.replicas.agreed()
        self._fill_in(d)
        if self.fused:
            self._apply_fused(d)
        else:
            self._apply_foreign(d)

    def _reduce_direction(self, d: Direction) -> None:
        for i, b in enumerate(self.blocks):
            b.kernels.direction_products(
                DirectionProducts(
                    layout=b.layout,
                    g1=d.g1[i] if d.g1 else EMPTY,
                    last=d.last[i],
                    folded=d.folded[i] if d.folded else EMPTY,
                    coefficients=b.shared.tables[d.table],
                    partials=b.part("partials", GUARD, d.rows),
                )
            )
        self.plan.share(GUARD, d.rows)

    def _fill_in(self, d: Direction) -> None:
        """A parameter that had a gradient in any pass, but has none in the lists of the update, gets a zero there.

        For a base optimizer that is not fused it must be in `last`, in whose memory it gets d.
        """
        for i, (b, seen) in enumerate(zip(self.blocks, self.seen, strict=True)):
            last = d.last[i]
            if not last.complete and any(map(is_, last.tensors, repeat(None))):
                lists = d.of(i) if self.fused else [last]
                for j in range(len(b.params)):
                    if seen[j] and all(lst.tensors[j] is None for lst in lists):
                        last.replace(j, b.zeros(j))

    def _apply_fused(self, d: Direction) -> None:
        session = self.session
        base: Any = self.fused
        for b, mask in zip(self.blocks, self.seen, strict=True):
            b.state.ensure(base, self.plan.state_keys, session.state, session.param_groups, mask)
        for i, b in enumerate(self.blocks):
            state1, state2, state3 = b.state.lists
            b.kernels.combined_update_(
                CombinedUpdate(
                    layout=b.layout,
                    theta=b.theta,
                    backup=b.backup if b.backed_up else EMPTY,
                    g1=d.g1[i] if d.g1 else EMPTY,
                    last=d.last[i],
                    folded=d.folded[i] if d.folded else EMPTY,
                    state1=state1,
                    state2=state2,
                    state3=state3,
                    steps=b.state.steps,
                    coefficients=b.shared.tables[d.table],
                    partials=b.shared.part("partials", GUARD, d.rows),
                    control=b.control,
                    direction=b.part("direction"),
                    algorithm=int(base.algorithm),
                )
            )
            b.backed_up = False
        torch_private.note_step_of_base(session.base)

    def _apply_foreign(self, d: Direction) -> None:
        """d into `p.grad`, then `base.step()`: a plain optimizer must be asked on the host whether to run at all."""
        session = self.session
        for i, b in enumerate(self.blocks):
            b.kernels.combine_(
                Combine(
                    layout=b.layout,
                    out=d.last[i],
                    g1=d.g1[i] if d.g1 else EMPTY,
                    last=d.last[i],
                    folded=d.folded[i] if d.folded else EMPTY,
                    coefficients=b.shared.tables[d.table],
                    partials=b.shared.part("partials", GUARD, d.rows),
                    control=b.control,
                    direction=b.part("direction"),
                )
            )
            if b.backed_up:
                b.kernels.restore_(Restore(layout=b.layout, theta=b.theta, backup=b.backup))
        if session.skipped:
            return
        for b, lst in zip(self.blocks, d.last, strict=True):
            b.state.drop_unstarted(session.state)
            for p, direction in zip(b.params, lst.tensors, strict=True):
                if direction is not None:
                    direction = gradients.as_kept(direction, p)
                    p.grad = dtensor.like(direction, p) if b.sharded else direction
            b.backed_up = False  # the base optimizer's step is not undone
        self.settle()
        _step_base(session.base)
        gradients.clear(self.plan.params)


def _step_base(base: torch.optim.Optimizer) -> None:
    try:
        with torch_private.global_step_hooks_called():
            base.step()
    except BaseException as error:
        note = (
            f"FusedGAM: {type(base).__name__}.step failed after all passes had been made. Weights and optimizer state "
            "are as it left them: parameters that it had updated stay updated, in both. Buffers and generators are as one "
            "pass leaves them"
        )
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:  # Python 3.10
            warnings.warn(note, stacklevel=2)
        raise
