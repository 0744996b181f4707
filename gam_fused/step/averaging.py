"""What the optimizer averages over the ranks itself: the gradients of each pass, or the combined direction."""

from __future__ import annotations

import torch
from torch import Tensor

from gam_fused.backends.operands import Combine
from gam_fused.backends.tensor_lists import EMPTY
from gam_fused.constants import GUARD, Control
from gam_fused.memory.blocks import Block
from gam_fused.parallel.ddp import Exchange, Replicas
from gam_fused.step.direction import Direction, Lists


def average(replicas: Replicas, blocks: list[Block], lists: Lists) -> Lists:
    """Lists of this rank, averaged over all; what is missing on some ranks counts as zero there."""
    averaged = []
    for b, lst in zip(blocks, lists, strict=True):
        exchange = Exchange(b.theta.tensors)
        pairs = [(view, t) for view, t in zip(exchange.views.tensors, lst.tensors, strict=True) if t is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [t for _, t in pairs])
        exchange.all_reduce(replicas.group, [t is not None for t in lst.tensors])
        averaged.append(exchange.present())
    return averaged


def average_direction(replicas: Replicas, blocks: list[Block], d: Direction, seen: list[list[bool]]) -> Direction:
    """d of every rank, averaged: as the gradient of a plain step, still multiplied by the loss scale.

    A rank that would skip the step makes all ranks skip it.

    Args:
        seen: which parameters had a gradient on this rank; becomes which had one on any.
    """
    directions = []
    for i, b in enumerate(blocks):
        if b.average is None:  # once per step, before it is clipped
            b.average = Exchange(b.theta.tensors)
        exchange, control = b.average, b.unscaled_control
        control[Control.FOUND_INF].copy_(b.control[Control.FOUND_INF])
        control[Control.EPS].copy_(b.control[Control.EPS] * b.control[Control.LOSS_SCALE])  # beside norms that are scaled
        b.kernels.combine_(
            Combine(
                layout=b.layout,
                out=exchange.views,
                g1=d.g1[i] if d.g1 else EMPTY,
                last=d.last[i],
                folded=d.folded[i] if d.folded else EMPTY,
                coefficients=b.shared.tables[d.table],
                partials=b.shared.part("partials", GUARD, d.rows),
                control=control,
                direction=b.part("direction"),
            )
        )
        exchange.all_reduce(replicas.group, seen[i], skipped=control[Control.LAST_SKIPPED])
        b.set(Control.FOUND_INF, _as_flag(exchange.skipped))
        directions.append(exchange.present())
        seen[i] = [t is not None for t in directions[i].tensors]
    return Direction(last=directions, table="plain")


def _as_flag(skipped: Tensor) -> Tensor:
    return (skipped != 0).to(torch.float64)
