"""Ascents: where the passes of one step are made, and the accumulation of gradients on the way."""

from __future__ import annotations

from typing import Any

import torch

from gam_fused.backends.operands import Combine, Perturb, SquaredNorm
from gam_fused.backends.tensor_lists import EMPTY
from gam_fused.constants import GUARD
from gam_fused.step.direction import Lists
from gam_fused.step.passes import Passes


class Ascents(Passes):
    """The ascents between the passes, on every block."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.backed_up = False

    def ascend(
        self, ascent: int, x: Lists, *, minus: Lists | None = None, fold: Lists | None = None, oracle: bool = False
    ) -> Lists | None:
        """theta <- base + radius * (x - minus) / |x - minus|.

        `ascent` 0 and 1 start from the weights before the step, 2 from where the last one led. The first to run also backs
        theta up. With `fold`, that list becomes FOLD_0 * fold + FOLD_2 * x, and is returned as what `update` takes as
        `folded`.
        """
        self.reduce_norm(ascent, x, minus)
        folded = self._foldable(fold, x) if fold else None
        for i, b in enumerate(self.blocks):
            b.kernels.perturb_(
                Perturb(
                    layout=b.layout,
                    theta=b.theta,
                    base=b.backup if b.backed_up and ascent < 2 else EMPTY,
                    x=x[i],
                    y=minus[i] if minus else EMPTY,
                    folded=folded[i] if folded else EMPTY,
                    backup=EMPTY if b.backed_up else b.backup,
                    coefficients=b.shared.tables["oracle" if oracle else "method"],
                    partials=b.shared.part("partials", ascent, 2),
                    control=b.control,
                    realised=b.part("realised", ascent),
                    ascent=ascent,
                    adaptive=self.settings.adaptive,
                )
            )
            b.backed_up = True
        if not oracle:
            self.record.ascents.append(ascent)
        return folded

    def reduce_norm(self, slot: int, x: Lists, minus: Lists | None = None) -> None:
        """Partial sums of |x - minus|^2 into a slot; of the weighted ones where `adaptive`, but for the guard."""
        for i, b in enumerate(self.blocks):
            weight = EMPTY
            if self.settings.adaptive and slot != GUARD:
                weight = b.backup if b.backed_up and slot < 2 else b.theta
            y = minus[i] if minus else EMPTY
            b.kernels.squared_norm(
                SquaredNorm(layout=b.layout, x=x[i], y=y, weight=weight, partials=b.part("partials", slot, 2))
            )
        self.plan.share(slot, 2)

    def accumulator(self, lists: Lists) -> Lists:
        """`lists` as what `update` takes as `folded`: in float32 where they are of lower precision."""
        return [b.accumulator(lst) for b, lst in zip(self.blocks, lists, strict=True)]

    def combine(self, table: str, *, out: Lists, last: Lists, g1: Lists | None = None, folded: Lists | None = None) -> Lists:
        """out <- a combination of gradients, with the weights of one of the method's `combinations`. Returns `out`."""
        for i, b in enumerate(self.blocks):
            for j, t in enumerate(out[i].tensors):
                if t is None and self.seen[i][j]:
                    out[i].replace(j, b.zeros(j))
            b.kernels.combine_(
                Combine(
                    layout=b.layout,
                    out=out[i],
                    g1=g1[i] if g1 else EMPTY,
                    last=last[i],
                    folded=folded[i] if folded else EMPTY,
                    coefficients=b.shared.tables[table],
                    partials=b.shared.part("partials", 0, 2),
                    control=b.unscaled_control,
                    direction=b.part("direction"),
                )
            )
        return out

    def _foldable(self, fold: Lists, x: Lists) -> Lists:
        """`fold`, with zeros where a gradient was missing there but is not in `x`."""
        for lst, other in zip(fold, x, strict=True):
            if lst.complete:
                continue
            for i, (mine, theirs) in enumerate(zip(lst.tensors, other.tensors, strict=True)):
                if mine is None and theirs is not None:
                    lst.replace(i, torch.zeros_like(theirs))
        return self.accumulator(fold)
