"""Parameters that are DTensors (FSDP2, HSDP, tensor parallelism): the backends work on each rank's local shard.

What is global about a step are sums over elements, and those are added over the ranks that hold the other shards
(`ShardSums`); everything else in a step is element by element.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gam_fused.backends.tensor_lists import TensorList
from gam_fused.checks import Groups, describe

if TYPE_CHECKING:
    from gam_fused.memory.plan import Block


def is_dtensor(t: Any) -> bool:
    """Whether `t` is a torch.distributed.tensor.DTensor, without importing that."""
    return hasattr(t, "to_local")


def local(t: Any) -> Tensor:
    """The part of `t` on this rank, detached: the local shard of a DTensor, in its own memory; any other tensor itself."""
    if not is_dtensor(t):
        return t.detach()
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local(t)
    shard = t.to_local()
    return (shard.wait() if hasattr(shard, "wait") else shard).detach()


def like(shard: Tensor, p: Any) -> Tensor:
    """`shard` as a DTensor distributed as `p` is, without a copy."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def alike(a: Any, b: Any) -> bool:
    """Whether two DTensors are distributed in the same way."""
    same_mesh = a.device_mesh is b.device_mesh or a.device_mesh == b.device_mesh
    return same_mesh and a.placements == b.placements  # tuples


def adopt(value: Any, p: Any) -> Any:
    """The local shard of `value`, optimizer state of the DTensor `p` that may be distributed otherwise; None stays None.

    Raises:
        TypeError: a plain tensor; whether it is the whole or one rank's part cannot be seen.
    """
    if value is None:
        return None
    if not is_dtensor(value):
        raise TypeError(
            f"optimizer state of shape {tuple(value.shape)} for a DTensor parameter of shape {tuple(p.shape)} is a plain "
            "tensor: load checkpoints of sharded parameters with torch.distributed.checkpoint"
        )
    if not alike(value, p):
        value = value.redistribute(p.device_mesh, p.placements)
    return local(value)


def take(
    params: Sequence[Any], strides: Sequence[tuple[int, ...]], dtype: torch.dtype, groups: Groups, *, keep: bool
) -> TensorList:
    """`gradients.take` for DTensors: the local shard of each gradient, distributed as its parameter is.

    Shards of a reduce-scatter lie side by side in one buffer, so a gradient that is to be kept is copied.
    """
    taken: list[Tensor | None] = []
    for p, stride in zip(params, strides, strict=True):
        gradient, p.grad = p.grad, None
        if gradient is None:
            taken.append(None)
            continue
        if not is_dtensor(gradient) or gradient.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {describe(p, groups)} is not a dense DTensor, but {type(gradient).__name__}"
            )
        if not alike(gradient, p):  # tensor parallelism leaves sums pending
            gradient = gradient.redistribute(p.device_mesh, p.placements)
        shard = local(gradient)
        if keep or shard.dtype is not dtype or shard.stride() != stride:
            shard = torch.empty_strided(shard.shape, stride, dtype=dtype, device=shard.device).copy_(shard)
        taken.append(shard)
    return TensorList(taken, empty=1)


def reduction_groups(p: Any) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which sums over the elements of `p` must be added: one per mesh dimension it is sharded on.

    Ranks that hold a replica are not among them, so each element counts once. () for a plain tensor.
    """
    if not is_dtensor(p):
        return ()
    mesh = p.device_mesh
    return tuple(mesh.get_group(dim) for dim in _sharded_dims(p) if mesh.size(dim) > 1)


def shard_index(p: Any) -> int:
    """The number of this rank's shard among those of `p`; the same on every rank that holds a replica of it."""
    if not is_dtensor(p):
        return 0
    index = 0
    for dim in _sharded_dims(p):
        index = index * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return index


def _sharded_dims(p: Any) -> list[int]:
    """Mesh dimensions that split `p`. Not by `is_shard`, which denies the strided shards of FSDP over tensor parallelism."""
    return [dim for dim, placement in enumerate(p.placements) if not placement.is_replicate()]


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
            stacked = stacked.to(_device_of(group, home))
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


def _device_of(group: dist.ProcessGroup, home: torch.device) -> torch.device:
    """Where the group can communicate: `home` unless its backends do not serve it (CPU offload with NCCL alone)."""
    kinds = {device.type for device in group._device_types}
    if home.type in kinds or not kinds:
        return home
    kind = sorted(kinds)[0]
    return torch.device(kind, torch.get_device_module(kind).current_device())


def forward_dtypes(fsdp: Iterable[Any]) -> set[torch.dtype]:
    """To which dtypes FSDP's mixed-precision policies cast weights. Policies are not public; only an estimate asks."""
    policies = (getattr(getattr(m, "_get_fsdp_state", lambda: None)(), "_mp_policy", None) for m in fsdp)
    return {dtype for policy in policies if (dtype := getattr(policy, "param_dtype", None))}


def refuse_fsdp1(modules: Iterable[nn.Module], groups: Groups) -> None:
    """Raises TypeError for FullyShardedDataParallel: its shards look like plain tensors, and norms would be each rank's."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    wrapped = kind is not None and any(isinstance(m, kind) for root in modules for m in root.modules())
    marks = ("_is_flat_param", "_fsdp_flattened")  # of flat parameters, and of those that use_orig_params=True leaves
    flat = any(getattr(p, mark, False) for group in groups for p in group["params"] for mark in marks)
    if wrapped or flat:
        raise TypeError("FullyShardedDataParallel (FSDP1) is not supported; shard with torch.distributed.fsdp.fully_shard")


def fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules among `modules` and inside them that `fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then there are none
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for root in modules for m in root.modules() if isinstance(m, kind)]
