"""Buffers of a model under DistributedDataParallel, which start every step as rank 0 has them.

DDP broadcasts them in the first forward of a step. Where the optimizer averages over ranks itself, it does that too: every
pass has to start from the same values, and a rank that steps again, because its step failed, must not broadcast once more,
since no other rank would join in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

Copies = list[tuple[list[Tensor], list[Tensor]]]  # buffers of one device and dtype, and what they held on rank 0


class SharedBuffers:
    """The buffers of one DDP module. Used under `torch.no_grad`."""

    def __init__(self, ddp: DistributedDataParallel):
        self._ddp = ddp
        self._buffers: list[Tensor] = []
        self._received: Copies | None = None  # in this step, or in one whose passes failed and have not been made yet
        self._left: list[tuple[int, int]] = []  # what the buffers were after that

    def begin(self) -> None:
        """Before a step. Buffers that have been set since a step that failed, from a checkpoint, stay as they are."""
        module, ignored = self._ddp.module, self._ddp.parameters_to_ignore
        shared = self._ddp.will_sync_module_buffers()
        self._buffers = [b for name, b in module.named_buffers() if name not in ignored] if shared else []
        if self._received is not None and _marks(self._buffers) != self._left:
            self._received = []

    def align(self) -> None:
        """Before a pass: as they were on rank 0 before the step."""
        if self._received is None:
            self._received = self._receive()
        for buffers, values in self._received:
            torch._foreach_copy_(buffers, values)

    def agreed(self) -> None:
        """All passes have been made, and all ranks know it: the next step is another one, whatever becomes of this."""
        self._received = None

    def end(self) -> None:
        """After a step, or after one that failed and has been undone."""
        self._left = _marks(self._buffers)

    def _receive(self) -> Copies:
        """The values of rank 0; nothing on rank 0 itself."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for b in self._buffers:
            kinds[b.device, b.dtype].append(b)
        group, received = self._ddp.process_group, []
        for buffers in kinds.values():
            flat = torch.cat([b.reshape(-1) for b in buffers])
            dist.broadcast(flat, group=group, group_src=0)
            parts = flat.split([b.numel() for b in buffers])
            received.append((buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)]))
        return received if dist.get_rank(group) else []


def _marks(buffers: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes when one of them is written to, or another one is in its place."""
    return [(id(b), -1 if b.is_inference() else b._version) for b in buffers]
