"""Sums over all parameters of all ranks, where parameters are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gam_fused.parallel.dtensor import device_for

if TYPE_CHECKING:
    from gam_fused.memory.blocks import Block


class ShardSums:
    """Adds partial sums over the ranks that hold the other shards: one all-reduce of a few numbers per process group.

    Parameters that are sharded alike make one *kind*; kinds come in the order of the param groups, the same on all ranks,
    however their shards fall into blocks. Plain parameters take no part: every rank holds all of them.
    """

    def __init__(self, blocks: Iterable[Block]):
        kinds: dict[tuple[dist.ProcessGroup, ...], list[Block]] = {}
        for block in blocks:
            if block.reduction_groups:
                kinds.setdefault(block.reduction_groups, []).append(block)
        self.kinds = list(kinds.values())
        groups = dict.fromkeys(group for key in kinds for group in key)
        self._members = [(group, [i for i, key in enumerate(kinds) if group in key]) for group in groups]

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def add(self, sums: list[Tensor]) -> list[Tensor]:
        """The sums over all shards, from those of this rank: one float64 tensor [k] per kind."""
        sums = list(sums)
        for group, members in self._members:
            stacked = torch.stack([sums[i] for i in members])
            home = stacked.device
            stacked = stacked.to(device_for(group, home))
            dist.all_reduce(stacked, group=group)
            for i, row in zip(members, stacked.to(home), strict=True):
                sums[i] = row
        return sums

    def add_up(self, slot: int, rows: int) -> None:
        """Put the sums over all shards in place of this rank's, in the partial sums of every kind."""
        columns = [[block.part("partials", slot, rows) for block in kind] for kind in self.kinds]
        totals = self.add([_total([c.sum(-1) for c in parts]) for parts in columns])
        for parts, total in zip(columns, totals, strict=True):
            for part in parts:
                part.zero_()
            parts[0][..., 0] = total

    def totals(self, blocks: Sequence[Block], of: Any) -> Tensor:
        """Sums over all parameters of all ranks: `of(block)` is a float64 tensor [k] of sums over one block. Shape [k]."""
        plain = [of(block) for block in blocks if not block.reduction_groups]
        sharded = self.add([_total([of(block) for block in kind]) for kind in self.kinds])
        return _total([*plain, *sharded])


def _total(parts: list[Tensor]) -> Tensor:
    """The sum of tensors that may lie on several devices."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
