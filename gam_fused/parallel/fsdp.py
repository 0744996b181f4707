"""FullyShardedDataParallel: FSDP2's modules are found, FSDP1 is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from gam_fused.checks import Groups
from gam_fused.torch_private import is_of_fsdp1


def refuse_fsdp1(modules: Iterable[nn.Module], groups: Groups) -> None:
    """Raises TypeError for FullyShardedDataParallel: its shards look like plain tensors, and norms would be each rank's."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    wrapped = kind is not None and any(isinstance(m, kind) for root in modules for m in root.modules())
    flat = any(is_of_fsdp1(p) for group in groups for p in group["params"])
    if wrapped or flat:
        raise TypeError("FullyShardedDataParallel (FSDP1) is not supported; shard with torch.distributed.fsdp.fully_shard")


def fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules among `modules` and inside them that `fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then there are none
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for root in modules for m in root.modules() if isinstance(m, kind)]
