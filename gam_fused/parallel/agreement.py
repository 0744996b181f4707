"""Whether this rank may step again after a step that failed: only where all ranks failed at the same place.

Where one fails alone, the others wait in a collective of a later pass. The collectives of its next step would serve them:
sizes fit, and replicas would differ from then on without a word. So the ranks tell one another through the store that the
process group was made with, while no collective can be trusted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gam_fused.checks import Groups
from gam_fused.parallel.dtensor import is_dtensor
from gam_fused.torch_private import default_store

_REMEDY = (
    "End this rank, as after any failure of one rank alone, or load a checkpoint into model and optimizer on all ranks. "
    "Only with perturb_sync='local' may a rank whose pass failed step again alone, as the others wait for it there"
)


def ranks_beside(modules: Iterable[nn.Module], groups: Groups) -> list[int]:
    """The ranks that passes communicate with, this one included: of DDP modules, and of the meshes of sharded parameters."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    ranks: set[int] = set()
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        if isinstance(module, DistributedDataParallel):
            ranks |= set(dist.get_process_group_ranks(module.process_group))
    for mesh in {id(p.device_mesh): p.device_mesh for g in groups for p in g["params"] if is_dtensor(p)}.values():
        ranks |= set(mesh.mesh.flatten().tolist())
    return sorted(ranks)


def check_all_failed(ranks: Sequence[int], name: str, place: str) -> None:
    """Wait until all ranks have said where their last step failed, at most for the timeout of the default group's store.

    That is the timeout given to `init_process_group`, unless a store was given too, which then has one of its own.

    Args:
        name: of this occasion, the same on all ranks. place: where it failed on this one.

    Raises:
        RuntimeError: others do not say so, or failed elsewhere.
    """
    store = default_store()
    if store is None:
        return
    store.set(f"gam_fused/{name}/{dist.get_rank()}", place)
    keys = [f"gam_fused/{name}/{rank}" for rank in ranks]
    timeout = store.timeout.total_seconds()
    end = time.monotonic() + timeout
    while not store.check(keys):  # `wait` would let no signal through
        if time.monotonic() > end:
            raise RuntimeError(
                f"the last step failed on this rank, {place}, but not on all others: some reported no failure within "
                f"{timeout:g} seconds, the timeout of the process group's store. They wait for this rank in a pass that it "
                f"has left, or have made the update. {_REMEDY}"
            )
        time.sleep(0.05)
    places = [store.get(key).decode() for key in keys]
    if len(set(places)) > 1:
        told = ", ".join(f"rank {rank}: {where}" for rank, where in zip(ranks, places, strict=True))
        raise RuntimeError(f"the last step failed at different places ({told}). {_REMEDY}")
